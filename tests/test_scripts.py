"""From a sweep to tables, figures and verdicts: what is there is not run again, and nothing is drawn from nowhere."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from figures import groups, load
from reproduce import EXPERIMENTS, collect
from statistics_of_runs import interval, paired, slope

from fobmaml.files import read_csv

RESULTS = ROOT / "results"


def _script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)], text=True,
                          capture_output=True, timeout=300)


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, rel=1e-6)  # t quantile of a table
    assert interval([7.0]) == (7.0, 0.0)
    assert paired([1.0, 3.0], [0.0, 2.5])[0] == 0.75


def test_slope_is_recovered():
    x = [10.0**-k for k in range(6)]
    rate, half, intercept = slope(x, [3.0 * v**0.5 for v in x])
    assert (rate, 10**intercept) == pytest.approx((0.5, 3.0), rel=1e-12)
    assert half < 1e-6
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0], logarithmic=False)[0] == pytest.approx(2.0)


def test_every_sweep_is_an_experiment():
    configs = ROOT / "configs" / "experiment"
    sweeps = {path.stem for path in configs.glob("*.yaml")
              if "sweeper" in yaml.safe_load(path.read_text()).get("hydra", {})}
    assert sweeps == set(EXPERIMENTS)


def test_a_sweep_started_again_runs_what_is_missing_and_is_collected(run_train, tmp_path):
    sweep = ("-m", "experiment=convergence", "estimator=symmetric,fomaml", "steps=4", "bias.every=2", "solver.steps=3")
    done = run_train(*sweep)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "experiments" / "convergence"
    kept, gone = (folder / f"bias.every=2,estimator={name},solver.steps=3,steps=4" for name in ("fomaml", "symmetric"))
    first = json.loads((gone / "summary.json").read_text())
    before = (kept / "summary.json").stat().st_mtime_ns
    shutil.rmtree(gone)
    assert run_train(*sweep).returncode == 0
    assert (kept / "summary.json").stat().st_mtime_ns == before
    assert json.loads((gone / "summary.json").read_text())["bias/exact_norm"] == first["bias/exact_norm"]

    collect("convergence", folder, tmp_path)
    rows = {row["estimator"]: row for row in read_csv(tmp_path / "convergence.csv")}
    assert float(rows["symmetric"]["bias/exact_norm"]) == first["bias/exact_norm"]
    assert rows["symmetric"]["estimator.nu"] == "0.05"
    assert rows["fomaml"]["estimator.nu"] == ""
    curves = groups(read_csv(tmp_path / "convergence_curves.csv"), "estimator")
    assert [row["step"] for row in curves["fomaml"]] == ["0", "2", "4"]
    about = json.loads((tmp_path / "convergence.json").read_text())
    assert about["provenance"] == [first["provenance"]]
    assert about["settings"]["fixed_tasks"] is True


def test_a_sweep_goes_on_after_a_failed_job(run_train, tmp_path):
    done = run_train("-m", "experiment=optimizers", "optimizer=sgd", "optimizer.lr=1e30,0.1", "seed=0", "steps=3",
                     "width=4", "eval.validation_tasks=4")
    assert done.returncode == 1
    assert "not finite" in done.stderr
    collect("optimizers", tmp_path / "outputs" / "experiments" / "optimizers", tmp_path)
    rows = {float(row["optimizer.lr"]): row for row in read_csv(tmp_path / "optimizers.csv")}
    assert (rows[1e30]["status"], rows[1e30]["val/loss"]) == ("failed", "")
    assert rows[1e30]["reason"].startswith("the meta-gradient at step")
    assert rows[0.1]["status"] == "completed"


def test_a_missing_table_is_named_with_what_makes_it(tmp_path):
    for script, says in (("figure_nu.py", "bias_delta.csv is missing: make reproduce ARGS=bias_delta makes it"),
                         ("figure_time.py", "bench.csv is missing: make bench makes it"),
                         ("figure_convergence.py", "make reproduce ARGS=convergence makes it")):
        done = _script(script, tmp_path)
        assert done.returncode == 1
        assert says in done.stderr


def test_figures_are_drawn_from_the_tables(tmp_path):
    for table in RESULTS.glob("*.csv"):
        shutil.copy(table, tmp_path)
    done = _script("figures.py", tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    committed = {path.name for path in (RESULTS / "figures").iterdir()}
    assert drawn == {name for name in committed if not name.startswith("explorer_")}  # pictures of the page
    for table in tmp_path.glob("*.csv"):  # some scripts write tables: the same as committed
        assert table.read_text() == (RESULTS / table.name).read_text()


def test_the_page_that_sums_up_is_that_of_the_tables():
    done = _script("summary.py", "--check")
    assert done.returncode == 0, done.stderr


def test_verdicts_follow_the_tables(tmp_path):
    """With symmetric's memory made to grow, the claim falls."""
    for table in [*RESULTS.glob("*.csv"), *RESULTS.glob("*.json")]:
        shutil.copy(table, tmp_path)
    assert _script("summary.py", tmp_path).returncode == 0
    assert "| Memory | holds |" in (tmp_path / "README.md").read_text()
    path = tmp_path / "memory_steps.csv"
    header, *lines = path.read_text().splitlines()
    column = header.split(",").index("memory/peak_bytes")
    changed = []
    for line in lines:
        if "symmetric,solver.steps=200" in line:
            cells = next(csv.reader([line]))
            line = line.replace(cells[column], str(2 * int(cells[column])))
        changed.append(line)
    path.write_text("\n".join([header, *changed]) + "\n")
    assert _script("summary.py", tmp_path).returncode == 0
    assert "| Memory | does not hold |" in (tmp_path / "README.md").read_text()


def test_bad_requests_are_one_line():
    done = _script("reproduce.py", "nonsense")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nonsense: takes ")
    assert _script("reproduce.py", "--jobs", "0").stderr.startswith("error: --jobs=0: takes")


def test_every_table_has_its_provenance():
    derived = {"bias_slopes", "quadratic"}  # of tables, and of a formula
    for path in RESULTS.glob("*.csv"):
        name = path.stem.removesuffix("_curves").removesuffix("_chunks").removesuffix("_loop")
        if name in derived:
            continue
        about = json.loads((RESULTS / f"{name}.json").read_text())
        made_with = about["provenance"]
        for one in made_with if isinstance(made_with, list) else [made_with]:
            assert one["commit"]
            assert one["versions"]["torch"]
        assert about["command"].startswith(("make ", "python "))
    assert os.listdir(RESULTS / "figures")


def test_numbers_are_read_as_numbers(monkeypatch):
    monkeypatch.setattr("figures.FOLDER", RESULTS)
    rows = load("memory")
    assert isinstance(rows[0]["memory/peak_bytes"], float)
    assert isinstance(rows[0]["run"], str)
