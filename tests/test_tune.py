"""Tuning: what is tried, which trial is chosen, and that nothing is run twice."""

import math

import pytest
import tune
import yaml
from hydra import compose, initialize_config_dir

from fobmaml.files import read_csv
from fobmaml.run.build import build

FIVE, ONE, BUDGET = (tune.EXPERIMENTS[f"accuracy{each}"] for each in ("", "_1shot", "_budget"))
POINTS = tune.points(4, FIVE)


@pytest.mark.parametrize("name", tune.METHODS)
def test_no_setting_of_a_trial_is_unknown_to_its_method(name):
    given = tune.overrides(tune.METHODS[name], POINTS[1], ONE)
    with initialize_config_dir(str(tune.ROOT / "configs"), version_base="1.3"):
        training = build(compose("train", ["experiment=accuracy_1shot", *tune.said(given), "width=4", "measure=[]"]))
    assert training.adapting.solver.batch is None
    assert training.settings.steps == 1000


def test_all_methods_have_the_same_points():
    one, other = (tune.overrides(tune.METHODS[name], POINTS[0], FIVE) for name in ("symmetric", "maml_plus"))
    common = {
        "optimizer",
        "optimizer.lr",
        "solver.steps",
        "solver.lr",
        "solver.batch",
        "eval.solver.steps",
        "task_clip",
    }
    assert {key: one[key] for key in common} == {key: other[key] for key in common}
    assert tune.points(24, FIVE)[:4] == POINTS


def test_the_tasks_of_a_step_are_searched_where_work_is_what_ends_a_run():
    one, other = (tune.overrides(tune.METHODS["maml"], tune.points(4, each)[2], each) for each in (FIVE, BUDGET))
    assert other.keys() - one.keys() == {"meta_batch"}


def test_a_batch_of_all_examples_is_none():
    for name, experiment, expected in (("symmetric", ONE, None), ("symmetric", FIVE, 10), ("reptile", ONE, 10)):
        given = tune.overrides(tune.METHODS[name], tune.KNOWN | {"solver.batch": 10}, experiment)
        assert given["solver.batch"] == expected


def test_edges():
    inside = tune.KNOWN | {"solver.lr": 0.15}
    assert list(tune.beyond_edges(tune.METHODS["symmetric"], inside)) == []
    outside = inside | {"solver.lr": 0.031, "sngdm.lr": 2.0, "adam.lr": 0.03}  # the last is not this trial's
    assert list(tune.beyond_edges(tune.METHODS["symmetric"], outside)) == [("sngdm.lr", 4.0), ("solver.lr", 0.015)]


def test_a_file_holds_its_settings():
    given = tune.overrides(tune.METHODS["imaml"], tune.KNOWN | {"authors": True}, FIVE)
    found = yaml.safe_load(tune.file_of(given, "accuracy"))
    assert found.pop("defaults") == [
        {"override /estimator": "imaml"},
        {"override /solver": "gd"},
        {"override /optimizer": "sngdm"},
    ]
    assert found["eval"] == {"solver": {"steps": 10, "lr": 0.1, "batch": None}, "lam": 0.0}
    assert found["estimator"]["pull_back"] is True
    assert found["task_clip"] == 1.0


@pytest.fixture
def runs(monkeypatch):
    """Runs whose accuracy is greatest at an inner step of 2, which is beyond the range, and worse with the second seed
    where the batch is null."""
    made = []

    def accuracy(given, experiment, seed, least, shorter):
        made.append((given["solver.lr"], seed))
        value = (
            1.0 - 0.1 * abs(math.log(given["solver.lr"] / 2.0)) - 0.2 * (seed == 101 and given["solver.batch"] is None)
        )
        return {"accuracy": value, "third": value, "diverged": False, "steps": 1000, "work": 1}

    monkeypatch.setattr(tune, "accuracy", accuracy)
    return made


def test_the_best_by_both_seeds_is_taken_beyond_the_edge_and_not_run_twice(runs, tmp_path):
    tuning = tune.Tuning(tmp_path, "accuracy")
    number, point = tuning.tune("symmetric")
    assert "solver.lr=" in number
    assert point["solver.batch"] is not None
    assert 1.0 < point["solver.lr"] < 4.0
    assert len(runs) == len(list(tmp_path.glob("symmetric/*.json"))) > tune.TRIALS + 1 + tune.AGAIN
    count = len(runs)
    assert tune.Tuning(tmp_path, "accuracy", only_read=True).tune("symmetric") == (number, point)
    assert len(runs) == count
    with pytest.raises(FileNotFoundError):
        tune.Tuning(tmp_path, "accuracy", only_read=True).tune("maml")
    assert len(runs) == count


def test_the_table_is_of_all_trials_and_the_files_of_methods_that_are_tuned(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "provenance", lambda device: {"commit": "0"})
    tunings = {name: tune.Tuning(tmp_path / name, name, trials=2) for name in ("accuracy", "accuracy_budget")}
    with pytest.raises(SystemExit, match="there is no trial yet"):
        tune.collect(tunings, tmp_path / "tuned", tmp_path)
    for tuning in tunings.values():
        tuning.tune("reptile")
    tunings["accuracy"].run("maml", "0", tune.KNOWN, tune.SEEDS[0])  # and no other
    tune.collect(tunings, tmp_path / "tuned", tmp_path)
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {"reptile.yaml", "reptile_budget.yaml"}
    rows = read_csv(tmp_path / "tuning.csv")
    assert {(row["experiment"], row["estimator"]) for row in rows if row["chosen"] == "true"} == {
        ("accuracy", "reptile"),
        ("accuracy_budget", "reptile"),
    }
    assert len(rows) == len(runs)


def test_trials_in_the_table_are_not_run_again_and_have_to_be_of_the_same_settings(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "provenance", lambda device: {"commit": "0"})
    there = tune.Tuning(tmp_path / "there", "accuracy", trials=2)
    chosen = there.tune("reptile")
    tune.collect({"accuracy": there}, tmp_path / "tuned", tmp_path)
    text, about, count = (tmp_path / "tuning.csv").read_text(), (tmp_path / "tuning.json").read_text(), len(runs)
    here = tune.Tuning(tmp_path / "here", "accuracy", 2, recorded=tune.rows_of(tmp_path / "tuning.csv"))
    assert here.tune("reptile") == chosen
    tune.collect({"accuracy": here}, tmp_path / "tuned", tmp_path)
    assert ((tmp_path / "tuning.csv").read_text(), (tmp_path / "tuning.json").read_text()) == (text, about)
    assert len(runs) == count
    with pytest.raises(ValueError, match=r"tuning.csv: accuracy, reptile, 0, 100: estimator=reptile .* takes "):
        here.run("reptile", "0", tune.KNOWN, tune.SEEDS[0])
