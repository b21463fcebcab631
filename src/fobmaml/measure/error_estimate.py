"""An estimate of an estimator's bias that takes no exact solve and no second derivative."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine import Learner
from fobmaml.estimators import Estimator, FiniteDifference, Tangent, chunk_size, estimate
from fobmaml.measure.base import Event, OnValidationTasks, Training, shown
from fobmaml.solvers import Descent, Iterative, Solver
from fobmaml.tasks.batch import TaskBatch

ROUNDING = 1e-9
"""Relative differences of estimates in float64 that are none."""


@dataclass(frozen=True)
class ErrorEstimate:
    """Of ‖g − ∇F‖/‖∇F‖ for the mean over tasks: ``relative``, and the shares of ν with rounding (``nu``) and of the
    inner solver (``solver``) by themselves; or None with a ``reason``."""

    relative: float | None
    nu: float | None
    solver: float | None
    reason: str | None = None


def error_estimate(estimator: Estimator, learner: Learner, tasks: TaskBatch) -> ErrorEstimate:
    """The bias on ``tasks`` of an ``estimator`` that is a finite difference of solutions, or ``Tangent``, from
    estimates of more precision, at the present parameters of the network of ``learner``.

    In float64, with g_K(ν) the estimate at the solver's own precision K, against the g that was returned:

    - ν and rounding: g less the limit at ν = 0 by Richardson's extrapolation,
      g_K(ν/2) + (g_K(ν/2) − g_K(ν)) / (2^p − 1);
    - the solver, if it takes K steps: those of 2K and 4K steps (of all examples) give d₁ = g_2K − g_K and
      d₂ = g_4K − g_2K. An error that shrinks by x in K steps has ‖d₂‖/‖d₁‖ = x(1 + x), and g_∞ ≈ g_2K + d₂ / (1 − x²);
    - the solver, if it goes on to a residual of ``tol``: the difference to an estimate at a hundredth of that.

    What it cannot see: an error in directions in which 4K steps hardly move does not show, and the estimate is too
    small; where d₂ is twice d₁ no limit is in sight, and there is none. Nor that the solver tends to another minimum
    than the reference of ``bias``. Cost: with K steps that of eight estimates in float64.
    Raises ValueError for other estimators.
    """
    _check(estimator)
    precise, theta = learner.in_double(), learner.theta()
    chunk = chunk_size(precise, tasks, estimator)
    settled = estimator.settled(learner, theta, learner.check(tasks.to(dtype=learner.dtype)))
    returned = estimate(settled, learner, theta, tasks.to(dtype=learner.dtype), chunk, diagnose=False).gradient.double()

    def in_double(solver: Solver, part: float = 1.0) -> Tensor:
        other = copy(settled)
        other.solver = solver
        if isinstance(settled.nu, float):
            other.nu = part * settled.nu
        return estimate(other, precise, theta.double(), tasks.to(dtype=torch.float64), chunk, diagnose=False).gradient

    solver = estimator.solver
    own = in_double(solver)
    limit = own
    if isinstance(settled, FiniteDifference):
        half = in_double(solver, 0.5)
        limit = half + (half - own) / (2.0**settled.order - 1.0)
    if isinstance(solver, Descent):
        twice, four = in_double(longer(solver, 2)), in_double(longer(solver, 4))
        first, second = twice - own, four - twice
        ratio = float(second.norm() / first.norm())
        if second.norm() <= ROUNDING * own.norm():  # solved, and what more steps do is random
            ratio = 0.0
        if not ratio < 2.0:
            return ErrorEstimate(
                None, float((returned - limit).norm() / limit.norm()), None, "more steps do not settle"
            )
        x = ((1.0 + 4.0 * ratio) ** 0.5 - 1.0) / 2.0
        solved = first + second / (1.0 - x**2)
    elif isinstance(solver, Iterative):
        finer = copy(solver)
        finer.tol = solver.tol / 100.0
        solved = in_double(finer) - own
    else:
        return ErrorEstimate(None, float((returned - limit).norm() / limit.norm()), None, "no more precise solver")
    norm = (limit + solved).norm()
    total, of_nu, of_solver = (
        float(error.norm() / norm) for error in (returned - limit - solved, returned - limit, solved)
    )
    return ErrorEstimate(total, of_nu, of_solver)


def longer(solver: Descent, times: int) -> Descent:
    """So many times the steps, at the same rates, each repeated where they differ, and on all examples."""
    longer = copy(solver)
    longer.steps = times * solver.steps
    if isinstance(solver.rates, Tensor):
        longer.rates = solver.rates.repeat_interleave(times, dim=0)
    else:
        longer.rates = [rate for rate in solver.rates for _ in range(times)]
    longer.batch = longer.query_batch = None
    return longer


def _check(estimator: Estimator) -> None:
    if not isinstance(estimator, FiniteDifference | Tangent):
        raise refuse(
            "estimator", type(estimator).__name__, "forward, symmetric, central4 or tangent, for an error estimate"
        )


@dataclass
class ErrorEstimateMeasurement(OnValidationTasks):
    """``error_estimate`` of the run's estimator, every so many meta-steps, on the first of the tasks of ``bias``.

    Raises ValueError for estimators that have none."""

    tasks: int = 1

    keys: ClassVar = {
        "bias/estimate": "estimate of bias/relative_error without an exact solve (measure.error_estimate)",
        "bias/estimate_nu": "the share of ν and of rounding",
        "bias/estimate_solver": "the share of the inner solver",
        "bias/estimate_reason": "why there is none",
    }
    stream = 1

    def check(self, training: Training) -> None:
        super().check(training)
        if self.every:
            _check(training.estimator)

    def __call__(self, training: Training) -> Event:
        tasks = self.sample(training).to(training.learner.device)
        found = error_estimate(training.estimator, training.learner, tasks)
        return {
            "bias/estimate": found.relative,
            "bias/estimate_nu": found.nu,
            "bias/estimate_solver": found.solver,
            "bias/estimate_reason": found.reason,
        }

    def rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        if not self.every:
            return []
        return [("bias, estimated without an exact solve", shown(summary, "bias/estimate", ".3g"))]
