"""What comes after training on the command line: starting from a run, evaluating it, listing runs."""

import csv
import io
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fobmaml
from fobmaml import Learner
from fobmaml.estimators import MAML
from fobmaml.outer import Outer
from fobmaml.run import commands
from fobmaml.saved.checkpoints import save_checkpoint
from fobmaml.saved.results import read_run, table
from fobmaml.solvers import GradientDescent

QUICK = ("width=4", "steps=3", "eval.tasks=20", "eval.validation_tasks=0", "bias.every=0", "wandb.mode=disabled")


def _summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def _state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def _ran(done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_starts_from_anothers_parameters(run_train, tmp_path):
    _ran(run_train(*QUICK, "estimator=symmetric", "hydra.run.dir=first"))
    first = _state(tmp_path / "first")
    other = (*QUICK, "estimator=fomaml", "optimizer=adam", "seed=5", "init=first", "steps=1", "hydra.run.dir=second")
    _ran(run_train(*other))
    second = _state(tmp_path / "second")
    assert second["step"] == 1
    for name, values in second["model"].items():  # Adam's first step is as long as its rate, 0.3
        moved = (values - first["model"][name]).abs()
        assert 0.0 < moved.max() <= 0.3001, name
    (tmp_path / "first" / "checkpoint.pt").unlink()
    assert "is complete" in _ran(run_train(*other))  # it has no more need of it


def test_a_run_that_does_not_fit_is_refused_by_name(run_train, tmp_path):
    _ran(run_train(*QUICK, "steps=0", "eval.tasks=0", "hydra.run.dir=first"))
    done = run_train(*QUICK, "dataset.ways=3", "init=first/checkpoint.pt", "hydra.run.dir=second")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: init=first/checkpoint\.pt: takes a run of the same network, and here "
        r"\S+ is \[3, .*\] \(there \[5, .*\]\), \S+ is \[3\] \(there \[5\]\)\n",
        done.stderr,
    )
    (tmp_path / "first" / "checkpoint.pt").write_text("hello")
    done = run_train(*QUICK, "init=first", "hydra.run.dir=second")
    assert done.stderr.startswith("error: init=first: first/checkpoint.pt: takes a whole checkpoint")
    assert not (tmp_path / "second").exists()


def _outer(steps: int = 3, learn_lr: float = 0.5, width: int = 3, depth: int = 1) -> Outer:
    sizes = [2, *[width] * depth, 2]
    network = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
    return Outer(Learner(network, F.cross_entropy), MAML(GradientDescent(steps=steps), learn_lr=learn_lr))


def test_learned_step_lengths_come_along():
    first, second = _outer(), _outer()
    first.variables["solver.lr"].data.uniform_()
    second.begin_from(first.state_dict())
    assert torch.equal(second.vector(), first.vector())
    parameters = second.learner.theta()
    plain = _outer(learn_lr=0.0)
    plain.begin_from(first.state_dict())  # it has none of its own
    assert torch.equal(plain.vector(), parameters)
    before = _outer()
    rates = before.variables["solver.lr"].clone()
    before.begin_from(plain.state_dict())  # and here there are none to take
    assert torch.equal(before.learner.theta(), parameters)
    assert torch.equal(before.variables["solver.lr"], rates)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            {"width": 4},
            r"0\.weight is \[4, 2\] \(there \[3, 2\]\), 0\.bias is .*, 1\.weight is \[2, 4\] \(there \[2, 3\]\)",
        ),
        ({"depth": 2}, r"and here 1\.weight is .*, 1\.bias is .*, 2\.weight is \[2, 3\] \(there none\) and 2 more$"),
        ({"depth": 0}, r"0\.bias is \[2\] \(there \[3\]\), 1\.weight is none \(there \[2, 3\]\) and 2 more$"),
        ({"steps": 5}, r"network, and here solver\.lr is \[5, 4\] \(there \[3, 4\]\)$"),
    ],
)
def test_shapes_that_differ_are_named(other, text):
    outer = _outer(**other)
    before = outer.vector()
    with pytest.raises(ValueError, match=text):
        outer.begin_from(_outer().state_dict())
    assert torch.equal(outer.vector(), before)


def test_evaluate_measures_a_run_again(run_train, tmp_path):
    _ran(run_train(*QUICK, "estimator=symmetric", "solver.steps=4", "hydra.run.dir=run"))
    (tmp_path / "run").rename(tmp_path / "it's, a=run")
    trained = _summary(tmp_path / "it's, a=run")
    done = run_train("evaluate", "it's, a=run", "solver.steps=2,4", "-m", "hydra.sweep.dir=sweep")
    header, other, same = (line.split() for line in _ran(done).strip().splitlines()[-3:])
    assert header[:2] == ["solver.steps", "status"]
    assert [other[:3], same[:3]] == [["2", "completed", "0"], ["4", "completed", "0"]]
    other, same = (row for row in sorted(fobmaml.read_runs(tmp_path / "sweep"), key=lambda row: row["solver.steps"]))
    assert same["test/loss"] == trained["test/loss"] != other["test/loss"]
    assert same["test/accuracy"] == trained["test/accuracy"]
    for row in (other, same):
        assert (row["width"], row["estimator"], row["step"]) == (4, "symmetric", 0)


def test_what_evaluate_asks_for(tmp_path):
    for wrong in ([], ["--help"], [str(tmp_path)]):
        with pytest.raises(SystemExit, match=r"error: .* evaluate FOLDER \[settings\]: takes the folder of a run"):
            commands.evaluation(wrong)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[solver=gd, seed=3, +a=1, ~b, resume=x, steps=9, width=4]")
    sources = "[{path: pkg, provider: main}, {path: /mine, provider: command-line}]"
    hydra = f"hydra: {{runtime: {{config_sources: {sources}}}, job: {{config_name: mine}}}}"
    (tmp_path / ".hydra" / "hydra.yaml").write_text(hydra)
    places, kept = ["--config-dir=/mine", "--config-name=mine"], ["solver=gd", "seed=3", "+a=1", "~b", "width=4"]
    own = [f"init='{tmp_path}'", "steps=0"]
    assert commands.evaluation([str(tmp_path)]) == [*places, *kept, *own]
    given = ["width=8", "--config-dir", "/other", "-m", "~a", "b=1"]
    assert commands.evaluation([str(tmp_path), *given]) == [
        *("--config-name=mine", "--config-dir", "/other", "-m"),
        *("solver=gd", "seed=3", *own, "width=8", "~a", "b=1"),
    ]


def test_a_sweep_ends_with_its_results_and_runs_lists_them(run_train, tmp_path, capsys):
    done = run_train("-m", *QUICK, "estimator=symmetric,fomaml", "optimizer.lr=-1,0.1", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    header, *jobs = (line.split() for line in done.stdout.strip().splitlines()[-5:])
    assert header == ["estimator", "optimizer.lr", "status", "step", "accuracy", "bias", "seconds"]
    assert [job[:3] for job in jobs] == [
        ["symmetric", "-1", "failed"],
        ["symmetric", "0.1", "completed"],
        ["fomaml", "-1", "failed"],
        ["fomaml", "0.1", "completed"],
    ]
    found = fobmaml.read_runs(tmp_path / "sweep")
    assert [row["estimator"] for row in found] == ["fomaml", "symmetric"]  # the others left no results
    accuracies = [f"{100 * row['test/accuracy']:.1f}" for row in found]
    assert [job[4] for job in jobs if len(job) > 3] == accuracies[::-1]

    commands.runs([str(tmp_path / "sweep")])
    header, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["estimator", "status", "step", "accuracy", "bias", "seconds", "folder"]
    assert [(line[0], line[3]) for line in lines] == list(zip(("fomaml", "symmetric"), accuracies, strict=True))
    commands.runs([str(tmp_path / "sweep"), "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for row, text in zip(found, rows, strict=True):
        summary = _summary(tmp_path / "sweep" / row["folder"])
        assert row["test/accuracy"] == summary["test/accuracy"] == float(text["test/accuracy"])
        assert row["estimator.lam"] == summary["config"]["estimator"]["lam"] == float(text["estimator.lam"])
        assert row["seconds"] == summary["seconds"]
        assert json.loads(text["overrides"]) == row["overrides"]
        assert row["bias/relative_error"] is None
        assert text["bias/relative_error"] == ""
    (tmp_path / "empty").mkdir()
    for wrong, text in (("none", "takes a folder with"), ("empty", "and there are none")):
        with pytest.raises(SystemExit, match=f"error: folder=.*{wrong}: .*{text}"):
            commands.runs([str(tmp_path / wrong)])


def _saved(folder: Path, summary: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))


RUN = {"status": "completed", "step": 3, "test/accuracy": 0.5, "test/accuracy_ci95": None, "test/loss": 1.0}


def test_rows_are_of_all_runs_there_are(tmp_path, monkeypatch):
    config = {"width": 4, "solver": {"lr": 0.1}, "eval": {"solver": {}}, "inner": None}
    _saved(tmp_path / "b", {**RUN, "config": config, "choices": {"estimator": "maml"}, "overrides": ["width=4"]})
    _saved(tmp_path / "a" / "deep", {**RUN, "status": "failed", "reason": "it broke", "config": config})
    _saved(tmp_path / "c", {"status": "of another program"})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "summary.json").write_text("{")
    (tmp_path / "e").mkdir()
    state = {"step": 1, "latest": {"train/loss": 2.0}, "choices": {"estimator": "reptile"}, "overrides": []}
    save_checkpoint(tmp_path / "e" / "checkpoint.pt", state, config)
    rows = fobmaml.read_runs(tmp_path)
    assert [row["folder"] for row in rows] == ["a/deep", "b", "e"]
    assert [row["status"] for row in rows] == ["failed", "completed", "unfinished"]
    assert rows[0]["reason"] == "it broke"
    assert {row["solver.lr"] for row in rows} == {0.1}
    assert rows[2]["step"] == 1
    assert rows[2]["train/loss"] == 2.0
    assert read_run(tmp_path / "c", tmp_path) is None
    with pytest.raises(ValueError, match=r"folder=.*none: takes a folder"):
        fobmaml.read_runs(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pandas is not installed"):
        fobmaml.read_runs(tmp_path, frame=True)


def test_rows_as_a_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    _saved(tmp_path / "b", {**RUN, "config": {"width": 4}})
    frame = fobmaml.read_runs(tmp_path, frame=True)
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[0, "width"] == 4


def test_the_table_shows_what_commands_said():
    def row(folder: str, *overrides: str, **settings) -> dict:
        return {"folder": folder, "overrides": list(overrides), **RUN, "width": 4, **settings}

    rows = [
        row("a", "estimator=maml", "+tuned=maml", "~hydra.x", estimator="maml", **{"estimator.lam": 0.0}),
        row("b", "estimator=forward", "width=8", estimator="forward", width=8, **{"bias/relative_error": 0.12345}),
    ]
    header, first, second = (line.split() for line in table(rows).splitlines())
    assert header == ["estimator", "tuned", "width", "status", "step", "accuracy", "bias", "seconds", "folder"]
    assert first == ["maml", "maml", "4", "completed", "3", "50.0", "%", "a"]
    assert second == ["forward", "8", "completed", "3", "50.0", "%", "0.123", "b"]
    for each in rows:  # as before commands were kept
        each["overrides"] = None
    assert table(rows).split("\n")[0].split()[:3] == ["width", "estimator", "estimator.lam"]
    rows[0] |= {"test/accuracy": None, "seconds": 1.25, "test/r2": 0.75, "test/r2_ci95": 0.0312}
    header, first, second = (line.split() for line in table(rows).splitlines())
    assert header[-6:] == ["accuracy", "r2", "loss", "bias", "seconds", "folder"]
    assert first[-6:] == ["0.75", "±", "0.0312", "1", "1.2", "a"]
    assert second[-4:] == ["50.0", "%", "0.123", "b"]
