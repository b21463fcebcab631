"""Few-shot learning of classes that training has not seen: shapes1d, 5-way 5-shot 15-query, width 32, one thread.

    python benchmarks/novel_classes.py

Each method with settings that were at hand from MNIST-1D, meta-trained on 64 classes and tested on 20 others, beside
what the support set alone gives: the same network trained from its initial weights on each test task, by Adam. The
steps at test time, of all of them, are the best of a few on validation tasks. Into results/: novel_classes.csv and
.json. ``cpu_seconds`` is what the process has computed in meta-training, ``seconds`` how long that took.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
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
COMMON = "dataset=shapes1d width=32 device=cpu measure=[] eval.validation_tasks=0 eval.tasks=0"
METHODS = {
    "symmetric": "estimator=symmetric solver=gd_few task_clip=1 optimizer.lr=0.3 meta_batch=16 steps=3000",
    "reptile": "estimator=reptile optimizer.lr=0.3 meta_batch=8 steps=6000",
    "maml": "estimator=maml task_clip=1 optimizer=sngdm optimizer.lr=0.3 meta_batch=8 steps=1500",
}
STEPS = (10, 20, 50)
"""Of gradient descent at test time, those of training and more."""
SCRATCH = "estimator=fomaml solver=adam solver.lr=0.01 steps=0"
SCRATCH_STEPS = (20, 50, 100)
TASKS = 400


def built(settings: str, *more: str) -> MetaTraining:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return build(compose("train", [*COMMON.split(), *settings.split(), *more]))


def tested(training: MetaTraining, steps: tuple[int, ...], tasks: int) -> dict[str, Any]:
    """On test tasks, with as many steps as are best on validation tasks."""

    def scored(split: Split, count: int) -> Score:
        return score(training, training.fixed(split, count))

    found: dict[int, float] = {}
    for count in steps:
        adapt(training, count)
        found[count] = scored("validation", tasks // 2).accuracy or 0.0
    best = max(found, key=lambda count: found[count])
    adapt(training, best)
    result = scored("test", tasks)
    return {
        "test_steps": best,
        "validation_accuracy": round(found[best], 4),
        "accuracy": round(result.accuracy or 0.0, 4),
        "accuracy_ci95": round(result.accuracy_ci95 or 0.0, 4),
    }


def adapt(training: MetaTraining, steps: int) -> None:
    """From now on by so many steps, on all of the support set."""
    solver = training.estimator.solver
    lr = 0.1 if not isinstance(solver, Descent) or not isinstance(solver.lr, float) else solver.lr
    kind = Adam if isinstance(solver, Adam) else GradientDescent
    training.adapting = training.estimator.adapting(Adaptation(kind(steps, lr)))


def rows_of(method: str, seed: int, tasks: int) -> list[dict[str, Any]]:
    """Of a method, before and after meta-training; or of the support sets alone."""
    scratch = method not in METHODS
    training = built(SCRATCH if scratch else METHODS[method], f"seed={seed}")
    steps = SCRATCH_STEPS if scratch else STEPS
    rows = [{"method": method if scratch else f"{method}, untrained", **tested(training, steps, tasks)}]
    spent = [0.0]
    if not scratch:
        started = time.process_time()
        for _ in training.train():
            pass
        spent.append(time.process_time() - started)
        rows.append({"method": method, **tested(training, steps, tasks)})
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
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--methods", nargs="+", default=["from scratch", *METHODS])
    parser.add_argument("--folder", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    made = provenance()
    rows: list[dict[str, Any]] = []
    plan = [(seed, method) for seed in range(arguments.seeds) for method in arguments.methods]
    for seed, method in tqdm(plan, unit="run", disable=None):
        rows += rows_of(method, seed, arguments.tasks)
        print(rows[-1], flush=True)
        write_csv(arguments.folder / "novel_classes.csv", rows)
        write_json(
            arguments.folder / "novel_classes.json",
            {
                "command": f"python benchmarks/novel_classes.py --seeds {arguments.seeds} --tasks {arguments.tasks}",
                "common": COMMON,
                "methods": METHODS | {"from scratch": SCRATCH},
                "provenance": made,
            },
        )


if __name__ == "__main__":
    main()
