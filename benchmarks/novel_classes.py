"""Few-shot learning of classes that training has not seen, 5-way 5-shot 15-query, width 32, one thread.

    python benchmarks/novel_classes.py                                  # shapes1d: 64 classes to train, 20 to test
    python benchmarks/novel_classes.py --data omniglot --root FILE.npz  # Conv4; 700 characters to train, 164 to test

Each method with settings that were at hand, beside what the support set alone gives: the same network trained from its
initial weights on each test task, by Adam. The steps at test time, and whether they are with the proximal term of
training or without one (λ = 0), are the best of a few on validation tasks. Into results/: novel_classes.csv or
novel_omniglot.csv, and .json. ``cpu_seconds`` is what the process has computed in meta-training, ``seconds`` how long
that took.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from timing import existing_folder
from tqdm import tqdm

from fobmaml.estimators.base import Adaptation
from fobmaml.files import write_csv, write_json
from fobmaml.measure.accuracy import Score, score
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.build import build
from fobmaml.run.provenance import provenance
from fobmaml.solvers import Adam, Descent, GradientDescent
from fobmaml.tasks import Split
from fobmaml.training import MetaTraining

ROOT = Path(__file__).parents[1]
COMMON = "width=32 device=cpu measure=[] eval.validation_tasks=0 eval.tasks=0"
SHAPES = {
    "symmetric": "estimator=symmetric solver=gd_few task_clip=1 optimizer.lr=0.3 meta_batch=16 steps=3000",
    "reptile": "estimator=reptile optimizer.lr=0.3 meta_batch=8 steps=6000",
    "maml": "estimator=maml task_clip=1 optimizer=sngdm optimizer.lr=0.3 meta_batch=8 steps=1500",
}
CHARACTERS = {
    "symmetric": "estimator=symmetric estimator.lam=0.1 solver=gd_few task_clip=0.3 optimizer.lr=0.3 meta_batch=8 "
    "steps=1200",
    "reptile": "estimator=reptile solver.steps=8 solver.lr=0.1 optimizer.lr=0.3 meta_batch=8 steps=3000",
}
DATA = {"shapes1d": ("novel_classes", SHAPES), "omniglot": ("novel_omniglot", CHARACTERS)}
STEPS = (10, 20, 50)
"""Of gradient descent at test time, those of training and more."""
SCRATCH = "estimator=fomaml solver=adam solver.lr=0.01 steps=0"
SCRATCH_STEPS = (20, 50, 100)
TASKS = 400


def built(*settings: str) -> MetaTraining:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return build(compose("train", [each for some in settings for each in some.split()]))


def scored(training: MetaTraining, split: Split, count: int) -> Score:
    return score(training, training.fixed(split, count))


def adaptation(training: MetaTraining, steps: tuple[int, ...], tasks: int) -> tuple[int, float, float]:
    """The steps and the λ that are best on so many validation tasks, and the accuracy there."""
    found: dict[tuple[int, float], float] = {}
    for count, lam in product(steps, dict.fromkeys((training.estimator.lam, 0.0))):
        adapt(training, count, lam)
        found[count, lam] = scored(training, "validation", tasks).accuracy or 0.0
    best = max(found, key=lambda each: found[each])
    return *best, found[best]


def tested(training: MetaTraining, steps: tuple[int, ...], tasks: int, validation_tasks: int) -> dict[str, Any]:
    """On test tasks, with as many steps and the λ that are best on validation tasks."""
    count, lam, validation = adaptation(training, steps, validation_tasks)
    adapt(training, count, lam)
    result = scored(training, "test", tasks)
    return {
        "test_steps": count,
        "test_lam": lam,
        "validation_accuracy": round(validation, 4),
        "accuracy": round(result.accuracy or 0.0, 4),
        "accuracy_ci95": round(result.accuracy_ci95 or 0.0, 4),
    }


def adapt(training: MetaTraining, steps: int, lam: float) -> None:
    """From now on by so many steps with λ, on all of the support set."""
    solver = training.estimator.solver
    lr = 0.1 if not isinstance(solver, Descent) or not isinstance(solver.lr, float) else solver.lr
    kind = Adam if isinstance(solver, Adam) else GradientDescent
    training.adapting = training.estimator.adapting(Adaptation(kind(steps, lr), lam))


def rows_of(method: str, settings: str | None, common: str, seed: int, tasks: int) -> list[dict[str, Any]]:
    """Of a method, before and after meta-training; or, without ``settings``, of the support sets alone."""
    scratch = settings is None
    training = built(common, settings or SCRATCH, f"seed={seed}")
    steps = SCRATCH_STEPS if scratch else STEPS
    rows = [{"method": method if scratch else f"{method}, untrained", **tested(training, steps, tasks, tasks // 2)}]
    spent = [0.0]
    if not scratch:
        started = time.process_time()
        for _ in tqdm(training.train(), method, training.settings.steps, unit="step", disable=None, leave=False):
            pass
        spent.append(time.process_time() - started)
        rows.append({"method": method, **tested(training, steps, tasks, tasks // 2)})
    for row, cpu in zip(rows, spent, strict=True):
        row |= {
            "seed": seed,
            "steps": training.step if cpu else 0,
            "seconds": round(training.train_seconds if cpu else 0.0, 1),
            "cpu_seconds": round(cpu, 1),
            "example_gradients": round(training.work.example_gradients) if cpu else 0,
            "hessian_products": training.work.hessian_products if cpu else 0,
            "parameters": training.learner.parameter_count,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), default="shapes1d")
    parser.add_argument("--root", help="omniglot: as dataset.root")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    made = provenance()
    table, methods = DATA[arguments.data]
    about = f"dataset={arguments.data} {COMMON}"
    common = about + (f" dataset.root={arguments.root}" if arguments.root else "")
    rows: list[dict[str, Any]] = []
    plan = [
        (seed, method) for seed in range(arguments.seeds) for method in arguments.methods or ["from scratch", *methods]
    ]
    for seed, method in tqdm(plan, unit="run", disable=None):
        rows += rows_of(method, methods.get(method), common, seed, arguments.tasks)
        print(rows[-1], flush=True)
        write_csv(arguments.folder / f"{table}.csv", rows)
        write_json(
            arguments.folder / f"{table}.json",
            {
                "command": f"python benchmarks/novel_classes.py --data {arguments.data} --seeds {arguments.seeds} "
                f"--tasks {arguments.tasks}",
                "common": about,
                "methods": methods | {"from scratch": SCRATCH},
                "provenance": made,
            },
        )


if __name__ == "__main__":
    main()
