"""Chooses the settings of every method on validation tasks: python scripts/tune.py [--methods ...] [--experiments ...]

The rule, written before the runs, for each experiment of accuracy apart (EXPERIMENTS):

- A trial is a run of the experiment (configs/experiment/accuracy.yaml and its like) with all of its meta-steps, or of
  its budget. It is judged by its accuracy on TASKS validation tasks at its end; a run that diverged, by chance. One
  that after a third of its way is BEHIND the best of the method's trials there, or further, ends.
- A method has TRIALS trials at points of a scrambled Sobol sequence, the same for all, of which it reads the settings
  that it has; and before them one at KNOWN, with what is known to be better for it.
- The AGAIN best are run with a second seed, and the best by the mean of both is chosen.
- Where a number of the chosen trial is in the outer tenth of its range, the trial with that number taken to twice
  beyond the edge (half, at the lower one) is run with both seeds, and takes its place if it is better: at most FURTHER
  times for each number.

What is done, below outputs/tuning or by the table here or elsewhere, is not done twice. Writes results/tuning.csv and
configs/tuned/METHOD.yaml.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.stats import qmc
from tqdm import tqdm

from fobmaml.files import read_csv, write_csv, write_json, write_text
from fobmaml.measure.accuracy import score
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.build import build
from fobmaml.run.provenance import distinct, provenance
from fobmaml.training import Diverged

ROOT = Path(__file__).parents[1]
TRIALS, AGAIN, FURTHER = 24, 6, 3
TASKS, SEEDS = 300, (100, 101)
CHANCE, BEHIND = 0.2, 0.15
WAYS, QUERIES = 5, 15
Settings = dict[str, Any]
Row = dict[str, str]
WHO = ("experiment", "estimator", "trial", "seed")
Who = tuple[str, str, str, str]


@dataclass(frozen=True)
class Range:
    """A setting that is a number, its logarithm uniform."""

    low: float
    high: float

    def at(self, u: float) -> float:
        return self.low * (self.high / self.low) ** u


@dataclass(frozen=True)
class Choice:
    """A setting that is one of several."""

    options: tuple[Any, ...]

    def at(self, u: float) -> Any:
        return self.options[int(u * len(self.options))]


SPACE: dict[str, Range | Choice] = {
    "optimizer": Choice(("sngdm", "adam")),
    "sngdm.lr": Range(0.03, 1.0),
    "adam.lr": Range(5e-4, 0.03),
    "schedule": Choice(("cosine", "constant")),
    "solver.steps": Range(5, 15),
    "solver.lr": Range(0.03, 0.6),
    "solver.batch": Choice((None, 5, 10, 20)),
    "task_clip": Choice((None, 1.0)),
    "adaptation.steps": Choice((1, 2, 5)),  # of a validation or test task, as a multiple of training's
    "adaptation.lr": Choice((0.5, 1, 2)),
    "solver.query_batch": Choice((None, 5, 10, 25)),
    "estimator.lam": Range(0.05, 4.0),
    "estimator.nu": Range(1e-3, 1.0),
    "estimator.multi_step": Choice((0.0, 0.3)),
    "estimator.learn_lr": Choice((0.0, 0.03)),
    "estimator.second_order_from": Choice((0.0, 0.1)),
    "authors": Choice((False, True)),
}
"""Every setting that is searched, for those methods that have it."""
LATER: dict[str, Range | Choice] = {"estimator.envelope": Range(0.1, 4.0)}
"""What is searched by a sequence of its own: it came when the other points had been tried, and these stay."""
OF_BUDGET = {"meta_batch": Choice((2, 4, 8, 16))}
"""What else is searched where a run ends by its work: tasks a meta-step."""
COMMON = (*list(SPACE)[:7], "adaptation.steps", "adaptation.lr")
KNOWN: Settings = {
    "optimizer": "sngdm",
    "sngdm.lr": 0.3,
    "adam.lr": 0.01,
    "schedule": "cosine",
    "solver.steps": 10.0,
    "solver.lr": 0.1,
    "solver.batch": None,
    "task_clip": 1.0,
    "adaptation.steps": 1,
    "adaptation.lr": 1,
    "solver.query_batch": None,
    "estimator.lam": 0.5,
    "estimator.nu": 0.05,
    "estimator.envelope": 1.0,
    "estimator.multi_step": 0.3,
    "estimator.learn_lr": 0.03,
    "estimator.second_order_from": 0.1,
    "authors": False,
    "meta_batch": 8,
}
AUTHORS: Settings = {
    "estimator.damping": 1.0,
    "estimator.lam_damping": 10.0,
    "estimator.pull_back": True,
    "eval.lam": 0.0,
}
"""What the code of iMAML's authors does beside the paper's formula."""


@dataclass(frozen=True)
class Experiment:
    """What methods are tuned for. ``suffix``: of the files' names in configs/tuned. ``also``: what is searched too."""

    suffix: str = ""
    shots: int = 5
    also: Mapping[str, Choice] = field(default_factory=dict)


EXPERIMENTS = {
    "accuracy": Experiment(),
    "accuracy_1shot": Experiment("_1shot", shots=1),
    "accuracy_budget": Experiment("_budget", also=OF_BUDGET),
}


@dataclass(frozen=True)
class Method:
    """``has``: what is searched beside COMMON. ``known``: its first trial, in what that differs from KNOWN."""

    estimator: str
    has: tuple[str, ...] = ("task_clip",)
    known: Settings | None = None

    @property
    def searched(self) -> tuple[str, ...]:
        return (*COMMON, *self.has)


DIFFERENCES = ("task_clip", "solver.query_batch", "estimator.lam", "estimator.nu")
METHODS = {
    "maml": Method("maml", (), {"optimizer": "adam"}),
    "maml_plus": Method(
        "maml", ("task_clip", "estimator.multi_step", "estimator.learn_lr", "estimator.second_order_from")
    ),
    "fomaml": Method(
        "fomaml", ("task_clip", "estimator.multi_step"), {"optimizer": "adam", "estimator.multi_step": 0.0}
    ),
    "reptile": Method("reptile", ("task_clip",), {"solver.batch": 10, "solver.lr": 0.3}),
    "imaml": Method(
        "imaml",
        ("task_clip", "estimator.lam", "authors"),
        {"optimizer": "adam", "adam.lr": 0.003, "estimator.lam": 2.0, "authors": True},
    ),
    "forward": Method("forward", DIFFERENCES, {"estimator.nu": 0.02}),
    "symmetric": Method("symmetric", DIFFERENCES),
    "central4": Method("central4", DIFFERENCES),
    "tangent": Method("tangent", DIFFERENCES[:3]),
    "forward_envelope": Method(
        "forward",
        (*DIFFERENCES, "estimator.envelope"),
        {
            "estimator.nu": 0.5,
            "estimator.lam": 0.2,
            "solver.steps": 7.0,
            "solver.lr": 0.2,
            "solver.batch": 5,
            "solver.query_batch": 5,
            "adaptation.lr": 2,
        },
    ),
}
"""The methods of the accuracy table: MAML as published first, and with its remedies."""


def points(count: int, experiment: Experiment) -> list[Settings]:
    """KNOWN apart, the settings of ``count`` trials, of which a method reads those that it has."""
    space = {**SPACE, **experiment.also}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 24 is no power of two, and nothing is integrated
        sequences = ((space, qmc.Sobol(len(space), seed=0)), (LATER, qmc.Sobol(len(LATER), seed=1)))
        drawn = [(parts, sequence.random(count)) for parts, sequence in sequences]
    found = [
        [{name: part.at(u) for (name, part), u in zip(parts.items(), point, strict=True)} for point in of_parts]
        for parts, of_parts in drawn
    ]
    return [one | later for one, later in zip(*found, strict=True)]


def overrides(method: Method, point: Settings, experiment: Experiment) -> Settings:
    """Of a trial, the settings for the command line, groups first."""
    given = {name: point[name] for name in method.searched}
    steps = round(given["solver.steps"])
    examples = WAYS * (experiment.shots + QUERIES if method.estimator == "reptile" else experiment.shots)

    def batch(size: int | None, of: int) -> int | None:
        return size if size is not None and size < of else None

    found: Settings = {
        "estimator": method.estimator,
        "solver": "gd",
        "optimizer": given["optimizer"],
        "optimizer.lr": point[f"{given['optimizer']}.lr"],
        "schedule": given["schedule"],
        "solver.steps": steps,
        "solver.lr": given["solver.lr"],
        "solver.batch": batch(given["solver.batch"], examples),
        "task_clip": given.get("task_clip"),
        "eval.solver.steps": given["adaptation.steps"] * steps,
        "eval.solver.lr": given["adaptation.lr"] * given["solver.lr"],
        "eval.solver.batch": None,
    }
    if "solver.query_batch" in given:
        found["solver.query_batch"] = batch(given["solver.query_batch"], WAYS * QUERIES)
        found["eval.solver.query_batch"] = None
    found |= {name: value for name, value in given.items() if name.startswith("estimator.")}
    found |= {name: point[name] for name in experiment.also}
    found |= AUTHORS if given.get("authors") else {}
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in found.items()}


def said(given: Settings) -> list[str]:
    """For the command line."""
    return [f"{name}={'null' if value is None else value}" for name, value in given.items()]


def accuracy(given: Settings, experiment: str, seed: int, least: float, shorter: Sequence[str]) -> dict[str, Any]:
    """How a run with these settings ends, which it does after a third of its way if its accuracy is not above
    ``least`` then: validation accuracy, also then, work, and whether it diverged."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        training = build(
            compose(
                "train",
                [f"experiment={experiment}", *said(given), f"seed={seed}", "device=cpu", "measure=[]", *shorter],
            )
        )
    tasks, third = training.fixed("validation", TASKS), None
    try:
        for _ in training.train():
            if third is None and training.fraction >= 1 / 3:
                third = score(training, tasks).accuracy or 0.0
                if third <= least:
                    break
        found, diverged = score(training, tasks).accuracy or 0.0, False
    except Diverged:
        found, diverged = CHANCE, True
    work = round(training.work.total)
    return {"accuracy": found, "third": third, "diverged": diverged, "steps": training.step, "work": work}


@dataclass(frozen=True)
class Tuning:
    """The trials of one experiment, in ``folder``."""

    folder: Path
    experiment: str
    trials: int = TRIALS
    shorter: tuple[str, ...] = ()
    recorded: Mapping[Who, Row] = field(default_factory=dict)  # the rows that results/tuning.csv had
    only_read: bool = False

    def run(self, name: str, number: str, point: Settings, seed: int) -> float:
        """The accuracy of a trial's run, which is read where it is there. Raises FileNotFoundError where it may only be
        read, ValueError where the table has it with other settings."""
        given = overrides(METHODS[name], point, EXPERIMENTS[self.experiment])
        path, who = self.folder / name / f"{number}-{seed}.json", (self.experiment, name, number, str(seed))
        if not path.exists() and who in self.recorded:
            if (settings := self.recorded[who]["settings"]) != " ".join(said(given)):
                raise ValueError(f"results/tuning.csv: {', '.join(who)}: {settings}: takes {' '.join(said(given))}")
            return float(self.recorded[who]["accuracy"])
        if not path.exists():
            if self.only_read:
                raise FileNotFoundError(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            made_with = provenance(torch.device("cpu"))
            before = [float(row["third"] or 0.0) for row in self.rows() if row["estimator"] == name]
            ended = accuracy(given, self.experiment, seed, max(before, default=0.0) - BEHIND, self.shorter)
            named = {"experiment": self.experiment, "estimator": name, "trial": number, "seed": seed}
            write_json(path, {"who": named, **ended, "settings": given, "provenance": made_with})
        return float(json.loads(path.read_text())["accuracy"])

    def made(self) -> dict[Who, Path]:
        """Where the runs made here were written."""
        paths = ((path, path.stem.rpartition("-")) for path in sorted(self.folder.glob("*/*.json")))
        return {(self.experiment, path.parent.name, number, seed): path for path, (number, _, seed) in paths}

    def files(self) -> dict[Who, dict[str, Any]]:
        """What was written of them."""
        return {who: json.loads(path.read_text()) for who, path in self.made().items()}

    def rows(self) -> list[Row]:
        """The table's rows, all but which is chosen: those of runs made here, and the others that it had."""
        made = self.files()
        before = {who: row for who, row in self.recorded.items() if who[0] == self.experiment}
        return [
            *(row for who, row in before.items() if who not in made),
            *(
                {
                    **dict(zip(WHO, who, strict=True)),
                    "chosen": "",
                    **{
                        key: "" if run[key] is None else str(run[key]) for key in ("accuracy", "third", "steps", "work")
                    },
                    "diverged": str(run["diverged"]).lower(),
                    "settings": " ".join(said(run["settings"])),
                }
                for who, run in made.items()
            ),
        ]

    def both(self, name: str, number: str, point: Settings) -> float:
        return statistics.fmean(self.run(name, number, point, seed) for seed in SEEDS)

    def points(self, name: str) -> dict[str, Settings]:
        first = KNOWN | (METHODS[name].known or {})
        return {
            str(number): point
            for number, point in enumerate([first, *points(self.trials, EXPERIMENTS[self.experiment])])
        }

    def tune(self, name: str) -> tuple[str, Settings]:
        """The number and the settings of the chosen trial, after those that are missing were run."""
        tried = self.points(name)
        once = {n: self.run(name, n, point, SEEDS[0]) for n, point in tried.items()}
        ranked = sorted(once, key=lambda n: (-once[n], int(n)))[:AGAIN]
        twice = {n: self.both(name, n, tried[n]) for n in ranked}
        best = max(ranked, key=lambda n: twice[n])
        point, value, left = tried[best], twice[best], dict.fromkeys(SPACE | LATER, FURTHER)
        while found := self._better(name, best, point, value, left):
            best, point, value = found
        return best, point

    def _better(
        self, name: str, number: str, point: Settings, value: float, left: dict[str, int]
    ) -> tuple[str, Settings, float] | None:
        """The first trial beyond an edge that is better than ``point``, while there are any ``left``."""
        for setting, beyond in beyond_edges(METHODS[name], point):
            if not left[setting]:
                continue
            left[setting] -= 1
            moved, named = point | {setting: beyond}, f"{number},{setting}={beyond:.3g}"
            if (found := self.both(name, named, moved)) > value:
                return named, moved, found
            left[setting] = 0
        return None


def beyond_edges(method: Method, point: Settings) -> Iterator[tuple[str, float]]:
    """The numbers of ``point`` that are in the outer tenth of their ranges, or beyond, and what to try instead."""
    unused = {"sngdm.lr", "adam.lr"} - {f"{point['optimizer']}.lr"}
    for name in method.searched:
        part = (SPACE | LATER)[name]
        if not isinstance(part, Range) or name in unused:
            continue
        place = math.log(point[name] / part.low) / math.log(part.high / part.low)
        if place < 0.1:
            yield name, min(part.low, point[name]) / 2
        elif place > 0.9:
            yield name, max(part.high, point[name]) * 2


def file_of(given: Settings, experiment: str) -> str:
    """The text of configs/tuned/METHOD.yaml."""
    file = OmegaConf.create({"defaults": [{f"override /{group}": given[group]} for group in GROUPS]})
    for name, value in given.items():
        if name not in GROUPS:
            OmegaConf.update(file, name, value)
    head = f"# @package _global_\n# What tuning chose for experiment={experiment} (scripts/tune.py).\n"
    return head + OmegaConf.to_yaml(file)


GROUPS = ("estimator", "solver", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--collect", action="store_true", help="run nothing, write the tables of what is there")
    parser.add_argument("--fast", action="store_true", help="two short trials a method, below outputs/fast")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="methods at once, on one core each")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        sys.exit(f"error: --jobs={arguments.jobs}: takes a whole number of at least 1")
    outputs = ROOT / "outputs" / ("fast" if arguments.fast else "")
    trials, shorter = (1, ("steps=6", "meta_batch=2", "width=4")) if arguments.fast else (TRIALS, ())
    recorded = {} if arguments.fast else rows_of(ROOT / "results" / "tuning.csv")
    tunings = {name: Tuning(outputs / "tuning" / name, name, trials, shorter, recorded) for name in EXPERIMENTS}
    if not arguments.collect:
        tune(
            [(tunings[experiment], name) for experiment in arguments.experiments for name in arguments.methods],
            arguments.jobs,
        )
    if arguments.fast:
        collect(tunings, outputs / "tuned", outputs)
    else:
        collect(tunings, ROOT / "configs" / "tuned", ROOT / "results")


def rows_of(table: Path) -> dict[Who, Row]:
    """By what they are of, and none where there is no table."""
    return {tuple(row[key] for key in WHO): row for row in (read_csv(table) if table.exists() else [])}  # type: ignore[misc]


def tune(missing: Sequence[tuple[Tuning, str]], jobs: int) -> None:
    """Runs what is missing of the trials of methods, some at once, with a bar of runs."""

    def done() -> int:
        whole = {who for tuning, _ in missing for who in (*tuning.recorded, *tuning.made())}
        return sum((tuning.experiment, name) == who[:2] for tuning, name in missing for who in whole)

    with (
        get_context("spawn").Pool(jobs, _alone) as pool,
        tqdm(
            total=len(missing) * (missing[0][0].trials + 1 + AGAIN), unit="run", dynamic_ncols=True, disable=None
        ) as bar,
    ):
        running = pool.starmap_async(Tuning.tune, missing, chunksize=1)
        while not running.ready():
            running.wait(1.0)
            bar.n = done()
            bar.total = max(bar.total, bar.n)  # and those beyond edges
            bar.refresh()
        running.get()


def _alone() -> None:
    """A process of one core, which its parent stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    torch.set_num_threads(1)


def collect(tunings: Mapping[str, Tuning], tuned: Path, results: Path) -> None:
    """Writes the files of the methods whose trials are all there, and the table of all trials."""
    rows, made_with = list[Row](), list[Any]()
    if (about_table := results / "tuning.json").exists():
        made_with += json.loads(about_table.read_text())["provenance"]
    tuned.mkdir(parents=True, exist_ok=True)
    for experiment, tuning in tunings.items():
        chosen, about = dict[str, str](), EXPERIMENTS[experiment]
        for name in METHODS:
            with contextlib.suppress(FileNotFoundError):
                chosen[name], point = replace(tuning, only_read=True).tune(name)
                text = file_of(overrides(METHODS[name], point, about), experiment)
                write_text(tuned / f"{name}{about.suffix}.yaml", text)
        rows += [
            {**row, "chosen": str(row["trial"] == chosen.get(row["estimator"])).lower()}
            for row in sorted(tuning.rows(), key=lambda row: (row["estimator"], row["trial"], row["seed"]))
        ]
        made_with += [run["provenance"] for run in tuning.files().values()]
    if not rows:
        sys.exit(f"error: {os.path.relpath(results)}: there is no trial yet")
    write_csv(results / "tuning.csv", rows)
    write_json(about_table, {"command": "python scripts/tune.py", "provenance": distinct(made_with)})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
