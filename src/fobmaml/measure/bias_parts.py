"""Where a bias is from: ν, a trajectory that is no solution, or inner steps that have not arrived."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fobmaml.arguments import number, refuse
from fobmaml.engine import Learner
from fobmaml.estimators import MAML, Estimator, Exact, NotConverged, Tangent, chunk_size, estimate
from fobmaml.measure.base import Event, OnValidationTasks, Training
from fobmaml.measure.bias import distance
from fobmaml.solvers import NewtonCG, Solver
from fobmaml.tasks.batch import TaskBatch


def references(solver: Solver, lam: float, tol: float = 1e-8) -> Mapping[str, Estimator]:
    """What an estimator with ``solver`` and λ > 0 is compared with: ``tangent``, its limit as ν → 0; ``steps``, the
    gradient of the objective after the solver's K steps at the same λ; ``exact``, that of the proximal objective,
    solved to ``tol``. Raises ValueError for a solver or a λ that one of them does not take."""
    if not lam > 0:
        raise refuse("lam", lam, "a number above 0: without a proximal term there is no exact meta-gradient")
    return {
        "tangent": Tangent(solver, lam),
        "steps": MAML(solver, lam),
        "exact": Exact(NewtonCG(tol=tol), lam, tol),
    }


def bias_parts(estimator: Estimator, learner: Learner, tasks: TaskBatch, tol: float = 1e-8) -> Event:
    """Relative error and cosine of the meta-gradient that ``estimator`` returns, to each of its ``references`` in
    float64, and to itself: of the two halves of the ``tasks``, the noise between batches of half as many.

    At the present parameters of the network of ``learner``; ``tol``: the residual to which the exact reference is
    solved. None for ``exact`` where it was not found. Cost: two estimates and one of each reference.
    """
    precise, theta = learner.in_double(), learner.theta()
    tasks = tasks.to(dtype=torch.float64)

    def mean(of: Estimator, by: Learner, some: TaskBatch) -> Tensor:
        return estimate(of, by, theta.to(by.dtype), some.to(dtype=by.dtype), chunk_size(by, some), False).gradient

    half = len(tasks) // 2
    one, other = (mean(estimator, learner, some).double() for some in (tasks[:half], tasks[half : 2 * half]))
    event: Event = {}
    found: dict[str, tuple[float | None, float | None]] = {"noise": distance(other, one)}
    returned = (one + other) / 2
    for name, reference in references(estimator.solver, estimator.lam, tol).items():
        try:
            found[name] = distance(returned, mean(reference, precise, tasks[: 2 * half]))
        except NotConverged:
            found[name] = None, None
    for name, (error, cosine) in found.items():
        event |= {f"bias_parts/{name}_error": error, f"bias_parts/{name}_cosine": cosine}
    return event


_WHAT = {
    "tangent": "the limit as ν → 0: what ν does",
    "steps": "the gradient of the objective after the solver's steps, at the same λ",
    "exact": "the exact meta-gradient at the same λ",
    "noise": "the same estimate from as many other tasks, half of those measured",
}


@dataclass
class BiasPartsMeasurement(OnValidationTasks):
    """``bias_parts``, to ``tol``, every so many meta-steps, before the first too. Raises ValueError unless tol > 0 and
    tasks ≥ 2, for inner steps on batches and for an ``envelope``."""

    every: int = 0
    tasks: int = 64
    tol: float = 1e-8

    keys: ClassVar = {
        f"bias_parts/{name}_{kind}": f"{said} {what}"
        for name, what in _WHAT.items()
        for kind, said in (("error", "relative error of the estimate to"), ("cosine", "its cosine with"))
    }
    stream = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        number("tol", self.tol, above=0.0)
        if self.tasks < 2:
            raise refuse("tasks", self.tasks, "a whole number of at least 2")

    def check(self, training: Training) -> None:
        super().check(training)
        if not self.every:
            return
        references(training.estimator.solver, training.estimator.lam, self.tol)
        if training.estimator.envelope:
            raise refuse("bias_parts.every", self.every, "an estimator with envelope=0, or 0 for never")
        if training.estimator.solver.takes_batches:
            raise refuse("bias_parts.every", self.every, "inner steps on all examples, or 0 for never")

    def __call__(self, training: Training) -> Event:
        tasks = self.sample(training).to(training.learner.device)
        return bias_parts(training.estimator, training.learner, tasks, self.tol)
