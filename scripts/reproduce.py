"""Runs the experiments behind results/ and collects them: python scripts/reproduce.py [experiment ...]

An experiment is a sweep, configs/experiment/NAME.yaml, its jobs below outputs/experiments/NAME. A job that is complete
is not run again, one that was stopped continues. ``--collect``: only collect what is there. ``--add``: only that, and
jobs of the table that are not there, which were run elsewhere, stay in it. ``--fast``: smaller sweeps, below
outputs/fast, which leave results/ alone. The exit status says whether every job of every sweep is there.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from statistics_of_runs import CHANCE
from tqdm import tqdm

from fobmaml.files import read_csv, write_csv, write_json
from fobmaml.logged import KEYS, WORK
from fobmaml.run.events import read_events
from fobmaml.run.provenance import distinct

ROOT = Path(__file__).parents[1]

TRAINING = "eval.every=20 eval.validation_tasks=50 bias.every=0"
PARTS = f"bias_parts.tasks=2 bias_parts.every=20 eval.tasks=50 {TRAINING}"
EXPERIMENTS = {
    "verify": "",
    "accuracy": f"steps=60 seed=10,11 eval.tasks=100 {TRAINING}",
    "accuracy_1shot": f"tuned=symmetric,maml steps=60 seed=10,11 eval.tasks=100 {TRAINING}",
    "accuracy_budget": f"tuned=symmetric,maml budget=400000 meta_batch=2 seed=10,11 eval.tasks=100 {TRAINING}",
    "parts_sngdm": f"steps=30 seed=0 optimizer.lr=0.3 eval.tasks=50 {TRAINING}",
    "parts_adam": f"steps=30 seed=0 optimizer.lr=0.003 eval.tasks=50 {TRAINING}",
    "parts_sngdm_zero": f"steps=30 seed=0 optimizer.lr=0.3 eval.tasks=50 {TRAINING}",
    "parts_adam_zero": f"steps=30 seed=0 optimizer.lr=0.003 eval.tasks=50 {TRAINING}",
    "parts_sngdm_damped": f"steps=30 seed=0 optimizer.lr=0.3 eval.tasks=50 {TRAINING}",
    "parts_adam_damped": f"steps=30 seed=0 optimizer.lr=0.003 eval.tasks=50 {TRAINING}",
    "novel_shapes1d": f"tuned=symmetric,maml steps=60 seed=20,21 eval.tasks=100 {TRAINING}",
    "novel_mnist1d": f"tuned=symmetric,maml steps=60 seed=20 eval.tasks=100 {TRAINING}",
    "novel_digits": f"tuned=symmetric,maml steps=60 seed=20 eval.tasks=100 {TRAINING}",
    "inner_steps": f"tuned=symmetric,maml steps=60 seed=0,1 solver.steps=5,10 eval.tasks=100 {TRAINING}",
    "memory": "width=25,100,250 solver.steps=10",
    "memory_steps": "solver.steps=1,10,50",
    "memory_depth": "depth=2,6",
    "memory_deep": "depth=3,6 width=32 solver.steps=5,10",
    "memory_transformer": "depth=2 width=32 dataset.dimension=16,64 solver.steps=5,10",
    "bias_floor": "seed=0,1 solver.delta=1e-6,1e-3",
    "bias_imaml": "seed=0,1 solver.delta=1e-6,1e-3",
    "bias_delta": "seed=0,1 solver.delta=1e-6,1e-3 estimator.nu=auto,1e-3,1e-2,0.1,0.3",
    "bias_delta_cnn": "seed=0,1 solver.delta=1e-6,1e-4 estimator.nu=auto,1e-2,0.1 width=4",
    "bias_steps": "solver.steps=5,20,100",
    "bias_map": f"steps=20 seed=0 estimator.lam=0.5 solver.steps=5,10 estimator.nu=0.05 {PARTS}",
    "nu": "estimator=symmetric estimator.nu=1e-4,1e-2,1.0",
    "smoothness": "steps=100 seed=0",
    "smoothness_logistic": "steps=100 seed=0",
    "optimizers": "steps=30 seed=0 optimizer.lr=0.01,0.1,1.0",
    "convergence": "steps=100",
    "convergence_noise": "steps=100 seed=0,1 optimizer.lr=0.03,0.1",
    "convergence_rates": "steps=300 seed=0,1 optimizer.lr=0.03,0.1",
    "convergence_floor": "steps=60 seed=0,1 solver.delta=1e-5,1e-3 estimator.nu=auto,0.03",
    "curvature": "steps=50 seed=0 curvature.every=50 curvature.tasks=1",
}
"""The experiments in results/, each with its settings for ``--fast``."""

RIGHT = "test/right"
NOT_IN_TABLES = ("meta_gradient/", "model/", "loss/", "linear/", "optimizer/", RIGHT)
"""All else that a run measures is."""
OUTCOMES = ("the meta-gradient at step ", "inner solve: ", "linear solve: ")
"""How the reason of a failed run begins that belongs to the results: it diverged, or found no exact meta-gradient."""
AT_THE_END = ("test/", "memory/")
"""What is measured once, and no curve."""
INTERRUPTED = 130


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"{', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--collect", action="store_true", help="run nothing, collect what is there")
    parser.add_argument("--add", action="store_true", help="run nothing, add what is there to the tables")
    parser.add_argument("--fast", action="store_true", help="smaller sweeps, below outputs/fast")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sweeps at once, on one core each")
    arguments = parser.parse_args()
    names = arguments.experiments or list(EXPERIMENTS)
    if unknown := set(names) - EXPERIMENTS.keys():
        sys.exit(f"error: {', '.join(sorted(unknown))}: takes {', '.join(EXPERIMENTS)}")
    if arguments.jobs < 1:
        sys.exit(f"error: --jobs={arguments.jobs}: takes a whole number of at least 1")
    outputs = ROOT / "outputs" / ("fast" if arguments.fast else "experiments")
    overrides = {name: EXPERIMENTS[name].split() if arguments.fast else [] for name in names}
    ended = {} if arguments.collect or arguments.add else sweep(overrides, outputs, arguments.jobs)
    wrong = []
    for name in names:
        kept = collect(name, outputs / name, outputs if arguments.fast else ROOT / "results", arguments.add)
        wrong += faults(name, jobs_of(name, overrides[name]), outputs / name, ended.get(name, 0), kept)
    if wrong:
        sys.exit("\n".join(f"error: {fault}" for fault in wrong))


def jobs_of(name: str, overrides: Sequence[str]) -> list[frozenset[str]]:
    """The settings of each job of a sweep, as Hydra's sweeper makes them of its file and the command line."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        sweeper = compose("train", [f"experiment={name}"], return_hydra_config=True).hydra.sweeper
    swept = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*swept, f"experiment={name}", *overrides])
    return [frozenset(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def faults(
    name: str, jobs: Sequence[frozenset[str]], folder: Path, status: int = 0, kept: Mapping[str, str] | None = None
) -> list[str]:
    """Says how many of the jobs are there, and returns what is wrong: jobs that are not, and a sweep's exit status that
    no diverged run explains. One that diverged is there, and so are the ``kept`` jobs of its table, each with its
    status."""
    ended = {frozenset([*run.split(","), f"experiment={name}"]): how for run, how in (kept or {}).items()}
    there, failed = {*ended} & {*jobs}, []
    diverged = sum(ended[job] != "completed" for job in there)
    for path in sorted(folder.glob("*/summary.json")):
        job = frozenset(yaml.safe_load((path.parent / ".hydra" / "overrides.yaml").read_text()))
        summary = json.loads(path.read_text())
        if job not in jobs or job in there:
            continue
        reason = summary.get("reason") or ""
        if summary["status"] == "completed" or reason.startswith(OUTCOMES):
            there.add(job)
            diverged += summary["status"] != "completed"
        elif summary["status"] == "failed":
            failed.append(f"{name}: {path.parent.name}: {reason}")
    count = f"{name}: {len(there)} of {len(jobs)} jobs are there"
    print(count + f", {diverged} of them diverged" * bool(diverged))
    if len(there) < len(jobs):
        return [count, *failed]
    return [f"{name}: its sweep ended with status {status}: {folder / 'sweep.log'}"] if status and not diverged else []


def sweep(overrides: Mapping[str, list[str]], outputs: Path, at_once: int) -> dict[str, int]:
    """Runs the sweeps, some at once, with a bar of jobs; their exit statuses. Raises KeyboardInterrupt where one is
    interrupted."""
    waiting, running, ended = list(overrides), dict[str, subprocess.Popen[bytes]](), {}
    total = sum(len(jobs_of(name, given)) for name, given in overrides.items())
    with tqdm(total=total, unit="job", dynamic_ncols=True, smoothing=0.1, disable=None) as bar, stopping_too(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                (outputs / name).mkdir(parents=True, exist_ok=True)
                with (outputs / name / "sweep.log").open("wb") as log:
                    running[name] = subprocess.Popen(
                        [
                            sys.executable,
                            str(ROOT / "train.py"),
                            "-m",
                            f"experiment={name}",
                            *overrides[name],
                            f"hydra.sweep.dir={outputs / name}",
                        ],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        start_new_session=True,
                    )
            time.sleep(0.5)
            bar.n = sum(len(list((outputs / name).glob("*/summary.json"))) for name in overrides if name not in waiting)
            bar.set_description(", ".join(running))
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                ended[name] = process.returncode
                if process.returncode == INTERRUPTED:
                    raise KeyboardInterrupt
                if process.returncode:
                    last = (outputs / name / "sweep.log").read_text(errors="replace").strip().splitlines()[-1:]
                    bar.write(f"{name}: {' '.join(last)} (all of it: {outputs / name / 'sweep.log'})")
    return ended


@contextlib.contextmanager
def stopping_too(running: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Where this program is asked to stop, the sweeps are: each writes a checkpoint."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def method_of(run: str, summary: Mapping[str, Any]) -> str:
    """As it is named in tables: by what was tuned, whatever for, as the job's name says, or by the estimator."""
    tuned = re.search(r"(?:^|,)tuned=([^,]+)", run)
    name = tuned[1] if tuned else str(summary["choices"]["estimator"])
    return name.removesuffix("_1shot").removesuffix("_budget")


def of_a_curve(key: str) -> bool:
    """Whether it is measured every so many steps, beside training's own numbers."""
    return "/" in key and key not in KEYS and not key.startswith(AT_THE_END)


def of_curves(key: str) -> bool:
    """Whether a table of curves shows it: a measurement of theirs, or the work until then."""
    return of_a_curve(key) or key in WORK


def collect(name: str, folder: Path, results: Path, add: bool = False) -> dict[str, str]:
    """Writes NAME.csv (a row a job: the settings that were swept or differ, what was measured), NAME_curves.csv (what
    was measured during training, by step), NAME_examples.csv and NAME.json (provenance and common settings). With
    ``add``, the jobs of these files that are not in ``folder`` stay; returns the status of each of them."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))}
    runs = {run: summary for run, summary in runs.items() if summary["status"] != "interrupted"}
    before = Before.read(name, results, set(runs)) if add else Before()
    if not runs and not before.rows:
        print(f"{name}: no run is complete")
        return {}
    settings = {run: summary["choices"] | dict(flat(summary["config"])) for run, summary in runs.items()}
    values = {key: before.values(key) for key in (*before.settings, *before.varied)}
    for found in settings.values():
        for key in found:
            values.setdefault(key, [None] * bool(before.rows))
    for key, different in values.items():
        different += [found.get(key) for found in settings.values()]
    swept = {part.split("=")[0] for run in (*before.rows, *runs) for part in run.split(",")} - {"estimator"}
    varied = [
        key
        for key, different in values.items()
        if key in swept or (key != "estimator" and len({json.dumps(value) for value in different}) > 1)
    ]

    def named(run: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        return {"run": run, "estimator": method_of(run, summary), **{key: settings[run].get(key) for key in varied}}

    old = {key: before.settings.get(key) for key in varied}
    rows = [{**old, **row} for row in before.rows.values()]
    for run, summary in runs.items():
        ended = {key: summary[key] for key in ("status", "step", "seconds")}
        measured = {key: value for key, value in summary.items() if "/" in key and not key.startswith(NOT_IN_TABLES)}
        rows.append(
            {
                **named(run, summary),
                **ended,
                **{key: value if ended["status"] == "completed" else None for key, value in measured.items()},
                "reason": (summary.get("reason") or "").split(":")[0],
            }
        )
    first = ("run", "estimator", *varied, "status", "step", "seconds")
    write_rows(results / f"{name}.csv", rows, first, ("reason",))
    curves = [{**old, **event} for event in before.curves]
    for run, summary in runs.items():
        curves += [
            {
                key: value
                for key, value in (named(run, summary) | event).items()
                if key in (*first, "step") or of_curves(key)
            }
            for event in read_events(folder / run / "metrics.jsonl")
            if any(map(of_a_curve, event))
        ]
    if any(int(row["step"]) for row in curves):
        write_rows(results / f"{name}_curves.csv", curves, ("run", "estimator", *varied, "step"))
    if parts := by_example(runs, before.shares):
        write_csv(results / f"{name}_examples.csv", parts)
    write_json(
        results / f"{name}.json",
        {
            "command": f"make reproduce ARGS={name}",
            "jobs": len(rows),
            "seconds": round(sum(float(row["seconds"]) for row in rows)),
            "provenance": distinct([*before.provenance, *(summary["provenance"] for summary in runs.values())]),
            "settings": {key: different[0] for key, different in values.items() if key not in varied},
            "varied": {key: list(dict.fromkeys(values[key])) for key in varied},
        },
    )
    failed = sum(row["status"] == "failed" for row in rows)
    print(f"{results.name}/{name}.csv: {len(rows)} jobs" + f", {failed} of them failed" * bool(failed))
    return {run: row["status"] for run, row in before.rows.items()}


@dataclass(frozen=True)
class Before:
    """What the files of an experiment have of jobs that were run elsewhere."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    shares: dict[str, list[list[float] | None]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    varied: dict[str, list[Any]] = field(default_factory=dict)
    provenance: list[dict[str, Any]] = field(default_factory=list)

    def values(self, setting: str) -> list[Any]:
        return self.varied.get(setting) or [self.settings.get(setting)] * bool(self.rows)

    @classmethod
    def read(cls, name: str, results: Path, runs: Set[str]) -> "Before":
        """Raises ValueError where one of ``runs`` is in a table of examples, which has the means of methods alone."""
        table, curves, examples = (results / f"{name}{end}.csv" for end in ("", "_curves", "_examples"))
        if not table.exists():
            return cls()
        rows, shares = {row["run"]: row for row in read_csv(table)}, dict[str, list[list[float] | None]]()
        if examples.exists():
            if twice := runs & {*rows}:
                raise ValueError(f"{examples.name} has {', '.join(sorted(twice))} already: --collect makes it anew")
            means = read_csv(examples)
            for row in rows.values():
                shares.setdefault(row["estimator"], []).append([float(mean[row["estimator"]]) for mean in means])
        about = json.loads((results / f"{name}.json").read_text())
        kept = {run: row for run, row in rows.items() if run not in runs}
        events = [event for event in (read_csv(curves) if curves.exists() else []) if event["run"] in kept]
        return cls(kept, events, shares, about["settings"], about["varied"], about["provenance"])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], first: Sequence[str], last: Sequence[str] = ()) -> None:
    """A table of rows with different columns, but for those without a value in any row."""
    given = {key for row in rows for key, value in row.items() if value not in (None, "")}
    others = dict.fromkeys(key for row in rows for key in row if key in given.difference(first, last))
    columns = [*first, *others, *last]
    ordered = sorted(rows, key=lambda row: row["run"])
    write_csv(path, [{key: row.get(key) for key in columns} for row in ordered])


def by_example(
    runs: Mapping[str, Mapping[str, Any]], before: Mapping[str, list[list[float] | None]] | None = None
) -> list[dict[str, Any]]:
    """Of each test example what it gives to a method's mean accuracy over its runs, in points, so that a method's
    column adds up to it; a run that diverged counts at chance.
    Empty where the runs did not ask for it. ``before``: of runs elsewhere."""
    shares = {method: [*found] for method, found in (before or {}).items()}
    for run, summary in runs.items():
        counts = [float(count) for count in (summary.get(RIGHT) or "").split()]
        share = [100 * summary["test/accuracy"] * count / sum(counts) for count in counts] or None
        shares.setdefault(method_of(run, summary), []).append(share)
    examples = max(len(share or ()) for found in shares.values() for share in found)
    return [
        {
            "example": place,
            **{
                name: float(f"{statistics.fmean(share[place] if share else CHANCE / examples for share in found):.4g}")
                for name, found in shares.items()
            },
        }
        for place in range(examples)
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by their names on the command line; not what is said by a group's choice, nor where it logs."""
    for key, value in config.items():
        if key in ("_target_", "wandb", "resume"):
            continue
        if isinstance(value, Mapping):
            yield from (
                (name, inner)
                for name, inner in flat(value, f"{prefix}{key}.")
                if config.get(name.split(".")[-1]) != inner
            )  # model.width is width
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
