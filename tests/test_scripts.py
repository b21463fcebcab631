"""From a sweep to tables, figures and verdicts: what is there is not run again, and nothing is drawn from nowhere."""

import ast
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from decimal import Decimal
from itertools import pairwise

import drawing
import figure_memory_accuracy
import figure_nu
import figures
import pytest
import reproduce
import summary
import tables
import yaml
from conftest import ROOT
from drawing import Missing, groups, load
from matplotlib.text import Text
from reproduce import EXPERIMENTS, collect, faults, jobs_of
from scipy import stats
from statistics_of_runs import interval, slope

from fobmaml.files import read_csv, write_csv
from fobmaml.run.plotting import new_figure

RESULTS = ROOT / "results"


def _script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=300,
    )


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, rel=1e-6)  # t quantile of a table
    assert interval([7.0]) == (7.0, 0.0)


def test_slope_is_recovered():
    x = [10.0**-k for k in range(6)]
    rate, half, intercept = slope(x, [3.0 * v**0.5 for v in x])
    assert (rate, 10**intercept) == pytest.approx((0.5, 3.0), rel=1e-12)
    assert half < 1e-6
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0], logarithmic=False)[0] == pytest.approx(2.0)


def test_every_sweep_is_an_experiment():
    configs = ROOT / "configs" / "experiment"
    sweeps = {
        path.stem for path in configs.glob("*.yaml") if "sweeper" in yaml.safe_load(path.read_text()).get("hydra", {})
    }
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
    done = run_train(
        "-m",
        "experiment=optimizers",
        "optimizer=sgd",
        "optimizer.lr=1e30,0.1",
        "seed=0",
        "steps=3",
        "width=4",
        "eval.validation_tasks=4",
    )
    assert done.returncode == 1
    assert "not finite" in done.stderr
    collect("optimizers", tmp_path / "outputs" / "experiments" / "optimizers", tmp_path)
    rows = {float(row["optimizer.lr"]): row for row in read_csv(tmp_path / "optimizers.csv")}
    assert (rows[1e30]["status"], rows[1e30]["val/loss"]) == ("failed", "")
    assert rows[1e30]["reason"].startswith("the meta-gradient at step")
    assert rows[0.1]["status"] == "completed"


def test_a_run_is_named_by_what_was_tuned_and_a_stopped_one_is_at_chance_in_every_example():
    one = {"choices": {"estimator": "maml"}, "test/accuracy": 0.75, "test/right": "6 3 0 0"}
    runs = {"seed=1,tuned=maml_plus_1shot": one, "seed=2,tuned=maml_plus_1shot": {"choices": {"estimator": "maml"}}}
    assert reproduce.method_of("seed=1,tuned=maml_plus_1shot", one) == "maml_plus"
    assert reproduce.method_of("seed=1,width=4", one) == "maml"
    found = [row["maml_plus"] for row in reproduce.by_example(runs)]
    assert found == pytest.approx([27.5, 15.0, 2.5, 2.5])  # of 50 and 25 points, and of 20 in equal parts
    assert sum(found) == pytest.approx((75 + 20) / 2)
    assert reproduce.by_example({"seed=2": {"choices": {"estimator": "maml"}}}) == []


def test_methods_of_one_estimator_are_told_apart_in_tables(tmp_path):
    for name, estimator in (("maml", "maml"), ("maml_plus", "maml"), ("reptile", "reptile")):
        folder = tmp_path / "runs" / f"seed=1,tuned={name}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "val/accuracy": 0.5}\n')
        summary = {"choices": {"estimator": estimator}, "config": {"seed": 1}, "provenance": {"commit": "0"}}
        (folder / "summary.json").write_text(json.dumps({"status": "completed", "step": 1, "seconds": 1.0, **summary}))
    collect("made", tmp_path / "runs", tmp_path)
    for table in ("made", "made_curves"):
        assert [row["estimator"] for row in read_csv(tmp_path / f"{table}.csv")] == ["maml", "maml_plus", "reptile"]


def _made(folder, run, estimator, **measured):
    """A job as its folder shows it."""
    seed, tuned = run.split(",")
    (folder / run).mkdir(parents=True)
    (folder / run / "metrics.jsonl").write_text('{"step": 1, "val/accuracy": 0.5}\n')
    config = {"seed": int(seed[5:]), "steps": 1 if tuned == "tuned=maml" else 2}
    summary = {"choices": {"estimator": estimator}, "config": config, "provenance": {"commit": tuned}, **measured}
    (folder / run / "summary.json").write_text(
        json.dumps({"status": "completed", "step": 1, "seconds": 1.0, **summary})
    )


def test_jobs_of_other_machines_stay_in_the_tables_that_are_added_to(tmp_path):
    """Which are the same as if all had been collected together."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    jobs = {"seed=1,tuned=maml": ("maml", "3 1"), "seed=2,tuned=maml": ("maml", "1 3")}
    jobs |= {"seed=1,tuned=reptile": ("reptile", "2 2"), "seed=2,tuned=reptile": ("reptile", "4 0")}
    for run, (estimator, right) in jobs.items():
        for folder in ("all", run.split(",")[1]):
            _made(tmp_path / folder, run, estimator, **{"test/accuracy": 0.5, "test/right": right})
    collect("made", tmp_path / "all", whole)
    assert collect("made", tmp_path / "tuned=maml", parts, add=True) == {}
    kept = collect("made", tmp_path / "tuned=reptile", parts, add=True)
    assert kept == {"seed=1,tuned=maml": "completed", "seed=2,tuned=maml": "completed"}
    for table in ("made.csv", "made_curves.csv", "made_examples.csv"):
        assert read_csv(parts / table) == read_csv(whole / table), table
    assert json.loads((parts / "made.json").read_text()) == json.loads((whole / "made.json").read_text())
    wanted = [frozenset(["experiment=made", *run.split(",")]) for run in jobs]
    assert faults("made", wanted, tmp_path / "none", kept=kept) == ["made: 2 of 4 jobs are there"]
    assert faults("made", wanted[:2], tmp_path / "none", kept=kept) == []
    with pytest.raises(ValueError, match=r"made_examples.csv has seed=1,tuned=reptile, seed=2,tuned=reptile already"):
        collect("made", tmp_path / "tuned=reptile", parts, add=True)


def test_a_missing_table_is_named_with_what_makes_it(tmp_path):
    done = _script("figure_time.py", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "bench.csv is missing: make bench makes it" in done.stderr
    for name, maker in (("bias_delta", "bias_delta"), ("convergence_curves", "convergence")):
        with pytest.raises(Missing, match=rf"{name}.csv is missing: make reproduce ARGS={maker} makes it"):
            load(tmp_path, name)
    (tmp_path / "nu.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Missing, match=r"nu.csv lacks c, d: make reproduce ARGS=nu makes it anew"):
        load(tmp_path, "nu", columns=("a", "c", "d"))


def _cell(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _same_table(found, wanted) -> bool:
    """The same columns and rows, and numbers that differ by no more than another processor's rounding."""
    return [list(row) for row in found] == [list(row) for row in wanted] and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else a == b
        for one, other in zip(found, wanted, strict=True)
        for a, b in zip(map(_cell, one.values()), map(_cell, other.values()), strict=True)
    )


def test_tables_are_compared_as_numbers():
    table = [{"a": "x", "b": "0.30000000000000004", "c": ""}, {"a": "y", "b": "1e-3", "c": "2"}]
    assert _same_table(table, [{"a": "x", "b": "0.3", "c": ""}, {"a": "y", "b": "0.001", "c": "2.0"}])
    for other in (
        [table[0]],
        [{**table[0], "b": "0.30001"}, table[1]],
        [{**table[0], "c": "0"}, table[1]],
        [{**table[0], "a": "z"}, table[1]],
        [{"b": "0.3", "a": "x", "c": ""}, table[1]],
    ):
        assert not _same_table(table, other)


@pytest.mark.slow
def test_figures_are_drawn_from_the_tables(tmp_path):
    for table in [*RESULTS.glob("*.csv"), *RESULTS.glob("*.json")]:
        shutil.copy(table, tmp_path)
    derived = {"bias_slopes.csv", "quadratic.csv"}
    for table in derived:
        (tmp_path / table).unlink()
    assert figures.redraw(tmp_path) == []
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    named = {path.stem.removeprefix("figure_") for path in (ROOT / "scripts").glob("figure_*.py")}
    assert drawn == {f"{name}.{suffix}" for name in named for suffix in ("png", "pdf")}
    for path in (tmp_path / "figures").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
        assert len(content) > 5000
    assert "| claim | verdict |" in (tmp_path / "README.md").read_text()
    for table in derived:
        assert _same_table(read_csv(tmp_path / table), read_csv(RESULTS / table))
    for table in RESULTS.glob("*.csv"):
        if table.name not in derived:  # what they are drawn from is not touched
            assert (tmp_path / table.name).read_bytes() == table.read_bytes()


def test_a_script_of_a_figure_draws_it_alone(tmp_path):
    shutil.copy(RESULTS / "inner_steps.csv", tmp_path)
    done = _script("figure_inner_steps.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"inner_steps.png", "inner_steps.pdf"}


def test_figures_that_lack_a_table_are_named_and_the_others_drawn(tmp_path):
    shutil.copy(RESULTS / "inner_steps.csv", tmp_path)
    done = _script("figures.py", tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(list((ROOT / "scripts").glob("figure_*.py"))) - 2  # one is drawn from a formula
    assert all(line.startswith("error: ") and "makes it" in line for line in lines)
    assert (tmp_path / "figures" / "inner_steps.png").exists()


def test_a_figure_is_drawn_once_a_format(tmp_path, monkeypatch):
    """Layout and drawing are most of what drawing costs, and matplotlib's own way does them several times."""
    from matplotlib.axes import Axes

    drawn, draw = [], Axes.draw
    monkeypatch.setattr(Axes, "draw", lambda self, renderer: (drawn.append(1), draw(self, renderer)))
    import figure_inner_steps

    shutil.copy(RESULTS / "inner_steps.csv", tmp_path)
    figure_inner_steps.draw(tmp_path)
    assert len(drawn) == 2


def test_labels_beside_lines_keep_apart_and_in_order(tmp_path):
    heights = [0.0, 0.01, 0.02, 0.5, 0.99, 1.0]
    figure, (ax,) = new_figure()
    for height in heights:
        ax.plot([0, 1], [0, height], label=f"line to {height}")
    ax.plot([0, 1], [0.3, 0.3])  # no label, no text
    drawing.label_ends(figure, ax)
    drawing.save(figure, tmp_path, "labels")
    assert [text.get_text() for text in ax.texts] == [f"line to {height}" for height in heights]
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert all(low.y1 <= high.y0 + 2 for low, high in pairwise(boxes))  # descenders, in pixels
    assert all(figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 for box in boxes)
    middle = (boxes[3].y0 + boxes[3].y1) / 2
    assert middle == pytest.approx(ax.transData.transform((1, 0.5))[1], abs=2)  # where there is room, at its line


def test_the_optimal_nu_is_fitted_to_all_points():
    nu = [10.0 ** (place / 2) for place in range(-10, 0)]
    a, b = figure_nu.fitted(nu, [3e-7 / x + 0.2 * x**2 for x in nu], 2)
    assert (a, b) == (pytest.approx(3e-7, rel=1e-5), pytest.approx(0.2, rel=1e-5))


def test_runs_that_stopped_are_crosses_at_chance():
    _, (ax,) = new_figure()
    run = {"status": "completed", "test/accuracy": 0.9}
    figure_memory_accuracy.draw_accuracies(ax, "maml", 3.0, [run, run | {"status": "failed"}, run])
    found = {line.get_marker(): line.get_xydata().tolist() for line in ax.lines}
    assert found == {"s": [[3.0, 90.0], [3.0, 90.0]], "x": [[3.0, tables.CHANCE]]}


def test_importing_a_script_reads_no_command_line():
    """So that all run in one process."""
    for path in (ROOT / "scripts").glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If):
                continue
            names = {node.attr for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
            assert "argv" not in names, path


NUMBER = re.compile(r"[-+−]?\d+\.?\d*(?:e[-+]?\d+)?")


def same_text(found: str, wanted: str) -> bool:
    """The same words, and numbers that differ by no more than one in the last place shown, as another processor's
    rounding may make them."""

    def numbers(text: str) -> list[tuple[float, float]]:
        return [
            (float(n.replace("−", "-")), 1.01 * 10.0 ** int(Decimal(n.replace("−", "-")).as_tuple().exponent))
            for n in NUMBER.findall(text)
        ]

    return NUMBER.split(found) == NUMBER.split(wanted) and all(
        abs(a - b) <= last for (a, last), (b, _) in zip(numbers(found), numbers(wanted), strict=True)
    )


def test_texts_are_compared_as_numbers():
    assert same_text("x 1.25 ± 0.30 (p = 1.2e-05)", "x 1.26 ± 0.30 (p = 1.3e-05)")
    for other in (
        "x 1.27 ± 0.30 (p = 1.2e-05)",
        "y 1.25 ± 0.30 (p = 1.2e-05)",
        "x 1.25 ± 0.30 (p = 1.2e-04)",
        "x 1.25 ± 0.30",
        "x 1.25 ± 0.30 (p = -1.2e-05)",
    ):
        assert not same_text("x 1.25 ± 0.30 (p = 1.2e-05)", other)


def test_the_page_that_sums_up_is_that_of_the_tables():
    assert same_text(summary.page(RESULTS), (RESULTS / "README.md").read_text())


def test_the_page_that_sums_up_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["summary.py", "--check", str(tmp_path)])
    summary.write(tmp_path)
    assert "Not measured: " in (tmp_path / "README.md").read_text()
    summary.main()
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "more\n")
    with pytest.raises(SystemExit, match=r"error: .* differs from the tables: make figures"):
        summary.main()


def test_the_tables_of_pages_are_of_a_folder(tmp_path):
    parts = [f"parts_{name}{part}" for name in tables.OPTIMIZERS for part in tables.PARTS]
    measured = ("accuracy", "race", "bench", "bench_gpu", "novel_classes", "novel_omniglot", "bench_conv4")
    where_measured = [name for name in (*tables.UNSEEN, *parts) if (RESULTS / f"{name}.csv").exists()]
    for table in (*measured, *where_measured):
        for suffix in ("csv", "json"):
            shutil.copy(RESULTS / f"{table}.{suffix}", tmp_path)
    shutil.copy(RESULTS / "accuracy_examples.csv", tmp_path)
    assert tables.pages(tmp_path) == tables.pages(RESULTS)
    rows = read_csv(tmp_path / "accuracy.csv")
    write_csv(tmp_path / "accuracy.csv", [row for row in rows if row["estimator"] != "reptile"])
    shown, without = (tables.pages(folder)[tables.FILES[0]].splitlines() for folder in (RESULTS, tmp_path))
    fewer = [line for line in shown if line not in without]
    assert [line.split(" |")[0] for line in fewer] == ["| Reptile"]


def test_of_two_outer_rates_the_one_with_the_higher_validation_accuracy_is_shown():
    """A run that stopped is at chance there, however good it was before."""

    def runs(rate: float, accuracies: list[float | None]) -> list[dict[str, object]]:
        setting = {"optimizer": "sngdm", "task_clip": None, "estimator": "maml", "estimator.lam": 0.0}
        ended = {None: "failed"}
        return [
            setting
            | {"optimizer.lr": rate, "seed": seed, "status": ended.get(value, "completed")}
            | {"val/accuracy": value, "test/accuracy": value}
            for seed, value in enumerate(accuracies)
        ]

    low, high = runs(0.1, [0.6, 0.62, 0.61]), runs(0.3, [0.9, None, 0.65])
    assert tables.at_the_better_rate([*low, *high]) == {("sngdm", None, "maml", 0.0): low}
    high = runs(0.3, [0.9, None, 0.9])
    assert tables.at_the_better_rate([*low, *high]) == {("sngdm", None, "maml", 0.0): high}


def test_of_unseen_classes_the_interval_is_over_what_was_chosen_anew():
    """Rotations of classes, where there are some; a run that stopped is at chance of as many ways."""
    rows = [
        {"seed": seed, "dataset.rotation": turn, "status": status, "test/accuracy": accuracy}
        for turn, status, accuracy in ((0, "completed", 0.7), (1, "completed", 0.8), (2, "failed", None))
        for seed in (20, 21)
    ]
    half = stats.t.ppf(0.975, 2) * statistics.stdev([70.0, 80.0, 50.0]) / math.sqrt(3)
    assert tables.over_choices(2, rows) == f"66.7 ± {half:.1f} % (2 of 6 stopped)"
    for row in rows:
        del row["dataset.rotation"]
    assert tables.over_choices(2, rows) == "66.7 ± 0.0 % (2 of 6 stopped)"
    assert tables.over_choices(2, rows[:1]) == "70.0 %, one seed"


def test_verdicts_follow_the_tables(tmp_path):
    """Where symmetric's memory grows with the inner steps, the claim falls."""

    def verdict(of_symmetric: float) -> str:
        memory = {"symmetric": of_symmetric, "maml": 9.0, "maml_checkpoint": 2.0}
        rows = [
            {"estimator": name, "width": 64, "solver.steps": steps, "memory/peak_bytes": size}
            for name, growth in memory.items()
            for steps, size in ((10, 1.0), (200, growth))
        ]
        for table in ("memory", "memory_steps"):
            write_csv(tmp_path / f"{table}.csv", rows)
        return next(line for line in summary.page(tmp_path).splitlines() if line.startswith("| Memory |"))

    assert verdict(1.01) == "| Memory | holds |"
    assert verdict(1.5) == "| Memory | holds in part |"
    assert "| Time | not measured |" in summary.page(tmp_path)


def test_the_jobs_of_a_sweep_are_those_of_its_file_and_command():
    assert len(jobs_of("bias_delta", [])) == 3 * 6 * 12 * 5
    jobs = jobs_of("verify", ["tuned=maml", "seed=0,3", "steps=5"])
    assert jobs == [
        frozenset({"seed=0", "tuned=maml", "steps=5", "experiment=verify"}),
        frozenset({"seed=3", "tuned=maml", "steps=5", "experiment=verify"}),
    ]


SMALL = """# @package _global_
defaults:
  - /sweep: by_experiment
  - override /optimizer: sgd
  - _self_
steps: 3
width: 4
meta_batch: 2
eval: {every: 3, validation_tasks: 4, tasks: 0}
bias: {every: 0}
wandb: {mode: disabled}
hydra: {sweeper: {params: {optimizer.lr: '%s'}}}
"""


@pytest.mark.slow
def test_reproducing_fails_where_jobs_are_missing(tmp_path, monkeypatch, capsys):
    """In a copy of the tree, with a sweep of two jobs in place of an experiment."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "results").mkdir()
    folder = tmp_path / "outputs" / "experiments" / "verify"
    monkeypatch.setattr("reproduce.ROOT", tmp_path)

    def define(rates: str) -> None:
        (tmp_path / "configs" / "experiment" / "verify.yaml").write_text(SMALL % rates)

    def again(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "verify", *arguments])
        reproduce.main()

    define("0.1,1e30")  # the second diverges, which is a result
    again()
    assert "verify: 2 of 2 jobs are there, 1 of them diverged" in capsys.readouterr().out
    assert len(read_csv(tmp_path / "results" / "verify.csv")) == 2
    define("0.1,-1")  # the second is not possible
    for arguments in ((), ("--collect",)):
        with pytest.raises(SystemExit, match=r"^error: verify: 1 of 2 jobs are there$"):
            again(*arguments)

    def found(rates: str, status: int = 0) -> list[str]:
        define(rates)
        return faults("verify", jobs_of("verify", []), folder, status)

    assert found("0.1,0.2,0.3") == ["verify: 1 of 3 jobs are there"]
    assert found("0.1") == []  # what is left of other sweeps does not count
    assert found("0.1", status=1) == [f"verify: its sweep ended with status 1: {folder / 'sweep.log'}"]
    assert found("0.1,1e30", status=1) == []  # which is the diverged one's
    (path,) = (path for path in folder.glob("*/summary.json") if "0.1" in path.parent.name)
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "status": "failed", "reason": "the disk is full"}))
    assert found("0.1") == ["verify: 0 of 1 jobs are there", f"verify: {path.parent.name}: the disk is full"]
    path.write_text(json.dumps({**summary, "status": "interrupted", "reason": "stopped"}))
    assert found("0.1") == ["verify: 0 of 1 jobs are there"]


def test_bad_requests_are_one_line(monkeypatch):
    for arguments, line in ((["nonsense"], "error: nonsense: takes "), (["--jobs", "0"], "error: --jobs=0: takes")):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
        with pytest.raises(SystemExit, match=f"^{line}"):
            reproduce.main()


def test_every_table_has_its_provenance():
    derived = {"bias_slopes", "quadratic"}  # of tables, and of a formula
    for path in RESULTS.glob("*.csv"):
        name = re.sub("_(curves|chunks|examples)$|(?<=race)_tuning$", "", path.stem)
        if name in derived:
            continue
        about = json.loads((RESULTS / f"{name}.json").read_text())
        made_with = about["provenance"]
        for one in made_with if isinstance(made_with, list) else [made_with]:
            assert one["commit"]
            assert one["versions"]["torch"]
        assert about["command"].startswith(("make ", "python "))


def test_numbers_are_read_as_numbers(tmp_path):
    (tmp_path / "memory.csv").write_text("run,estimator,memory/peak_bytes,reason\na,maml,1e3,\nb,nan-free,12,stopped\n")
    first, second = load(tmp_path, "memory")
    assert first == {"run": "a", "estimator": "maml", "memory/peak_bytes": 1000.0, "reason": None}
    assert isinstance(second["memory/peak_bytes"], float)
    assert second["reason"] == "stopped"
