"""What comes after training on the command line: starting from a run, evaluating it, listing runs."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import fobmaml
from fobmaml.saved.checkpoints import save_checkpoint
from fobmaml.saved.results import read_run, table

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
    other = ("estimator=fomaml", "optimizer=adam", "seed=5", "solver.steps=3", "init=first")
    _ran(run_train(*QUICK, *other, "steps=0", "hydra.run.dir=second"))
    second = _state(tmp_path / "second")
    assert second["step"] == 0
    assert all(torch.equal(values, first["model"][name]) for name, values in second["model"].items())
    _ran(run_train(*QUICK, *other, "hydra.run.dir=third"))
    third = _state(tmp_path / "third")
    assert third["step"] == 3
    assert not any(torch.equal(values, first["model"][name]) for name, values in third["model"].items())
    (tmp_path / "first" / "checkpoint.pt").rename(tmp_path / "first.pt")
    assert "is complete" in _ran(run_train(*QUICK, *other, "hydra.run.dir=third"))  # it has no more need of it
    _ran(run_train(*QUICK, "steps=0", "init=first.pt", "hydra.run.dir=fourth"))  # a file will do
    assert torch.equal(_state(tmp_path / "fourth")["model"]["biases.0"], first["model"]["biases.0"])


def test_a_run_of_another_network_is_refused_by_name(run_train, tmp_path):
    _ran(run_train(*QUICK, "hydra.run.dir=first"))
    for settings, wrong in (
        (("dataset.ways=3",), "weights.3 is [3, 5, 4] (there [5, 5, 4]), biases.3 is [3] (there [5])"),
        (
            ("width=5",),
            "weights.0 is [5, 5, 1] (there [4, 5, 1]), weights.1 is [5, 3, 5] (there [4, 3, 4]), weights.2 is",
        ),
        (("model=linear",), "is not there (there"),
    ):
        done = run_train(*QUICK, *settings, "init=first", "hydra.run.dir=second")
        assert done.returncode == 1
        assert done.stderr.startswith("error: init=first: takes a run of the same network, and here "), done.stderr
        assert wrong in done.stderr
        assert len(done.stderr.splitlines()) == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "checkpoint.pt").write_text("hello")
    assert re.match(
        "error: init=bad: bad/checkpoint.pt: takes a whole checkpoint",
        run_train(*QUICK, "init=bad", "hydra.run.dir=second").stderr,
    )
    assert not (tmp_path / "second").exists()


def test_learned_step_lengths_come_along(run_train, tmp_path):
    learned = ("estimator=maml", "estimator.learn_lr=1", "steps=2")
    _ran(run_train(*QUICK, *learned, "hydra.run.dir=first"))
    rates = _state(tmp_path / "first")["variables"]["solver.lr"]
    assert len(rates.unique()) > 1
    _ran(run_train(*QUICK, *learned, "init=first", "steps=0", "hydra.run.dir=second"))
    assert torch.equal(_state(tmp_path / "second")["variables"]["solver.lr"], rates)
    done = run_train(*QUICK, *learned, "init=first", "solver.steps=4", "hydra.run.dir=third")
    assert "solver.lr is [4, 8] (there [10, 8])" in done.stderr


def test_evaluate_measures_a_run_again(run_train, tmp_path):
    _ran(run_train(*QUICK, "estimator=symmetric", "solver.steps=4", "hydra.run.dir=run"))
    (tmp_path / "run").rename(tmp_path / "it's, a=run")
    trained = _summary(tmp_path / "it's, a=run")
    _ran(run_train("evaluate", "it's, a=run", "hydra.run.dir=same"))
    same = _summary(tmp_path / "same")
    assert same["step"] == 0
    assert same["test/loss"] == trained["test/loss"]
    assert same["test/accuracy"] == trained["test/accuracy"]
    assert same["config"]["solver"] == trained["config"]["solver"]
    _ran(run_train("evaluate", "it's, a=run", "solver.steps=2", "dataset.shots=1", "hydra.run.dir=other"))
    other = _summary(tmp_path / "other")
    assert other["config"]["solver"]["steps"] == 2
    assert other["choices"]["estimator"] == "symmetric"
    assert other["test/loss"] != trained["test/loss"]
    for wrong in ((), ("--help",), ("nowhere",), (".",)):
        done = run_train("evaluate", *wrong)
        assert done.returncode == 1
        assert re.match(r"error: .* evaluate FOLDER \[settings\]: takes the folder of a run.*\n$", done.stderr)


def test_a_sweep_ends_with_its_results_and_runs_lists_them(run_train, tmp_path):
    sweep = ("-m", *QUICK, "estimator=symmetric,fomaml", "optimizer.lr=-1,0.1", "hydra.sweep.dir=sweep")
    done = run_train(*sweep)
    assert done.returncode == 1
    *_, header, first, second, third, fourth = done.stdout.strip().splitlines()
    assert header.split() == ["estimator", "optimizer.lr", "status", "step", "accuracy", "bias", "seconds"]
    assert [line.split()[:3] for line in (first, second, third, fourth)] == [
        ["symmetric", "-1", "failed"],
        ["symmetric", "0.1", "completed"],
        ["fomaml", "-1", "failed"],
        ["fomaml", "0.1", "completed"],
    ]
    accuracies = [f"{100 * _summary(path.parent)['test/accuracy']:.1f} ±" for path in tmp_path.rglob("summary.json")]
    assert all(text in done.stdout for text in accuracies)
    assert run_train(*sweep).stdout.strip().splitlines()[-1] == fourth  # of what was complete, too

    listed = _ran(run_train("runs", "sweep")).splitlines()
    assert [line.split()[0] for line in listed] == ["estimator", "fomaml", "symmetric"]  # the others left no results
    assert listed[0].split() == ["estimator", "status", "step", "accuracy", "bias", "seconds", "folder"]
    rows = list(csv.DictReader(io.StringIO(_ran(run_train("runs", "sweep", "--csv")))))
    found = fobmaml.read_runs(tmp_path / "sweep")
    assert [row["estimator"] for row in found] == ["fomaml", "symmetric"] == [row["estimator"] for row in rows]
    for row, text in zip(found, rows, strict=True):
        summary = _summary(tmp_path / "sweep" / row["folder"])
        assert row["test/accuracy"] == summary["test/accuracy"] == float(text["test/accuracy"])
        assert row["estimator.lam"] == summary["config"]["estimator"]["lam"] == float(text["estimator.lam"])
        assert row["seconds"] == summary["seconds"]
        assert json.loads(text["overrides"]) == row["overrides"]
        assert row["bias/relative_error"] is None
        assert text["bias/relative_error"] == ""
    for wrong, text in (("sweep/none", "takes a folder"), (".hydra", "takes a folder")):
        assert run_train("runs", wrong).stderr.startswith(f"error: folder={wrong}: {text}")
    (tmp_path / "empty").mkdir()
    assert "and there are none" in run_train("runs", "empty").stderr


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
    rows[0] |= {"test/accuracy": None, "seconds": 1.25}
    assert "loss" in table(rows)
    assert "1.2 " in table(rows)
