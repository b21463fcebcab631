"""The bias of an estimator: its distance to the exact meta-gradient at the same θ and the same tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.engine import Learner
from fobmaml.estimators import MAML, Estimator, Exact, NotConverged, chunk_size, estimate
from fobmaml.measure.base import Event, OnValidationTasks, Training, shown
from fobmaml.solvers import NewtonCG
from fobmaml.tasks.batch import TaskBatch

DRAWS = 128
"""Of an estimator whose inner steps take batches, so many estimates are averaged: what they draw is noise, not bias."""


@dataclass(frozen=True)
class Bias:
    """``relative_error`` ‖g − ∇F‖/‖∇F‖ and ``cosine`` of g and ∇F for the mean over tasks, or None with a ``reason``.

    ``reference`` says what ∇F was, ``exact_norm`` is ‖∇F‖.
    """

    relative_error: float | None
    cosine: float | None
    reference: str
    reason: str | None = None
    exact_norm: float | None = None


def bias(estimator: Estimator, learner: Learner, tasks: TaskBatch, tol: float = 1e-8, draws: int = DRAWS) -> Bias:
    """The bias of ``estimator`` at the present parameters of the network of ``learner``.

    The reference is computed in float64, and is the estimator's own if it names one. Else, with λ > 0, it is the
    proximal objective's exact meta-gradient (``Exact`` at the same λ and with the same ``envelope``). With λ = 0 the
    inner problem has no unique minimiser, F is the objective after the solver's K steps, and the reference is its
    gradient, by back-propagation.
    ``tasks`` in float64, so that both see the same examples. Where inner steps take batches and those of the reference
    do not, the bias is that of the mean over so many ``draws``. ``tol``: the residual to which the reference is
    solved; where that is not reached, there is a ``reason`` in place of a number.
    Cost: one estimate, or so many, and one exact meta-gradient.
    Raises ValueError for tasks that the estimator or the network does not take.
    """
    precise = learner.in_double()
    theta = learner.theta()
    reference: Estimator
    if named := estimator.reference(tol):
        reference, name = named
    elif estimator.lam > 0:
        reference = Exact(NewtonCG(tol=tol), estimator.lam, tol, envelope=estimator.envelope)
        name = f"exact, lam={estimator.lam:g}" + (f", envelope={estimator.envelope:g}" if estimator.envelope else "")
    elif estimator.solver.differentiable_steps:
        reference, name = MAML(estimator.solver), "exact after the solver's steps, lam=0"
    else:
        return Bias(None, None, "none", "lam=0 and a solver without differentiable steps leave no reference")
    try:
        # In chunks that fit the cache, and so that no task waits for a slower one where the network is large.
        chunk = chunk_size(precise, tasks)
        exact = estimate(reference, precise, theta.double(), tasks.to(dtype=torch.float64), chunk, False).gradient
    except (NotConverged, ValueError) as error:  # a loss that holds float32 numbers cannot be had in float64
        return Bias(None, None, name, str(error))
    drawn = estimator.solver.takes_batches and not reference.solver.takes_batches
    returned = _mean(estimator, learner, theta, tasks.to(dtype=learner.dtype), draws if drawn else 0).double()
    norm = exact.norm()
    if norm == 0 or not torch.isfinite(norm):
        return Bias(None, None, name, f"the exact meta-gradient has norm {float(norm)}")
    return Bias(*distance(returned, exact), name, exact_norm=float(norm))


def distance(returned: Tensor, exact: Tensor) -> tuple[float, float]:
    """‖g − ∇F‖/‖∇F‖ and the cosine of the two."""
    error = (returned - exact).norm() / exact.norm()
    return float(error), float(torch.nn.functional.cosine_similarity(returned, exact, dim=0))


def _mean(estimator: Estimator, learner: Learner, theta: Tensor, tasks: TaskBatch, draws: int) -> Tensor:
    """The estimate with the tasks' own draws, or if ``draws`` the mean over so many others."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(theta)
    for each in (tasks.keyed(generator) for _ in range(draws)) if draws else [tasks]:
        total += estimate(estimator, learner, theta, each, diagnose=False).gradient
    return total / max(draws, 1)


@dataclass
class BiasMeasurement(OnValidationTasks):
    """``bias`` by ``draws``, its references solved to ``tol``, every so many meta-steps; before the first only if
    ``at_start``, or where there are none. Raises ValueError unless tol > 0 and draws ≥ 1, and as ``OnValidationTasks``
    does."""

    every: int = 300
    at_start: bool = False
    tol: float = 1e-8
    draws: int = DRAWS

    keys: ClassVar = {
        "bias/relative_error": "‖g − ∇F‖/‖∇F‖, g the estimator's meta-gradient and ∇F the exact one, same tasks",
        "bias/cosine": "of g and ∇F",
        "bias/reference": "what ∇F is",
        "bias/reason": "why there is none",
        "bias/exact_norm": "‖∇F‖",
    }
    results = ("bias/relative_error", "bias/cosine", "bias/reference", "bias/reason")
    stream = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.at_start, bool):
            raise refuse("at_start", self.at_start, "true or false")
        number("tol", self.tol, above=0.0)
        whole_number("draws", self.draws)

    def due(self, step: int, steps: int, ended: bool) -> bool:
        return super().due(step, steps, ended) and (step > 0 or steps == 0 or self.at_start)

    def __call__(self, training: Training) -> Event:
        tasks = self.sample(training).to(training.learner.device)
        found = bias(training.estimator, training.learner, tasks, self.tol, self.draws)
        return {
            "bias/relative_error": found.relative_error,
            "bias/cosine": found.cosine,
            "bias/reference": found.reference,
            "bias/reason": found.reason,
            "bias/exact_norm": found.exact_norm,
        }

    def rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        error = shown(summary, "bias/relative_error", ".3g")
        if summary["bias/relative_error"] is None:
            error += f" ({summary['bias/reason'] or 'bias.every=0'})"
        return [("bias, relative error", error), ("bias, cosine", shown(summary, "bias/cosine", ".4f"))]
