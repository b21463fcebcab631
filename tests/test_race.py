"""The race: what counts as reached, how trials are judged, and that it goes on where it was stopped."""

import pytest
from conftest import ROOT

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

import race  # noqa: E402
import tables  # noqa: E402
from figure_race import draw  # noqa: E402

from fobmaml.files import read_csv  # noqa: E402


def _curve(*accuracies):
    return [{"work": 100 * (k + 1), "accuracy": value} for k, value in enumerate(accuracies)]


def test_an_accuracy_is_reached_where_two_validations_say_so():
    assert race.reached(_curve(0.5, 0.96, 0.94, 0.95, 0.97), 0.95)["work"] == 400
    assert race.reached(_curve(0.5, 0.96, 0.94, 0.96), 0.95) is None  # the last has none behind it
    assert race.reached([], 0.9) is None


def test_less_work_is_better_and_any_that_arrives_is_better_than_none():
    values = [
        race.judged(race.outcome(curve))
        for curve in (
            _curve(0.95, 0.95),
            _curve(0.94, 0.95, 0.95),
            _curve(*[0.9] * 100_000, 0.95, 0.95),
            _curve(0.94),
            _curve(0.2),
            [],
        )
    ]
    assert values == sorted(values)
    assert len({*values}) == len(values)


def test_no_setting_of_a_trial_is_unknown_to_its_method():
    for name, method in race.METHODS.items():
        if not method.searched:
            continue
        trial = optuna.trial.FixedTrial(race.KNOWN | method.known)
        given = [*method.fixed.split(), *race.settings(method, trial)]
        training = race.built([*given, "width=4"], 1000, 0)
        assert training.settings.budget == 1000, name
        assert training.adapting.solver.batch is None, name


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(race, "BUDGETS", (1_000, 5_000))
    monkeypatch.setattr(race, "KNOWN", race.KNOWN | {"budget": 4_000, "meta_batch": 4})
    monkeypatch.setitem(race.METHODS, "reptile", race.Method("estimator=reptile", {"budget": 4_000}))
    monkeypatch.setattr(race, "VALIDATIONS", 3)
    monkeypatch.setattr(race, "TASKS", 4)
    monkeypatch.setattr(race, "NOTHING", 0.0)


def test_the_race_goes_on_where_it_was_stopped(short, tmp_path):
    first = race.Race(tmp_path / "race", 4)
    first.tune("reptile", 2)
    second = race.Race(tmp_path / "race", 4)
    second.tune("reptile", 3)
    second.tune("reptile", 3)
    found = second.trials("reptile")
    assert [row["trial"] for row in found] == [0, 1, 2]
    assert "solver.batch=null" in found[0]["settings"]
    assert "budget=4000" in found[0]["settings"]
    for seed in (1, 2):
        second.run("reptile", seed, 1)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "race").glob("*.json")}
    assert [*sorted(kept)] == ["reptile-4-1-1.json", "reptile-4-1-2.json"]
    second.run("reptile", 1, 1)
    assert kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "race").glob("*.json")}
    (tmp_path / "results").mkdir()
    race.collect(tmp_path / "race", tmp_path / "results", [second])
    rows = read_csv(tmp_path / "results" / "race_curves.csv")
    assert [*dict.fromkeys(row["seed"] for row in rows)] == ["1", "2"]
    assert not any(row["seconds"] for row in rows)
    second.time(["reptile"], rounds=1, steps=1)
    race.collect(tmp_path / "race", tmp_path / "results", [second])
    rows = read_csv(tmp_path / "results" / "race_curves.csv")
    a_step = {round(float(row["seconds"]) / int(row["step"]), 4) for row in rows}
    assert max(a_step) > 0
    assert max(a_step) - min(a_step) <= 2e-3  # of rounded seconds
    assert tables.race(tmp_path / "results").splitlines()[-1] == "| Reptile | – | – | – |"
    draw(tmp_path / "results")
    assert (tmp_path / "results" / "figures" / "race.png").exists()


def test_the_tables_numbers_are_of_the_least_budget_in_which_most_got_there():
    def row(times, work, seconds):
        return {"times": times, "work_to_97": work, "seconds_to_97": seconds}

    few = [row(1, None, None), row(1, 2e6, 1.0), row(1, None, None)]
    most = [row(3, 4e6, 5.0), row(3, None, None), row(3, 3e6, 9.0)]
    assert tables.reached([*most, *few], 97) == "4.0 M, 9.0 s"
    assert tables.reached(few, 97) == "–"
    assert tables.reached([*few, row(1, 5e6, 3.0), row(1, 1e6, 4.0)], 97) == "5.0 M, 4.0 s"
    assert tables.reached([row(1, 5e6, None)], 97) == "5.0 M"


def test_the_best_trial_is_the_best_on_the_slower_of_two_seeds(monkeypatch):
    """Of three that arrive on the first seed, the second is never run where it cannot be the best."""
    study = optuna.create_study()
    for work, value in ((200, 0.96), (100, 0.96), (400, 0.96), (300, 0.96), (50, 0.5)):
        curve = [{"work": work, "accuracy": value}, {"work": 2 * work, "accuracy": value}]
        study.add_trial(
            optuna.trial.create_trial(
                params={"budget": work},
                distributions={"budget": optuna.distributions.IntUniformDistribution(1, 10**9)},
                user_attrs={"overrides": [str(work)], "outcome": race.outcome(curve)},
                value=race.judged(race.outcome(curve)),
            )
        )
    seconds = {"100": 900, "200": 250, "300": 100}
    asked = []

    def tried(overrides, budget, seed, best):
        asked.append((overrides[0], seed))
        return [{"work": seconds[overrides[0]], "accuracy": 0.96}] * 2, False

    monkeypatch.setattr(race, "tried", tried)
    for _ in range(2):  # the second time all is there
        race.Race.confirm(study)
    assert asked == [("100", 100), ("200", 100)]
    assert min(study.trials, key=lambda trial: race.confirmed(study, trial)).number == 0


def test_studies_that_are_not_there_begin_with_the_trials_of_the_table(tmp_path, monkeypatch):
    """All that the repository has, and the table that comes of them is the same, also if it was stopped on the way."""
    table = ROOT / "results" / "race_tuning.csv"
    begun, make = race.Race(tmp_path, 32, table), race.restored
    left = iter(range(5))
    monkeypatch.setattr(race, "restored", lambda *of: [next(left), make(*of)][1])
    with pytest.raises(StopIteration):
        begun.study("symmetric")
    monkeypatch.undo()
    found = [row for name in race.METHODS for row in begun.trials(name)]
    shown = [{key: "" if value is None else str(value) for key, value in row.items()} for row in found]
    wanted = read_csv(table)
    for row in (*shown, *wanted):
        row.pop("trial")  # there are gaps where one was interrupted
    assert shown == wanted
    best = begun.best("symmetric")
    assert race.confirmed(begun.study("symmetric"), best) < float("inf")
    given = race.settings(race.METHODS["symmetric"], optuna.trial.FixedTrial(best.params))
    assert ["estimator=symmetric", "width=32", *given] == best.user_attrs["overrides"]


def test_a_study_begun_with_a_longer_table_says_so(tmp_path):
    lines = (ROOT / "results" / "race_tuning.csv").read_text().splitlines(keepends=True)
    table = tmp_path / "race_tuning.csv"
    table.write_text("".join(lines[:3]))  # the header, and two of symmetric_all's
    begun = race.Race(tmp_path, 32, table)
    assert len(begun.study("symmetric_all").trials) == 2
    begun.study("symmetric_all").set_user_attr("before", 3)  # as if it had been stopped before the third
    with pytest.raises(SystemExit, match="takes 3 trials of symmetric_all, with which"):
        begun.study("symmetric_all")


def test_make_race_is_a_target():
    assert "race: setup .venv/sweeps" in (ROOT / "Makefile").read_text()
