"""estimator.nu=auto against every ν of a grid, by data set, precision, solver and place: nu_rule.csv.

The error is that which ν makes: for gradient descent the distance to ``Tangent``, the limit of small ν; for
``NewtonCG`` to ``Exact``, in float64 only, because in float32 no residual of 1e-8 is reached.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Row, existing_folder
from torch import Tensor, nn
from tqdm import tqdm

from fobmaml import Learner, TaskBatch
from fobmaml.estimators import Central, Estimator, Exact, Forward, Symmetric, Tangent, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.models import MLP, CNN1d
from fobmaml.run.provenance import provenance
from fobmaml.solvers import GradientDescent, NewtonCG, Solver
from fobmaml.tasks import MNIST1D, Logistic, Sinusoid, TaskSource

ROOT = Path(__file__).parents[1]
GRID = [10.0 ** (exponent / 2) for exponent in range(-12, 1)]
KINDS: dict[str, Callable[..., Estimator]] = {"forward": Forward, "symmetric": Symmetric, "central4": Central}
CASES: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], float]] = {
    "logistic": (Logistic, lambda: MLP((10,), 2, depth=0), 0.1),
    "sinusoid, mlp 32": (Sinusoid, lambda: MLP((1,), 1, 32, 3), 0.01),
    "mnist1d, cnn 8": (MNIST1D, lambda: CNN1d((40,), 5, width=8), 0.1),
    "mnist1d, cnn 32": (MNIST1D, lambda: CNN1d((40,), 5, width=32), 0.1),
}
STEPS = 100
"""Of meta-training, to the second place."""


def sampled(source: TaskSource, count: int, seed: int, dtype: torch.dtype) -> TaskBatch:
    return source.sample("train", count, torch.Generator().manual_seed(seed)).to(dtype=dtype)


def trained(learner: Learner, source: TaskSource, solver: Solver) -> Tensor:
    theta = learner.theta()
    for step in range(STEPS):
        tasks = sampled(source, 8, step + 1, learner.dtype)
        theta = theta - 0.1 * nn.functional.normalize(
            estimate(Tangent(solver), learner, theta, tasks, diagnose=False).gradient, dim=0
        )
    return theta


def measured(case: str, place: str, tasks: int) -> list[Row]:
    make_source, make_model, lr = CASES[case]
    source, gd = make_source(), GradientDescent(10, lr)
    torch.manual_seed(0)
    single = Learner(make_model(), source.loss_fn)
    double, theta = single.in_double(), single.theta() if place == "initial" else trained(single, source, gd)
    settings: list[tuple[Learner, Solver, float]] = [(single, gd, 0.5), (double, gd, 0.5)]
    if case != "mnist1d, cnn 32":  # Newton's method takes minutes there
        settings.append((double, NewtonCG(tol=1e-8), 2.0))
    rows = []
    for learner, solver, lam in settings:
        reference = Tangent(gd, lam, "products") if solver is gd else Exact(NewtonCG(tol=1e-10), lam, 1e-10)
        batch = sampled(source, tasks, 0, torch.float64)
        wanted = estimate(reference, double, theta.double(), batch, diagnose=False).gradient
        batch, at = batch.to(dtype=learner.dtype), theta.to(learner.dtype)

        def error(estimator: Estimator) -> tuple[float, float | None]:
            found = estimate(estimator, learner, at, batch, diagnose=False)  # noqa: B023
            return float((found.gradient.double() - wanted).norm() / wanted.norm()), found.nu  # noqa: B023

        for name, kind in KINDS.items():
            errors = {nu: error(kind(solver, lam, nu))[0] for nu in GRID}
            best = min(errors, key=lambda nu: errors[nu])
            auto, nu = error(kind(solver, lam, "auto"))
            fixed, _ = error(kind(solver, lam, 0.05))
            rows.append(
                {
                    "case": case,
                    "theta": place,
                    "dtype": str(learner.dtype).removeprefix("torch."),
                    "solver": type(solver).__name__,
                    "estimator": name,
                    "best_nu": f"{best:.2g}",
                    "best_error": f"{errors[best]:.3g}",
                    "auto_nu": f"{nu:.2g}",
                    "auto_error": f"{auto:.3g}",
                    "auto_over_best": round(auto / errors[best], 2),
                    "error_at_0.05": f"{fixed:.3g}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = [(case, place) for case in CASES for place in ("initial", "trained")]
    rows = [
        row for case, place in tqdm(plan, unit="place", disable=None) for row in measured(case, place, arguments.tasks)
    ]
    write_csv(arguments.folder / "nu_rule.csv", rows)
    write_json(
        arguments.folder / "nu_rule.json",
        {"command": "python benchmarks/nu_rule.py", "tasks": arguments.tasks, "provenance": provenance()},
    )


if __name__ == "__main__":
    main()
