"""The comparison on Omniglot: step lengths by validation, then other seeds, and a table of both."""

import json

import omniglot
import pytest
from test_datasets import REAL

from fobmaml.files import read_csv, write_json


def _made(job: omniglot.Job, accuracy: float) -> None:
    row = job._asdict() | {"validation_accuracy": accuracy, "accuracy": accuracy}
    write_json(omniglot.path_of(job), {"row": row, "settings": omniglot.settings(job), "provenance": {}})


def test_step_lengths_are_those_that_validation_tasks_prefer(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(omniglot, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "results").mkdir()
    with pytest.raises(FileNotFoundError):
        omniglot.at_their_best(["fomaml"])
    for job in omniglot.tuning(["fomaml"]):
        _made(job, 0.9 if job[3:5] == (0.3, 0.1) else 0.5)
    best = omniglot.at_their_best(["fomaml"])
    assert {job[3:5] for job in best} == {(0.3, 0.1)}
    assert sorted({job[:2] for job in best}) == [(5, 1), (5, 5), (20, 1), (20, 5)]
    assert sorted({job[-1] for job in best}) == [0, 1, 2]
    with pytest.raises(SystemExit, match="error: 12 of 28 runs are missing"):
        omniglot.collect(["fomaml"])
    for job in best:
        _made(job, 0.95)
    omniglot.collect(["fomaml"])
    assert len(read_csv(tmp_path / "results" / "omniglot.csv")) == 28
    assert "methods" in json.loads((tmp_path / "results" / "omniglot.json").read_text())


@pytest.mark.parametrize("method", omniglot.METHODS)
def test_its_settings_are_those_of_a_run(method):
    """Composed and checked, without its data."""
    for shots in omniglot.SHOTS:
        given = omniglot.settings(omniglot.Job(5, shots, method, 0.1, 0.3, 0))
        with pytest.raises(ValueError, match=r"^dataset.root=None"):
            omniglot.built(given, "steps=1 device=cpu")


@pytest.mark.skipif(not REAL.exists(), reason="Omniglot's characters are not here: shared/data/omniglot28.npz")
def test_runs_that_are_tuned_and_those_that_are_tested_are_rows_of_one_table(tmp_path, monkeypatch):
    for name, value in {
        "RUNS": tmp_path / "runs",
        "ROOT": tmp_path,
        "STEPS": 1,
        "TUNING": 1,
        "WAYS": (5,),
        "SHOTS": (1,),
        "INNER": (0.1,),
        "OUTER": (0.1,),
        "SEEDS": 1,
        "TEST_STEPS": (1,),
        "VALIDATION": 2,
        "TEST": 2,
    }.items():
        monkeypatch.setattr(omniglot, name, value)
    (tmp_path / "runs").mkdir()
    (tmp_path / "results").mkdir()
    for jobs in (omniglot.tuning, omniglot.at_their_best):
        for job in jobs(["fomaml"]):
            omniglot.run(job, str(REAL), "cpu")
    omniglot.collect(["fomaml"])
    tuned, tested = read_csv(tmp_path / "results" / "omniglot.csv")
    assert (tuned["seed"], tuned["accuracy"]) == ("100", "")
    assert tested["seed"] == "0"
    assert 0 <= float(tested["accuracy"]) <= 1
    assert float(tuned["validation_accuracy"]) >= 0
