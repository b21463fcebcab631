"""The bias of an estimator: its distance to the exact meta-gradient at the same θ and the same tasks."""

from dataclasses import dataclass

import torch

from fobmaml.engine import Learner
from fobmaml.estimators import MAML, Estimator, Exact, NotConverged, chunk_size, estimate
from fobmaml.solvers import NewtonCG
from fobmaml.tasks.batch import TaskBatch


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


def bias(estimator: Estimator, learner: Learner, tasks: TaskBatch, tol: float = 1e-8) -> Bias:
    """The bias of ``estimator`` at the model's present parameters.

    The reference is computed in float64, and is the estimator's own if it names one. Else, with λ > 0, it is the
    proximal objective's exact meta-gradient (``Exact`` at the same λ). With λ = 0 the inner problem has no unique
    minimiser, F is the objective after the solver's K steps, and the reference is its gradient, by back-propagation.
    ``tasks`` in float64, so that both see the same examples. Cost: one estimate and one exact meta-gradient.
    """
    precise = learner.in_double()
    theta = learner.theta()
    reference: Estimator
    if named := estimator.reference(tol):
        reference, name = named
    elif estimator.lam > 0:
        reference = Exact(NewtonCG(tol=tol), estimator.lam, tol)
        name = f"exact, lam={estimator.lam:g}"
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
    returned = estimate(estimator, learner, theta, tasks.to(dtype=learner.dtype), diagnose=False).gradient.double()
    norm = exact.norm()
    if norm == 0 or not torch.isfinite(norm):
        return Bias(None, None, name, f"the exact meta-gradient has norm {float(norm)}")
    relative_error = float((returned - exact).norm() / norm)
    return Bias(relative_error, float(torch.nn.functional.cosine_similarity(returned, exact, dim=0)), name,
                exact_norm=float(norm))
