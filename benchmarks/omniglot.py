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
from typing import Any

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
Job = tuple[int, int, str, float, float, int]
"""Ways, shots, method, inner and outer step length, seed."""


def path_of(job: Job) -> Path:
    return RUNS / ("-".join(map(str, job)) + ".json")


def settings(job: Job) -> str:
    ways, shots, method, inner, outer, seed = job
    batches = f"solver.batch={2 * ways}" if method == "reptile" else ""
    if method in ("symmetric", "tangent"):
        batches = f"solver.batch={2 * ways if shots > 1 else 'null'} solver.query_batch={ways}"
    return (
        f"{COMMON} {METHODS[method]} solver.lr={inner} {batches} optimizer.lr={outer} seed={seed} "
        f"dataset.ways={ways} dataset.shots={shots} dataset.queries={DRAWINGS - shots}"
    )


def run(job: Job, root: str, device: str) -> None:
    """Trains and measures, and writes both down."""
    torch.set_num_threads(1)
    tuning = job[-1] == TUNING_SEED
    steps = TUNING if tuning else STEPS
    chunk = "auto" if device == "cpu" else 32  # of test tasks, which do not all fit into a GPU
    training = built(settings(job), f"steps={steps} task_chunk={chunk} dataset.root={root} device={device}")
    made = provenance(training.learner.device)
    found: dict[str, Any] = {"accuracy": None, "accuracy_ci95": None}
    try:
        for _ in training.train():
            pass
        if tuning:
            found["validation_accuracy"] = adaptation(training, TEST_STEPS, VALIDATION)[-1]
        else:
            found |= tested(training, TEST_STEPS, TEST, VALIDATION)
        diverged = False
    except Diverged:
        found |= {"validation_accuracy": 1 / job[0], "accuracy": 1 / job[0]}
        diverged = True
    names = ("ways", "shots", "method", "inner_lr", "outer_lr", "seed")
    row = (
        dict(zip(names, job, strict=True))
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
    write_json(path_of(job), {"row": row, "settings": settings(job), "provenance": made})


def row(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path_of(job).read_text())["row"]
    return found


def tuning(methods: list[str]) -> list[Job]:
    return [
        (ways, shots, method, inner, outer, TUNING_SEED)
        for ways, shots, method, inner, outer in product(WAYS, SHOTS, methods, INNER, OUTER)
    ]


def chosen(ways: int, shots: int, method: str) -> tuple[float, float]:
    """The inner and outer step length that are best on validation tasks. Raises FileNotFoundError before all were
    tried."""
    tried = [(ways, shots, method, inner, outer, TUNING_SEED) for inner, outer in product(INNER, OUTER)]
    best = max(tried, key=lambda job: float(row(job)["validation_accuracy"]))
    return best[3], best[4]


def at_their_best(methods: list[str]) -> list[Job]:
    return [
        (ways, shots, method, *chosen(ways, shots, method), seed)
        for seed, ways, shots, method in product(range(SEEDS), WAYS, SHOTS, methods)
    ]


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
    jobs = [*tuning(methods), *at_their_best(methods)]
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
