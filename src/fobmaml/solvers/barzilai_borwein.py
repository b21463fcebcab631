"""Gradient descent with Barzilai–Borwein step lengths."""

import torch

from fobmaml.arguments import number, whole_number
from fobmaml.solvers.base import Iterate, Iterative
from fobmaml.solvers.problem import InnerProblem


class BarzilaiBorwein(Iterative):
    """Gradient descent with Barzilai–Borwein step lengths, ‖s‖² / sᵀy or sᵀy / ‖y‖² in turn, a row its own.

    No step length to tune: ``lr`` is the first one only. A row stops once its residual is at most ``tol``, or after
    ``steps`` steps. Where the curvature sᵀy along a step is not positive, or a step would be longer than ten times the
    last, the last step length is doubled instead. The row with the smallest residual seen is returned. Reference:
    Barzilai & Borwein, IMA J. Numer. Anal. 8 (1988); alternation after Dai & Fletcher, Numer. Math. 100 (2005).

    The step lengths make the solution a rough function of the problem: use it to convergence, or finite differences
    measure the solver. Cost: a gradient a step and row, and one at θ; memory: flat.
    Raises ValueError unless steps ≥ 1, lr > 0 and tol ≥ 0.

    >>> fobmaml.solvers.BarzilaiBorwein(tol=1e-6).solve(problem).phi
    tensor([[0.5000]])
    """

    monotone = False

    def __init__(self, steps: int = 200, lr: float = 0.1, tol: float = 1e-4):
        self.steps = whole_number("steps", steps)
        self.lr = number("lr", lr, above=0.0)
        self.tol = number("tol", tol, at_least=0.0)

    def begin(self, problem: InnerProblem) -> Iterate:
        at = super().begin(problem)
        return Iterate(at.phi, at.gradient, (0, at.gradient.new_full((problem.rows,), self.lr)))

    def step(self, problem: InnerProblem, at: Iterate, active: torch.Tensor) -> Iterate:
        taken, length = at.memory
        moved = -(length * active).unsqueeze(1) * at.gradient
        phi = at.phi + moved
        new = problem.gradient(phi)
        change = new - at.gradient
        curvature = (moved * change).sum(1)
        proposed = curvature / change.square().sum(1) if taken % 2 else moved.square().sum(1) / curvature
        trusted = (curvature > 0) & proposed.isfinite() & (proposed <= 10.0 * length)
        length = torch.where(active, torch.where(trusted, proposed, 2.0 * length), length)
        return Iterate(phi, torch.where(active.unsqueeze(1), new, at.gradient), (taken + 1, length))
