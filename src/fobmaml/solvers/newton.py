"""Newton's method, for precise solves and for solves of known precision."""

from dataclasses import replace

import torch
from torch import Tensor

from fobmaml.arguments import number, whole_number
from fobmaml.solvers.base import Iterate, Iterative
from fobmaml.solvers.linear import conjugate_gradients
from fobmaml.solvers.problem import InnerProblem, Solution


class NewtonCG(Iterative):
    """Newton's method with steps by conjugate gradients and a backtracking line search: for precise solves.

    The step's linear system is solved to a relative residual of min(1/2, ‖∇h‖^{1/2}), or until negative curvature
    shows, as in Nocedal & Wright, Numerical Optimization (2006), algorithm 7.1. A row stops once its residual is at
    most ``tol``. With few examples the Hessian is λI and a part of low rank, which conjugate gradients use and step
    length rules do not. Cost: as many Hessian-vector products as that takes, at most ``steps`` × ``cg_steps`` a row.
    Memory: one twice-differentiable gradient, flat in steps.
    Raises ValueError unless steps ≥ 1, cg_steps ≥ 1 and tol ≥ 0.

    >>> fobmaml.solvers.NewtonCG().solve(problem).phi
    tensor([[0.5000]])
    """

    def __init__(self, steps: int = 100, tol: float = 1e-8, cg_steps: int = 250):
        self.steps = whole_number("steps", steps)
        self.tol = number("tol", tol, at_least=0.0)
        self.cg_steps = whole_number("cg_steps", cg_steps)

    def begin(self, problem: InnerProblem) -> Iterate:
        return Iterate(problem.theta, *problem.linearize(problem.theta))

    def step(self, problem: InnerProblem, at: Iterate, active: Tensor) -> Iterate:
        # A finished row asks for nothing: its right-hand side is zero.
        target = -at.gradient * active.unsqueeze(1)
        forcing = target.norm(dim=1).sqrt().clamp(max=0.5)
        found = conjugate_gradients(lambda v: problem.moved(at.memory(v)), target, self.cg_steps, forcing)
        direction = torch.where(found.x.any(dim=1, keepdim=True), found.x, target)
        length = self._length(problem, at.phi, direction, at.gradient)
        phi = at.phi + length.unsqueeze(1) * direction
        return Iterate(phi, *problem.linearize(phi), found.steps, found.negative_curvature)

    @staticmethod
    def _length(problem: InnerProblem, phi: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
        """The first of 1, 1/2, 1/4, ... that decreases each row enough (Armijo), up to the objective's rounding."""
        start, slope = problem.objective(phi), (gradient * step).sum(1)
        rounding = 100 * torch.finfo(phi.dtype).eps * (1 + start.abs())
        length, enough = torch.ones_like(start), ~step.any(dim=1)
        for _ in range(40):
            with problem.learner.work.only(int((~enough).sum())):
                enough = problem.objective(phi + length.unsqueeze(1) * step) <= start + 1e-4 * length * slope + rounding
            if enough.all():
                break
            length = torch.where(enough, length, 0.5 * length)
        return length


class Inexact(NewtonCG):
    """A solve of known precision: ``NewtonCG``'s solution, moved by exactly ``delta`` in a random direction a row.

    For measuring how an estimator's bias depends on δ = ‖φ − φ*‖ where the errors of different offsets have nothing in
    common, which is the theory's case; a real solver's errors partly cancel. The directions come from a generator
    that ``seed`` starts, so that no two solves share one. Cost: that of ``NewtonCG``, whose ``tol`` must be far below
    λ · ``delta``. Raises ValueError unless delta ≥ 0.

    >>> abs(fobmaml.solvers.Inexact(delta=0.1).solve(problem).phi - 0.5)
    tensor([[0.1000]])
    """

    def __init__(self, delta: float = 1e-3, seed: int = 0, steps: int = 100, tol: float = 1e-13, cg_steps: int = 250):
        super().__init__(steps, tol, cg_steps)
        self.delta = number("delta", delta, at_least=0.0)
        self.generator = torch.Generator().manual_seed(whole_number("seed", seed, at_least=0))

    def solve(self, problem: InnerProblem) -> Solution:
        exact = super().solve(problem)
        away = torch.randn(exact.displacement.shape, generator=self.generator, dtype=torch.float64)
        away = problem.moved(away.to(exact.displacement)).double()
        away *= self.delta / away.norm(dim=1, keepdim=True)
        return replace(exact, displacement=exact.displacement + away.to(exact.displacement))
