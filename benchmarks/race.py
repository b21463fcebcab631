"""Which method reaches 90, 95 and 97 % validation accuracy first, by example-gradients and by seconds (make race).

    python benchmarks/race.py tune --trials 24    # a study for each method: the least work to 95 %
    python benchmarks/race.py run --seeds 3       # the methods at their best
    python benchmarks/race.py time                # a meta-step of each, in turns, on an otherwise idle machine

5-way 5-shot 15-query MNIST-1D. The rule, written before the runs:

- An accuracy is reached where two validations one after the other are at or above it, at the first of the two; there
  are VALIDATIONS of them along a run, on the same TASKS tasks for all methods.
- A study tries as many settings for every method. The first are the best that was known before; then, by turns, two
  near the best so far and one by Optuna's sampler. All search the same settings, but for those that a method does not
  have. A trial is judged by its work until 95 %, in example-gradients (a Hessian product is 8/3 of one), whatever else
  the machine does meanwhile. It is cut short where it cannot win: after HOPELESS times the work of the best, or if a
  quarter of its budget has taught it nothing.
- The best trial is the best on the slower of two seeds, so that a lucky arrival does not win: after the trials, those
  that may be it are run with a second seed, the best first, at most CONFIRMED of them.
- In the race the best trial of each method is run with other seeds, with its budget, and with multiples of it for what
  it does not reach in that. Seconds are meta-steps times the median time of one, without validation, with as many
  threads as the method is fastest with: timed apart, all methods in turns, so that the runs may share a machine.

``symmetric_all`` is the yardstick: symmetric on all examples at every step, without a search but for its budget.
The first two go on where they were stopped; a study that is not in --folder begins with the trials of race_tuning.csv.
Into results/: race_tuning.csv (the trials), race_curves.csv (accuracy along each run) and race.csv (what each run took
to each accuracy).
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import optuna
import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from fobmaml.files import read_csv, write_csv, write_json
from fobmaml.measure.accuracy import score
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.build import build
from fobmaml.run.provenance import distinct, provenance
from fobmaml.training import Diverged, MetaTraining

ROOT = Path(__file__).parents[1]
GOALS = (0.90, 0.95, 0.97)
JUDGED = 0.95
VALIDATIONS, TASKS = 30, 200
HOPELESS, NOTHING = 1.3, 0.3
CONFIRMED, SECOND_SEED = 6, 100
BUDGETS = (500_000, 16_000_000)
"""Example-gradients of a trial, least and most."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """``fixed``: what makes it this method. ``known``: the first trial, in what it differs from KNOWN. ``has``: those
    of a proximal term, query batches, ν and an envelope that it has settings for."""

    fixed: str
    known: Row = field(default_factory=dict)
    has: frozenset[str] = frozenset()
    searched: bool = True


KNOWN: Row = {
    "optimizer": "sngdm",
    "sngdm.lr": 0.3,
    "meta_batch": 16,
    "solver.steps": 10,
    "solver.lr": 0.1,
    "solver.batch": "null",
    "task_clip": "1.0",
    "adaptation.lr": 1,
    "eval.solver.steps": 10,
    "budget": 8_000_000,
}
BATCHES = {"solver.batch": 10, "solver.query_batch": 5, "estimator.lam": 0.5}
ADAM = {"optimizer": "adam", "adam.lr": 0.01}
TEXTS = ("optimizer", "task_clip")
METHODS = {
    "symmetric_all": Method("estimator=symmetric", searched=False),
    "symmetric": Method(
        "estimator=symmetric",
        BATCHES | {"estimator.nu": 0.05, "budget": 9_600_000},
        frozenset({"lam", "query_batch", "nu"}),
    ),
    "forward": Method("estimator=forward", BATCHES | {"estimator.nu": 0.02}, frozenset({"lam", "query_batch", "nu"})),
    "forward_envelope": Method(
        "estimator=forward",
        {
            "estimator.envelope": 1.0,
            "estimator.nu": 0.5,
            "estimator.lam": 0.2,
            "solver.steps": 7,
            "solver.lr": 0.2,
            "solver.batch": 5,
            "solver.query_batch": 5,
            "adaptation.lr": 2,
            "budget": 4_000_000,
        },
        frozenset({"lam", "query_batch", "nu", "envelope"}),
    ),
    "tangent": Method("estimator=tangent", BATCHES, frozenset({"lam", "query_batch"})),
    "maml": Method("estimator=maml", {"meta_batch": 8}),
    "fomaml": Method("estimator=fomaml", ADAM | {"solver.lr": 0.03}),
    "reptile": Method("estimator=reptile", {"solver.lr": 0.3, "solver.batch": 10, "budget": 2_000_000}),
    "imaml": Method(
        "estimator=imaml estimator.damping=1 estimator.lam_damping=10 estimator.pull_back=true eval.lam=0",
        ADAM | {"adam.lr": 0.003, "estimator.lam": 2.0, "solver.steps": 12},
        frozenset({"lam"}),
    ),
}


def settings(method: Method, trial: optuna.Trial) -> list[str]:
    """Of a trial, for the command line."""
    if not method.searched:
        return ["optimizer.lr=0.3", "solver.lr=0.1", f"budget={trial.suggest_int('budget', 16_000_000, 96_000_000)}"]
    optimizer = trial.suggest_categorical("optimizer", ["sngdm", "adam"])
    least, most = {"sngdm": (0.03, 1.0), "adam": (5e-4, 0.03)}[optimizer]
    found: Row = {
        "optimizer": optimizer,
        "optimizer.lr": trial.suggest_float(f"{optimizer}.lr", least, most, log=True),
        "meta_batch": trial.suggest_categorical("meta_batch", [4, 8, 16]),
        "solver.steps": trial.suggest_int("solver.steps", 3, 12),
        "solver.lr": trial.suggest_float("solver.lr", 0.03, 0.6, log=True),
        "solver.batch": trial.suggest_categorical("solver.batch", ["null", 5, 10, 20]),
        "task_clip": trial.suggest_categorical("task_clip", ["null", "1.0"]),
        "budget": trial.suggest_int("budget", *BUDGETS, log=True),
        "eval.solver.steps": trial.suggest_categorical("eval.solver.steps", [10, 20]),
        "eval.solver.batch": "null",
    }
    found["eval.solver.lr"] = found["solver.lr"] * trial.suggest_categorical("adaptation.lr", [0.5, 1, 2])
    if "query_batch" in method.has:
        found["solver.query_batch"] = trial.suggest_categorical("solver.query_batch", ["null", 5, 10, 25])
        found["eval.solver.query_batch"] = "null"
    if "lam" in method.has:
        found["estimator.lam"] = trial.suggest_float("estimator.lam", 0.05, 4.0, log=True)
    if "nu" in method.has:
        found["estimator.nu"] = trial.suggest_float("estimator.nu", 1e-3, 1.0, log=True)
    if "envelope" in method.has:
        found["estimator.envelope"] = trial.suggest_float("estimator.envelope", 0.1, 4.0, log=True)
    return [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in found.items()]


def built(overrides: list[str], budget: int, seed: int) -> MetaTraining:
    given = [*overrides, f"budget={budget}", f"seed={seed}", "steps=null", "device=cpu", "measure=[]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return build(compose("train", given))


def course(overrides: list[str], budget: int, seed: int) -> Iterator[Row]:
    """A run's validation accuracies, with the work and the seconds of training until then."""
    training = built(overrides, budget, seed)
    tasks, done = training.fixed("validation", TASKS), 0
    for _ in training.train():
        if (due := int(training.fraction * VALIDATIONS)) > done:
            done = due
            yield {
                "step": training.step,
                "work": round(training.work.total),
                "accuracy": score(training, tasks).accuracy,
            }


def reached(curve: list[Row], goal: float) -> Row | None:
    """The first of two points, one after the other, at which the accuracy is ``goal`` or more."""
    return next(
        (one for one, after in pairwise(curve) if min(one["accuracy"], after["accuracy"]) >= goal),
        None,
    )


def highest(curve: list[Row]) -> float:
    return max((point["accuracy"] for point in curve), default=0.0)


def outcome(curve: list[Row]) -> Row:
    """Of a trial's run."""
    return {
        "work_to_95": (reached(curve, JUDGED) or {}).get("work"),
        "best_accuracy": highest(curve),
        "work": max((point["work"] for point in curve), default=0),
    }


def judged(of: Row) -> float:
    """Of an ``outcome``, the logarithm of the work until ``JUDGED``; where it was not reached, above those, by what was
    missing."""
    if work := of["work_to_95"]:
        return math.log(work)
    return 20.0 + 10.0 * max(JUDGED - of["best_accuracy"], 0.0)


def restored(name: str, row: dict[str, str]) -> optuna.trial.FrozenTrial:
    """A trial that race_tuning.csv has a row of."""
    method, overrides = METHODS[name], row["settings"].split()
    given = dict(pair.split("=", 1) for pair in overrides)
    if method.searched:
        given[f"{given['optimizer']}.lr"] = given["optimizer.lr"]
        ratio = float(given["eval.solver.lr"]) / float(given["solver.lr"])
        given["adaptation.lr"] = str(min((0.5, 1, 2), key=lambda one: abs(one - ratio)))
    params = {key: text if key in TEXTS else _number(text) for key, text in given.items()}
    trial = optuna.trial.FixedTrial(params)
    settings(method, trial)  # says which of them the study searches, and where
    return optuna.trial.create_trial(
        params={key: params[key] for key in trial.distributions},
        distributions=trial.distributions,
        value=judged(found := _outcome_in(row)),
        user_attrs={
            "overrides": overrides,
            "outcome": found | {"work": int(row["work"])},
            "diverged": row["diverged"] == "true",
        },
    )


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _outcome_in(row: dict[str, str], which: str = "") -> Row:
    """Of a table's row what a trial is judged by, of the first seed or the ``second_``."""
    work = row[f"{which}work_to_95"]
    return {"work_to_95": int(work) if work else None, "best_accuracy": float(row[f"{which}best_accuracy"])}


def tried(overrides: list[str], budget: int, seed: int, best: float) -> tuple[list[Row], bool]:
    """A run until JUDGED, or until it cannot be better than ``best`` any more; and whether it diverged."""
    curve = list[Row]()
    try:
        for point in course(overrides, budget, seed):
            curve.append(point)
            hopeless = point["work"] > HOPELESS * math.exp(min(best, 20.0))
            nothing = 4 * point["work"] > budget and point["accuracy"] < NOTHING
            if reached(curve, JUDGED) or hopeless or nothing:
                break
    except Diverged:
        return curve, True
    return curve, False


def second(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> Row | None:
    """The outcome of a trial's second seed, if it was run."""
    return study.user_attrs.get(f"second {trial.number}")


def confirmed(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> float:
    """How a trial is judged by the slower of its two seeds; infinite without a second."""
    found = second(study, trial)
    return math.inf if found is None else max(cast(float, trial.value), judged(found))


def near(best: optuna.trial.FrozenTrial, number: int) -> Row:
    """The settings of ``best``, each changed with a probability of 1/3: a number by a factor of about 1.5."""
    draw, found = random.Random(number), dict(best.params)
    for name, range_ in best.distributions.items():
        if draw.random() > 1 / 3:
            continue
        if isinstance(range_, optuna.distributions.CategoricalDistribution):
            found[name] = draw.choice(range_.choices)
        else:
            value = min(max(found[name] * math.exp(draw.gauss(0, 0.4)), range_.low), range_.high)
            found[name] = round(value) if isinstance(found[name], int) else value
    return found


@dataclass(frozen=True)
class Race:
    """The studies and runs at one ``width``, in ``folder``. ``tried_before``: the table with trials of studies that are
    not there."""

    folder: Path
    width: int
    tried_before: Path | None = None

    @cached_property
    def storage(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{self.folder / 'studies.db'}"

    def study(self, name: str) -> optuna.Study:
        sampler = optuna.samplers.TPESampler(seed=self.width, multivariate=True, group=True, n_startup_trials=6)
        study = optuna.create_study(
            storage=self.storage, sampler=sampler, study_name=f"{name}-{self.width}", load_if_exists=True
        )
        if not (there := len(study.trials)):
            study.set_user_attr("before", len(self._before(name)))
        missing = range(there, study.user_attrs.get("before", 0))  # some, too, if it was stopped here
        before = self._before(name) if missing else []
        if missing and len(before) < missing.stop:
            sys.exit(
                f"error: {self.tried_before}: takes {missing.stop} trials of {name}, with which its study was begun"
            )
        for number in missing:
            if before[number]["second_best_accuracy"]:
                study.set_user_attr(f"second {number}", _outcome_in(before[number], "second_"))
            study.add_trial(restored(name, before[number]))
        if not study.trials:
            if METHODS[name].searched:
                study.enqueue_trial(KNOWN | METHODS[name].known)
            else:
                for millions in (32, 48, 64):
                    study.enqueue_trial({"budget": millions * 1_000_000})
        return study

    def _before(self, name: str) -> list[dict[str, str]]:
        if self.tried_before is None or not self.tried_before.exists():
            return []
        rows = [row for row in read_csv(self.tried_before) if row["estimator"] == name]
        return [row for row in rows if row["width"] == str(self.width)]

    def tune(self, name: str, trials: int) -> None:
        """As many trials as are missing."""
        study, method = self.study(name), METHODS[name]
        if not method.searched:
            trials = 3

        def objective(trial: optuna.Trial) -> float:
            overrides = [*method.fixed.split(), f"width={self.width}", *settings(method, trial)]
            trial.set_user_attr("overrides", overrides)
            best = min((each.value for each in study.trials if each.value is not None), default=math.inf)
            curve, diverged = tried(overrides, trial.params["budget"], 0, best)
            if diverged:
                trial.set_user_attr("diverged", True)
            trial.set_user_attr("outcome", found := outcome(curve))
            return judged(found)

        ended = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
        for number in tqdm(range(ended, trials), desc=f"{name}, width {self.width}", disable=not sys.stderr.isatty()):
            if number % 3 and method.searched:
                study.enqueue_trial(near(study.best_trial, number))
            study.optimize(objective, n_trials=1)
        self.confirm(study)

    @staticmethod
    def confirm(study: optuna.Study) -> None:
        """Second seeds of the trials that may be the best."""
        ranked = sorted((each for each in study.trials if each.value is not None), key=lambda each: each.value)
        best = math.inf
        for trial in ranked[:CONFIRMED]:
            if trial.value >= best:
                return
            if second(study, trial) is None:
                curve, _ = tried(trial.user_attrs["overrides"], trial.params["budget"], SECOND_SEED, best)
                study.set_user_attr(f"second {trial.number}", outcome(curve))
            best = min(best, confirmed(study, trial))

    def trials(self, name: str) -> list[Row]:
        study, rows = self.study(name), []
        for trial in study.trials:
            if trial.value is None:
                continue
            who, again = {"estimator": name, "width": self.width, "trial": trial.number}, second(study, trial) or {}
            rows.append(
                who
                | trial.user_attrs["outcome"]
                | {
                    "diverged": str(trial.user_attrs.get("diverged", False)).lower(),
                    "second_work_to_95": again.get("work_to_95"),
                    "second_best_accuracy": again.get("best_accuracy"),
                    "settings": " ".join(trial.user_attrs["overrides"]),
                }
            )
        return rows

    def best(self, name: str) -> optuna.trial.FrozenTrial:
        study = self.study(name)
        return min(study.trials, key=lambda trial: (confirmed(study, trial), trial.number))

    def run(self, name: str, seed: int, times: int) -> None:
        """A run of the method's best trial with ``times`` its budget, unless it is there."""
        path = self.folder / f"{name}-{self.width}-{times}-{seed}.json"
        if path.exists():
            return
        best = self.best(name)
        overrides, budget = best.user_attrs["overrides"], times * best.params["budget"]
        curve, diverged = list[Row](), False
        try:
            for point in course(overrides, budget, seed):
                curve.append(point)
                if reached(curve, GOALS[-1]):
                    break
        except Diverged:
            diverged = True
        who = {"estimator": name, "width": self.width, "times": times, "seed": seed}
        made_with = provenance(torch.device("cpu"))
        write_json(path, {"who": who, "diverged": diverged, "curve": curve, "provenance": made_with})

    def time(self, names: list[str], rounds: int = 9, steps: int = 6) -> None:
        """The median time of a meta-step of each method's best trial, with the number of threads that makes it least;
        methods and numbers of threads by turns."""
        running = {name: built(self.best(name).user_attrs["overrides"], 10**12, 0).train() for name in names}
        took: dict[tuple[str, int], list[float]] = {}
        for name in names * (1 + rounds):
            for threads in range(1, (os.cpu_count() or 1) + 1):
                torch.set_num_threads(threads)
                next(running[name])
                started = time.perf_counter()
                for _ in range(steps):
                    next(running[name])
                took.setdefault((name, threads), []).append((time.perf_counter() - started) / steps)
        medians = {who: statistics.median(times[1:]) for who, times in took.items()}  # the first warmed up
        least = {name: min((medians[who], who[1]) for who in medians if who[0] == name) for name in names}
        write_json(
            self.folder / f"time-{self.width}.json",
            {
                "steps": {name: {"seconds": took, "threads": threads} for name, (took, threads) in least.items()},
                "provenance": provenance(torch.device("cpu")),
            },
        )


def collect(folder: Path, results: Path, races: list[Race]) -> None:
    """The three tables."""
    write_csv(results / "race_tuning.csv", [row for race in races for name in METHODS for row in race.trials(name)])
    runs = [json.loads(path.read_text()) for path in folder.glob("*-*-*-*.json")]
    if not runs:
        return
    order = list(METHODS)
    runs.sort(key=lambda run: (run["who"]["width"], order.index(run["who"]["estimator"]), *run["who"].values()))
    timed = {race.width: race.folder / f"time-{race.width}.json" for race in races}
    times = {width: json.loads(path.read_text()) for width, path in timed.items() if path.exists()}
    for run in runs:
        step = times.get(run["who"]["width"], {"steps": {}})["steps"].get(run["who"]["estimator"], {})
        run["who"]["threads"] = step.get("threads")
        for point in run["curve"]:
            point["seconds"] = round(point["step"] * step["seconds"], 3) if step else None
    write_csv(
        results / "race_curves.csv",
        [{**run["who"], "number": k, **point} for run in runs for k, point in enumerate(run["curve"])],
    )
    rows = []
    for run in runs:
        row = {**run["who"], "diverged": str(run["diverged"]).lower(), "best_accuracy": highest(run["curve"])}
        for goal in GOALS:
            point = reached(run["curve"], goal) or {}
            row |= {f"{what}_to_{100 * goal:.0f}": point.get(what) for what in ("work", "seconds")}
        rows.append(row)
    write_csv(results / "race.csv", rows)
    made_with = [one["provenance"] for one in (*runs, *times.values())]
    write_json(results / "race.json", {"command": "make race", "provenance": distinct(made_with)})


def main() -> None:
    parser = argparse.ArgumentParser(description="the least work and time to an accuracy")
    parser.add_argument("what", choices=["tune", "run", "time", "collect"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--times", type=int, nargs="+", default=[1, 2, 4], help="multiples of the budgets that tuning found"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "race")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    keep_freed_memory()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    races = [Race(arguments.folder, width, arguments.results / "race_tuning.csv") for width in arguments.widths]
    if arguments.what == "tune":
        for race in races:
            for name in arguments.methods:
                race.tune(name, arguments.trials)
    if arguments.what == "run":
        for times in arguments.times:
            for race in races:
                for seed in range(1, arguments.seeds + 1):
                    for name in arguments.methods:
                        race.run(name, seed, times)
    if arguments.what == "time":
        for race in races:
            race.time(arguments.methods)
    collect(arguments.folder, arguments.results, races)


if __name__ == "__main__":
    main()
