"""Which method reaches 90, 95 and 97 % validation accuracy first, by example-gradients and by seconds (make race).

    python benchmarks/race.py tune --trials 24    # a study for each method: the least work to 95 %
    python benchmarks/race.py run --seeds 3       # the methods at their best take turns, on an otherwise idle machine

5-way 5-shot 15-query MNIST-1D. A study tries settings by Optuna's sampler, as many for every method, and counts work in
example-gradients (a Hessian product is 8/3 of one): it may run beside others. What a trial is judged by is the work at
which validation accuracy first reaches 95 %, or, where it does not, how far it came. The race then counts both work and
seconds of training, without those of validation. Both go on where they were stopped. Into results/: race_tuning.csv (the
trials), race_curves.csv (accuracy along each run) and race.csv (where each run reached what).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from fobmaml.files import write_csv, write_json
from fobmaml.measure.accuracy import score
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.build import build
from fobmaml.run.provenance import provenance
from fobmaml.training import Diverged

ROOT = Path(__file__).parents[1]
GOALS = (0.90, 0.95, 0.97)
JUDGED = 0.95
MOST_WORK = 16_000_000
"""Example-gradients of a trial, and of a run of the race four times as many."""
VALIDATIONS = 40
TASKS = 300
Row = dict[str, Any]
Choose = Callable[[optuna.Trial], Mapping[str, object]]


@dataclass(frozen=True)
class Method:
    """``fixed``: what makes it this method. ``choices``: settings that are searched, beside those that all share."""

    fixed: tuple[str, ...]
    proximal: bool = False
    query_batch: bool = False
    nu: bool = False


METHODS = {
    "symmetric": Method(("estimator=symmetric",), proximal=True, query_batch=True, nu=True),
    "forward": Method(("estimator=forward",), proximal=True, query_batch=True, nu=True),
    "tangent": Method(("estimator=tangent",), proximal=True, query_batch=True),
    "maml": Method(("estimator=maml",)),
    "fomaml": Method(("estimator=fomaml",)),
    "reptile": Method(("estimator=reptile",)),
    "imaml": Method(("estimator=imaml",), proximal=True),
}


def chosen(method: Method, trial: optuna.Trial) -> list[str]:
    """The settings of a trial. All methods search the same, but for what some do not have."""
    found: dict[str, object] = {
        "optimizer": trial.suggest_categorical("optimizer", ["sngdm", "adam"]),
        "meta_batch": trial.suggest_categorical("meta_batch", [2, 4, 8, 16]),
        "solver.steps": trial.suggest_int("solver.steps", 3, 16),
        "solver.lr": trial.suggest_float("solver.lr", 0.03, 0.6, log=True),
        "solver.batch": trial.suggest_categorical("solver.batch", ["null", 5, 10, 20]),
        "task_clip": trial.suggest_categorical("task_clip", ["null", 1.0]),
        "budget": trial.suggest_int("budget", 500_000, MOST_WORK, log=True),
    }
    sngdm = found["optimizer"] == "sngdm"
    found["optimizer.lr"] = trial.suggest_float(
        "sngdm.lr" if sngdm else "adam.lr", *((0.03, 1.0) if sngdm else (5e-4, 0.03)), log=True
    )
    if method.proximal:
        found["estimator.lam"] = trial.suggest_float("estimator.lam", 0.05, 4.0, log=True)
    if method.query_batch:
        found["solver.query_batch"] = trial.suggest_categorical("solver.query_batch", ["null", 5, 10, 25])
    if method.nu:
        found["estimator.nu"] = trial.suggest_float("estimator.nu", 1e-3, 0.3, log=True)
    return [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in found.items()]


def course(overrides: list[str], budget: int, seed: int = 0, until: float = 1.0) -> Iterator[Row]:
    """A run's validation accuracies, with the work and the seconds of training until then. Ends at ``until``."""
    given = [*overrides, f"seed={seed}", f"budget={budget}", "steps=null", "device=cpu", "measure=[]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        training = build(compose("train", given))
    tasks, done = training.fixed("validation", TASKS), 0
    for _ in training.train():
        work = training.work.total
        if work * VALIDATIONS >= (done + 1) * budget or work >= budget:
            done = int(work * VALIDATIONS // budget)
            accuracy = score(training, tasks).accuracy
            yield {
                "step": training.step,
                "work": round(work),
                "seconds": round(training.train_seconds, 3),
                "accuracy": accuracy,
            }
            if accuracy is not None and accuracy >= until:
                return


def reached(curve: list[Row], goal: float) -> Row | None:
    """The first point at which the accuracy is ``goal`` or more."""
    return next((point for point in curve if point["accuracy"] >= goal), None)


def judged(curve: list[Row], budget: int) -> float:
    """The logarithm of the work to ``JUDGED``; else that of all work and a punishment for what was missing."""
    if point := reached(curve, JUDGED):
        return math.log(point["work"])
    best = max((point["accuracy"] for point in curve), default=0.0)
    return math.log(MOST_WORK) + 10.0 * (JUDGED - best) + 0.1


@dataclass(frozen=True)
class Race:
    folder: Path
    width: int

    @cached_property
    def storage(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{self.folder / 'studies.db'}"

    def study(self, name: str) -> optuna.Study:
        sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, group=True, n_startup_trials=8)
        return optuna.create_study(
            storage=self.storage, sampler=sampler, study_name=f"{name}-{self.width}", load_if_exists=True
        )

    def tune(self, name: str, trials: int) -> None:
        """As many trials as are missing."""
        study, method = self.study(name), METHODS[name]

        def objective(trial: optuna.Trial) -> float:
            overrides = [*method.fixed, f"width={self.width}", *chosen(method, trial)]
            trial.set_user_attr("overrides", overrides)
            curve: list[Row] = []
            try:
                for point in course(overrides, trial.params["budget"], until=JUDGED):
                    curve.append(point)
            except Diverged:
                trial.set_user_attr("diverged", True)
            trial.set_user_attr("curve", curve)
            return judged(curve, trial.params["budget"])

        ended = sum(trial.state.is_finished() for trial in study.trials)
        for _ in tqdm(range(trials - ended), desc=f"{name}, width {self.width}", disable=not sys.stderr.isatty()):
            study.optimize(objective, n_trials=1)

    def trials(self, name: str) -> list[Row]:
        return [
            {
                "method": name,
                "width": self.width,
                "trial": trial.number,
                "judged": trial.value,
                "work_to_95": (reached(trial.user_attrs["curve"], JUDGED) or {}).get("work"),
                "best_accuracy": max((p["accuracy"] for p in trial.user_attrs["curve"]), default=None),
                "diverged": str(trial.user_attrs.get("diverged", False)).lower(),
                "settings": " ".join(trial.user_attrs["overrides"]),
            }
            for trial in self.study(name).trials
            if trial.value is not None
        ]

    def run(self, name: str, seed: int) -> None:
        """One run of the method's best trial, unless it is there."""
        path = self.folder / f"{name}-{self.width}-{seed}.json"
        if path.exists():
            return
        best = self.study(name).best_trial
        curve, diverged = [], False
        try:
            for point in course(best.user_attrs["overrides"], best.params["budget"], seed):
                curve.append(point)
        except Diverged:
            diverged = True
        write_json(path, {"method": name, "width": self.width, "seed": seed, "diverged": diverged, "curve": curve})


def collect(folder: Path, results: Path, races: list[Race]) -> None:
    """The three tables."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))]
    of = [{key: run[key] for key in ("method", "width", "seed")} for run in runs]
    write_csv(results / "race_tuning.csv", [row for race in races for name in METHODS for row in race.trials(name)])
    if not runs:
        return
    write_csv(
        results / "race_curves.csv",
        [{**who, **point} for who, run in zip(of, runs, strict=True) for point in run["curve"]],
    )
    rows = []
    for who, run in zip(of, runs, strict=True):
        row = {**who, "diverged": str(run["diverged"]).lower()}
        for goal in GOALS:
            point = reached(run["curve"], goal) or {}
            row |= {f"work_to_{goal:.0%}".rstrip("%"): point.get("work"), f"seconds_to_{goal:.0%}".rstrip("%"): point.get("seconds")}
        row["best_accuracy"] = max((p["accuracy"] for p in run["curve"]), default=None)
        rows.append(row)
    write_csv(results / "race.csv", rows)
    write_json(results / "race.json", provenance(torch.device("cpu"), "") | {"threads": torch.get_num_threads()})


def main() -> None:
    parser = argparse.ArgumentParser(description="the least work and time to an accuracy")
    parser.add_argument("what", choices=["tune", "run", "collect"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "race")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    keep_freed_memory()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ.setdefault("WANDB_MODE", "disabled")
    races = [Race(arguments.folder, width) for width in arguments.widths]
    if arguments.what == "tune":
        for race in races:
            for name in arguments.methods:
                race.tune(name, arguments.trials)
    if arguments.what == "run":  # in turns, so that a slow spell of the machine hits all alike
        for race in races:
            for seed in range(1, arguments.seeds + 1):
                for name in arguments.methods:
                    race.run(name, seed)
    collect(arguments.folder, arguments.results, races)


if __name__ == "__main__":
    main()
