"""What a solver is, and the loop of those that iterate."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fobmaml.solvers.problem import InnerProblem, Solution


class Solver(ABC):
    """Solves every row of an inner problem from θ, so that all offsets of a stencil share one trajectory.

    To add one, subclass ``Iterative`` and say how it steps, or this and implement ``solve``: it starts every row at
    ``problem.theta`` and moves all parameters towards the minimiser of h, the same way for every row, without random
    numbers of its own. One that leaves parameters where they were is refused by the estimators that differentiate the
    solution. With ``unroll`` too, and ``differentiable_steps`` True, MAML can back-propagate through it.
    """

    differentiable_steps = False
    batch: int | None = None
    """How many support examples each step takes, None: all."""
    query_batch: int | None = None

    @property
    def takes_batches(self) -> bool:
        """Whether its steps take batches, by the keys of the tasks."""
        return bool(self.batch or self.query_batch)

    @property
    def for_all_parameters(self) -> bool:
        """Whether it holds numbers for all of the network's parameters, and so cannot solve for some of them alone."""
        return False

    @abstractmethod
    def solve(self, problem: InnerProblem) -> Solution:
        """An approximate minimiser a row, started at ``problem.theta``."""

    def unroll(self, problem: InnerProblem, checkpoint: bool = False) -> tuple[Solution, Callable[[Tensor], Tensor]]:
        """``solve``, and v ↦ (∂φᵣ/∂θ)ᵀ vᵣ for all rows, [R, P] -> [R, P], which may be called once.

        ``checkpoint``: keep each step's parameters only, and compute its activations again when they are needed.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be differentiated through")


@dataclass(frozen=True)
class Iterate:
    """Where an iteration stands: ``phi`` and, ``gradient``, ∇h there, both [R, P]; ``memory``: what the next step needs
    besides.

    Of the step that led there, [R]: ``hessian_products``, those that it took, and ``negative_curvature``, whether it
    met any; None where a step takes none.
    """

    phi: Tensor
    gradient: Tensor
    memory: Any = None
    hessian_products: Tensor | None = None
    negative_curvature: Tensor | None = None


class Iterative(Solver):
    """Steps until every row's residual ‖∇h‖ is at most ``tol``, or ``steps`` times; a row that is there stays.

    A subclass says how it steps, and if need be how it begins. A step takes one gradient, at the point it returns.
    Cost: a gradient at θ, and one a step and row that is not there yet. Memory: flat in ``steps``.
    """

    steps: int
    tol: float
    monotone = True
    """Whether a step makes things better; else the row with the smallest residual seen is returned."""

    def begin(self, problem: InnerProblem) -> Iterate:
        """Every row at its θ, with ∇h there and what the first step needs besides."""
        return Iterate(problem.theta, problem.gradient(problem.theta))

    @abstractmethod
    def step(self, problem: InnerProblem, at: Iterate, active: Tensor) -> Iterate:
        """The next iterate. Rows that are not ``active`` [R] have to stay where they are, with their gradient."""

    def solve(self, problem: InnerProblem) -> Solution:
        at = self.begin(problem)
        residual = at.gradient.norm(dim=1)
        best, least = at.phi, residual
        gradients = torch.ones(problem.rows, dtype=torch.long, device=best.device)
        products, negative = torch.zeros_like(gradients), torch.zeros_like(gradients, dtype=torch.bool)
        for _ in range(self.steps):
            active = residual > self.tol
            if not active.any():
                break
            with problem.learner.work.only(int(active.sum())):  # the others wait
                at = self.step(problem, at, active)
            residual = at.gradient.norm(dim=1)
            gradients += active
            if at.hessian_products is not None:
                products += at.hessian_products
            if at.negative_curvature is not None:
                negative = torch.where(active, at.negative_curvature, negative)
            better = active if self.monotone else residual < least
            best = torch.where(better.unsqueeze(1), at.phi, best)
            least = torch.where(better, residual, least)
        return Solution(problem, best - problem.theta, gradients, products, self.tol, negative)
