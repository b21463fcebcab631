"""The inner problem, and what a solver returns."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fobmaml.engine import Learner
from fobmaml.engine.base import Engine
from fobmaml.engine.losses import Part
from fobmaml.tasks.batch import TaskBatch


class InnerProblem:
    """The perturbed inner problems hᵣ(φ) = f̂ᵢ(φ) + νⱼ fᵢ(φ) + (λ/2)‖φ − θ‖², one row r a task i and offset j.

    ``theta`` [P] or [T, P], one a task. ``nu``: [J] offsets, each applied to every task (row r = i·J + j), or None for
    the unperturbed problem, which never touches the query set.
    """

    def __init__(self, learner: Learner, theta: Tensor, tasks: TaskBatch, lam: float, nu: Tensor | None = None):
        self.learner, self.lam = learner, lam
        offsets = 1 if nu is None else len(nu)
        self.rows = len(tasks) * offsets
        theta = theta.detach()
        if theta.dim() == 1:
            self.theta = theta.expand(self.rows, -1)  # [R, P]
        else:
            self.theta = theta.repeat_interleave(offsets, dim=0)
        if nu is None:
            self.x, targets = tasks.support_x, tasks.support_y
            parts = [Part(slice(None), 1.0, "support_y")]
        else:
            self.x = torch.cat([tasks.support_x, tasks.query_x], dim=1).repeat_interleave(offsets, dim=0)
            targets = torch.cat([tasks.support_y, tasks.query_y], dim=1).repeat_interleave(offsets, dim=0)
            support = tasks.support_x.shape[1]
            parts = [
                Part(slice(support), 1.0, "support_y"),
                Part(slice(support, None), nu.repeat(len(tasks)), "query_y"),
            ]
        self.loss = learner.row_loss(targets, parts)

    def engine(self, second_order: bool = False) -> Engine:
        """Of f̂ + ν f, the problem without its proximal term. Support and query are one pass."""
        return self.learner.engine_for(self.x, self.loss, second_order)

    def gradient(self, phi: Tensor) -> Tensor:
        """∇hᵣ at each row: [R, P] -> [R, P]."""
        return self.engine().gradient(phi) + self.lam * (phi - self.theta)

    def objective(self, phi: Tensor) -> Tensor:
        """hᵣ at each row: [R, P] -> [R]."""
        return self.engine().loss(phi) + 0.5 * self.lam * (phi - self.theta).square().sum(1)

    def linearize(self, phi: Tensor, engine: Engine | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """∇hᵣ(φᵣ) and v ↦ ∇²hᵣ(φᵣ) vᵣ for all rows, each [R, P] -> [R, P].

        ``engine``: for several calls one, so that they share its memory; by default one of their own.
        """
        gradient, hvp = (engine or self.engine(second_order=True)).linearize(phi)
        return (
            torch.add(gradient, phi - self.theta, alpha=self.lam),
            lambda v: torch.add(hvp(v), v, alpha=self.lam),
        )


RESULTS = ("converged", "out of steps", "negative curvature", "diverged")


@dataclass(frozen=True)
class Solution:
    """Where a solver stopped: ``displacement`` φ − θ [R, P], and what it took there.

    ``gradients``, ``hessian_products`` [R]: taken by each row, None for a solver that does not say. ``tol``: the
    residual that the solver was to reach, 0 if it takes a number of steps. ``negative_curvature`` [R]: whether a row's
    last step met it.
    """

    problem: InnerProblem
    displacement: Tensor
    gradients: Tensor | None = None
    hessian_products: Tensor | None = None
    tol: float = 0.0
    negative_curvature: Tensor | None = None

    @cached_property
    def phi(self) -> Tensor:
        """[R, P]."""
        return self.problem.theta + self.displacement

    @cached_property
    def residual(self) -> Tensor:
        """‖∇hᵣ(φᵣ)‖, [R]. Costs one gradient a row, spent only if somebody reads it."""
        return self.problem.gradient(self.phi).norm(dim=1)

    @property
    def result(self) -> list[str]:
        """Of each row, one of ``RESULTS``. Costs ``residual``."""
        number = torch.where(self.residual <= self.tol, 0, 1)
        if self.negative_curvature is not None:
            number = torch.where((number == 1) & self.negative_curvature, 2, number)
        return [RESULTS[n] for n in torch.where(self.residual.isfinite(), number, 3).tolist()]
