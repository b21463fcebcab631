"""Omniglot, characters that training has not seen: 5 and 20 ways, 1 and 5 shots, Conv4 of 32 channels.

    python benchmarks/omniglot.py run --root FILE.npz [--device cuda] [--jobs 8]
    python benchmarks/omniglot.py collect

700 characters of the background set to train, 164 to test (configs/dataset/omniglot.yaml); ten drawings of a character
in a task. The rule, written before the runs: every method has STEPS meta-steps of TASKS tasks. Of its inner and outer
step lengths those are taken that are best on validation tasks after TUNING meta-steps with the seed 100, and run with
seeds 0 to SEEDS − 1. The steps at test time, and whether they are with the proximal term of training or without one
(λ = 0), are the best of a few on validation tasks. Test tasks are looked at once.

A run that is there, below outputs/omniglot, is not run again. Into results/: omniglot.csv, with what was tuned, and
omniglot.json.
"""

import argparse
import json
import os
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from novel_classes import ROOT, adaptation, built, tested
from tqdm import tqdm

from fobmaml.files import write_csv, write_json
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.provenance import distinct, provenance
from fobmaml.training import Diverged

RUNS = ROOT / "outputs" / "omniglot"
STEPS, TUNING, TASKS, SEEDS = 1000, 200, 8, 3
WAYS, SHOTS, DRAWINGS = (5, 20), (1, 5), 10
COMMON = (
    "dataset=omniglot width=32 measure=[] eval.validation_tasks=0 eval.tasks=0 optimizer=sngdm task_clip=1 "
    f"meta_batch={TASKS}"
)
METHODS = {
    "symmetric": "estimator=symmetric estimator.lam=0.1 solver=gd_few",
    "tangent": "estimator=tangent estimator.lam=0.1 solver=gd_few",
    "maml": "estimator=maml solver.steps=5",
    "fomaml": "estimator=fomaml solver.steps=5",
    "reptile": "estimator=reptile solver.steps=8",
}
INNER, OUTER = (0.1, 0.3), (0.1, 0.3)
"""Step lengths, of which each method takes the best pair."""
TEST_STEPS = (5, 10, 20)
VALIDATION, TEST = 100, 400
TUNING_SEED = 100
RESULTS = ("test_steps", "test_lam", "validation_accuracy", "accuracy", "accuracy_ci95")
"""Columns of every row, of what is tuned without those of test tasks."""


class Job(NamedTuple):
    """A run: its task, its method and what is tuned, the inner and the outer step length."""

    ways: int
    shots: int
    method: str
    inner_lr: float
    outer_lr: float
    seed: int


def path_of(job: Job) -> Path:
    return RUNS / ("-".join(map(str, job)) + ".json")


def settings(job: Job) -> str:
    batches = f"solver.batch={2 * job.ways}" if job.method == "reptile" else ""
    if job.method in ("symmetric", "tangent"):
        batches = f"solver.batch={2 * job.ways if job.shots > 1 else 'null'} solver.query_batch={job.ways}"
    return (
        f"{COMMON} {METHODS[job.method]} solver.lr={job.inner_lr} {batches} optimizer.lr={job.outer_lr} "
        f"seed={job.seed} dataset.ways={job.ways} dataset.shots={job.shots} dataset.queries={DRAWINGS - job.shots}"
    )


def run(job: Job, root: str, device: str) -> None:
    """Trains and measures, and writes both down."""
    torch.set_num_threads(1)
    only_tuned = job.seed == TUNING_SEED
    given, steps = settings(job), TUNING if only_tuned else STEPS
    chunk = "auto" if device == "cpu" else 32  # of test tasks, which do not all fit into a GPU
    training = built(given, f"steps={steps} task_chunk={chunk} dataset.root={root} device={device}")
    made = provenance(training.learner.device)
    found: dict[str, Any] = dict.fromkeys(RESULTS)
    try:
        for _ in training.train():
            pass
        if only_tuned:
            found["validation_accuracy"] = adaptation(training, TEST_STEPS, VALIDATION)[-1]
        else:
            found |= tested(training, TEST_STEPS, TEST, VALIDATION)
        diverged = False
    except Diverged:
        found |= {"validation_accuracy": 1 / job.ways, "accuracy": 1 / job.ways}
        diverged = True
    row = (
        job._asdict()
        | found
        | {
            "diverged": diverged,
            "steps": training.step,
            "seconds": round(training.train_seconds, 1),
            "example_gradients": round(training.work.example_gradients),
            "hessian_products": training.work.hessian_products,
            "parameters": training.learner.parameter_count,
        }
    )
    write_json(path_of(job), {"row": row, "settings": given, "provenance": made})


def tuning(methods: list[str]) -> list[Job]:
    return [
        Job(ways, shots, method, inner, outer, TUNING_SEED)
        for ways, shots, method, inner, outer in product(WAYS, SHOTS, methods, INNER, OUTER)
    ]


def at_their_best(methods: list[str]) -> list[Job]:
    """With the step lengths that are best on validation tasks, seed by seed. Raises FileNotFoundError before all were
    tried."""
    best: dict[tuple[int, int, str], tuple[float, Job]] = {}
    for job in tuning(methods):
        accuracy = float(json.loads(path_of(job).read_text())["row"]["validation_accuracy"])
        if job[:3] not in best or accuracy > best[job[:3]][0]:
            best[job[:3]] = accuracy, job
    return [job._replace(seed=seed) for seed in range(SEEDS) for _, job in best.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "collect"))
    parser.add_argument("--root", help="as dataset.root: a folder, or an .npz file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, on one core each")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    if arguments.what == "run":
        if arguments.root is None:
            parser.error("--root: takes where Omniglot's drawings are")
        RUNS.mkdir(parents=True, exist_ok=True)
        root = str(Path(arguments.root).resolve())
        with get_context("spawn").Pool(arguments.jobs, keep_freed_memory) as pool:
            for jobs_of in (tuning, at_their_best):
                missing = [job for job in jobs_of(arguments.methods) if not path_of(job).exists()]
                done = pool.imap_unordered(partial(run, root=root, device=arguments.device), missing)
                for _ in tqdm(done, jobs_of.__name__, len(missing), unit="run", disable=None):
                    pass
    collect(arguments.methods)


def collect(methods: list[str]) -> None:
    jobs = [*tuning(methods)]
    if all(path_of(job).exists() for job in jobs):
        jobs += at_their_best(methods)
    there = [json.loads(path_of(job).read_text()) for job in jobs if path_of(job).exists()]
    write_csv(ROOT / "results" / "omniglot.csv", [each["row"] for each in there])
    write_json(
        ROOT / "results" / "omniglot.json",
        {
            "command": "python benchmarks/omniglot.py run --root omniglot28.npz",
            "common": COMMON,
            "methods": METHODS,
            "provenance": distinct([each["provenance"] for each in there]),
        },
    )
    if len(there) < len(jobs):
        raise SystemExit(f"error: {len(jobs) - len(there)} of {len(jobs)} runs are missing")


if __name__ == "__main__":
    main()
