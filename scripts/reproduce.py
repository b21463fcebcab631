"""Runs the experiments behind results/ and collects them: python scripts/reproduce.py [experiment ...]

An experiment is a sweep, configs/experiment/NAME.yaml, its jobs below outputs/experiments/NAME. A job that is complete
is not run again, one that was stopped continues. ``--collect``: only collect what is there. ``--fast``: smaller sweeps,
below outputs/fast, which leave results/ alone. The exit status says whether every job of every sweep is there.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from statistics_of_runs import CHANCE
from tqdm import tqdm

from fobmaml.files import write_csv, write_json
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
    "inner_steps": f"tuned=symmetric,maml steps=60 seed=0,1 solver.steps=5,10 eval.tasks=100 {TRAINING}",
    "memory": "width=25,100,250 solver.steps=10",
    "memory_steps": "solver.steps=1,10,50",
    "memory_depth": "depth=2,6",
    "memory_deep": "depth=3,6 width=32 solver.steps=5,10",
    "memory_transformer": "depth=2 width=32 dataset.dimension=16,64 solver.steps=5,10",
    "bias_floor": "solver.delta=1e-6,1e-3",
    "bias_delta": "solver.delta=1e-6,1e-3 estimator.nu=1e-3,1e-2,0.1,0.3",
    "bias_steps": "solver.steps=5,20,100",
    "bias_map": f"steps=20 seed=0 estimator.lam=0.5 solver.steps=5,10 estimator.nu=0.05 {PARTS}",
    "nu": "estimator=symmetric estimator.nu=1e-4,1e-2,1.0",
    "smoothness": "steps=100 seed=0",
    "smoothness_logistic": "steps=100 seed=0",
    "optimizers": "steps=30 seed=0 optimizer.lr=0.01,0.1,1.0",
    "convergence": "steps=100",
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
    ended = {} if arguments.collect else sweep(overrides, outputs, arguments.jobs)
    wrong = []
    for name in names:
        collect(name, outputs / name, outputs if arguments.fast else ROOT / "results")
        wrong += faults(name, jobs_of(name, overrides[name]), outputs / name, ended.get(name, 0))
    if wrong:
        sys.exit("\n".join(f"error: {fault}" for fault in wrong))


def jobs_of(name: str, overrides: Sequence[str]) -> list[frozenset[str]]:
    """The settings of each job of a sweep, as Hydra's sweeper makes them of its file and the command line."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        sweeper = compose("train", [f"experiment={name}"], return_hydra_config=True).hydra.sweeper
    swept = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*swept, f"experiment={name}", *overrides])
    return [frozenset(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def faults(name: str, jobs: Sequence[frozenset[str]], folder: Path, status: int = 0) -> list[str]:
    """Says how many of the jobs are there, and returns what is wrong: jobs that are not, and a sweep's exit status that
    no diverged run explains. One that diverged is there."""
    there, diverged, failed = set(), 0, []
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


def collect(name: str, folder: Path, results: Path) -> None:
    """Writes NAME.csv (a row a job: the settings that were swept or differ, what was measured), NAME_curves.csv (what
    was measured during training, by step) and NAME.json (provenance and common settings)."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))}
    runs = {run: summary for run, summary in runs.items() if summary["status"] != "interrupted"}
    if not runs:
        print(f"{name}: no run is complete")
        return
    settings = {run: summary["choices"] | dict(flat(summary["config"])) for run, summary in runs.items()}
    known = dict.fromkeys(key for found in settings.values() for key in found)
    swept = {part.split("=")[0] for run in runs for part in run.split(",")} - {"estimator"}
    varied = [
        key
        for key in known
        if key in swept or (key != "estimator" and len({json.dumps(found.get(key)) for found in settings.values()}) > 1)
    ]
    measured = [
        key
        for key in dict.fromkeys(key for summary in runs.values() for key in summary)
        if "/" in key
        and not key.startswith(NOT_IN_TABLES)
        and any(summary.get(key) is not None for summary in runs.values())
    ]
    write_csv(
        results / f"{name}.csv",
        [
            {
                "run": run,
                "estimator": method_of(run, summary),
                **{key: settings[run].get(key) for key in varied},
                "status": summary["status"],
                "step": summary["step"],
                "seconds": summary["seconds"],
                **{key: summary.get(key) if summary["status"] == "completed" else None for key in measured},
                "reason": (summary.get("reason") or "").split(":")[0],
            }
            for run, summary in runs.items()
        ],
    )
    curves = [
        {
            "run": run,
            "estimator": method_of(run, summary),
            **{key: settings[run].get(key) for key in varied},
            **event,
        }
        for run, summary in runs.items()
        for event in read_events(folder / run / "metrics.jsonl")
        if any(map(of_a_curve, event))
    ]
    if any(row["step"] for row in curves):
        columns = dict.fromkeys(
            key for row in curves for key in row if key in ("run", "estimator", "step", *varied) or of_curves(key)
        )
        write_csv(results / f"{name}_curves.csv", [{key: row.get(key) for key in columns} for row in curves])
    if parts := by_example(runs):
        write_csv(results / f"{name}_examples.csv", parts)
    first = settings[next(iter(settings))]
    write_json(
        results / f"{name}.json",
        {
            "command": f"make reproduce ARGS={name}",
            "jobs": len(runs),
            "seconds": round(sum(summary["seconds"] for summary in runs.values())),
            "provenance": distinct([summary["provenance"] for summary in runs.values()]),
            "settings": {key: value for key, value in first.items() if key not in varied},
            "varied": {key: list(dict.fromkeys(found.get(key) for found in settings.values())) for key in varied},
        },
    )
    failed = sum(summary["status"] == "failed" for summary in runs.values())
    print(f"{results.name}/{name}.csv: {len(runs)} jobs" + f", {failed} of them failed" * bool(failed))


def by_example(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each test example what it gives to a method's mean accuracy over its runs, in points, so that a method's
    column adds up to it; a run that diverged counts at chance. Empty where the runs did not ask for it."""
    shares: dict[str, list[list[float] | None]] = {}
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
