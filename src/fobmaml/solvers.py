"""The inner problem and its solvers. All rows (task × offset) are solved as one batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fobmaml.arguments import number, whole_number
from fobmaml.learner import Learner
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
        theta = theta.expand(len(tasks), -1) if theta.dim() == 1 else theta
        self.theta = theta if offsets == 1 else theta.repeat_interleave(offsets, dim=0)  # [R, P]
        if nu is None:
            self.nu, self.x, self.y = None, tasks.support_x, tasks.support_y
        else:
            self.nu = nu.repeat(len(tasks))  # [R]
            self.x = torch.cat([tasks.support_x, tasks.query_x], dim=1).repeat_interleave(offsets, dim=0)
            self.y = torch.cat([tasks.support_y, tasks.query_y], dim=1).repeat_interleave(offsets, dim=0)
        self.support_examples = tasks.support_x.shape[1]

    def data_loss(self, phi: Tensor) -> Tensor:
        """f̂ + ν f, the problem without its proximal term: [R, P] -> [R]. One pass over support and query."""
        outputs = self.learner.outputs(phi, self.x)
        if self.nu is None:
            return self.learner.losses(outputs, self.y)
        s = self.support_examples
        support = self.learner.losses(outputs[:, :s], self.y[:, :s])
        return support + self.nu * self.learner.losses(outputs[:, s:], self.y[:, s:])

    def gradient(self, phi: Tensor, differentiable: bool = False) -> Tensor:
        """∇hᵣ at each row: [R, P] -> [R, P]; with ``differentiable``, a function of ``phi`` and ``theta``."""
        if not differentiable:
            phi = phi.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.data_loss(phi).sum(), phi, create_graph=differentiable)
        if not differentiable:
            phi = phi.detach()
        return gradient if self.lam == 0.0 else gradient + self.lam * (phi - self.theta)


@dataclass(frozen=True)
class Solution:
    """Where a solver stopped: ``phi`` [R, P] after ``steps`` [R] gradients."""

    problem: InnerProblem
    phi: Tensor
    steps: Tensor

    @cached_property
    def residual(self) -> Tensor:
        """‖∇hᵣ(φᵣ)‖, [R]. Costs one gradient a row, spent only if somebody reads it."""
        return self.problem.gradient(self.phi.detach()).norm(dim=1)


class Solver(ABC):
    """Solves every row of an inner problem from θ, so that all offsets of a stencil share one trajectory.

    To add one, subclass it and implement ``solve``; ``differentiable_steps`` says whether back-propagation through
    ``solve(..., differentiable=True)`` is possible.
    """

    differentiable_steps = False

    @abstractmethod
    def solve(self, problem: InnerProblem, differentiable: bool = False) -> Solution:
        """An approximate minimiser a row, started at ``problem.theta``."""


class GradientDescent(Solver):
    """Gradient descent with heavy-ball momentum: v ← μv + ∇h(φ), φ ← φ − lr·v, ``steps`` times.

    Cost: ``steps`` gradients a row. Memory: flat in ``steps`` unless differentiated through.
    Raises ValueError unless steps ≥ 1, lr > 0 and 0 ≤ momentum < 1.
    """

    differentiable_steps = True

    def __init__(self, steps: int = 10, lr: float = 0.1, momentum: float = 0.0):
        self.steps = whole_number("steps", steps)
        self.lr = number("lr", lr, above=0.0)
        self.momentum = number("momentum", momentum, at_least=0.0, below=1.0)

    def solve(self, problem: InnerProblem, differentiable: bool = False) -> Solution:
        phi = problem.theta
        velocity: Tensor | None = None
        for _ in range(self.steps):
            gradient = problem.gradient(phi, differentiable)
            velocity = gradient if velocity is None or self.momentum == 0.0 else self.momentum * velocity + gradient
            phi = phi - self.lr * velocity
        return Solution(problem, phi, torch.full((problem.rows,), self.steps))


class BarzilaiBorwein(Solver):
    """Gradient descent with Barzilai–Borwein step lengths, ‖s‖² / sᵀy or sᵀy / ‖y‖² in turn, a row its own.

    No step length to tune: ``lr`` is the first one only. A row stops once its residual is at most ``tol``; the solve
    stops when all have, or after ``steps`` gradients a row. Where the curvature sᵀy along a step is not positive, or a
    step would be longer than ten times the last, the last step length is doubled instead. The row with the smallest
    residual seen is returned. Reference: Barzilai & Borwein, IMA J. Numer. Anal. 8 (1988); alternation after Dai &
    Fletcher, Numer. Math. 100 (2005).

    The step lengths make the solution a rough function of the problem: use it to convergence, or finite differences
    measure the solver. Cost: at most ``steps`` gradients a row; memory: flat.
    Raises ValueError unless steps ≥ 1, lr > 0 and tol ≥ 0.
    """

    def __init__(self, steps: int = 200, lr: float = 0.1, tol: float = 1e-6):
        self.steps = whole_number("steps", steps)
        self.lr = number("lr", lr, above=0.0)
        self.tol = number("tol", tol, at_least=0.0)

    def solve(self, problem: InnerProblem, differentiable: bool = False) -> Solution:
        if differentiable:
            raise ValueError("solver=BarzilaiBorwein: takes estimators that do not back-propagate through the solve")
        phi = problem.theta
        gradient = problem.gradient(phi)
        residual = gradient.norm(dim=1)
        best, best_residual = phi, residual
        length = torch.full_like(residual, self.lr)
        taken = torch.ones(problem.rows, dtype=torch.long, device=phi.device)
        for step in range(1, self.steps):
            active = residual > self.tol
            if not active.any():
                break
            moved = -(length * active).unsqueeze(1) * gradient
            phi = phi + moved
            new = problem.gradient(phi)
            change = new - gradient
            curvature = (moved * change).sum(1)
            proposed = moved.square().sum(1) / curvature if step % 2 else curvature / change.square().sum(1)
            trusted = (curvature > 0) & proposed.isfinite() & (proposed <= 10.0 * length)
            length = torch.where(active, torch.where(trusted, proposed, 2.0 * length), length)
            gradient = torch.where(active.unsqueeze(1), new, gradient)
            residual = gradient.norm(dim=1)
            taken += active
            better = residual < best_residual
            best = torch.where(better.unsqueeze(1), phi, best)
            best_residual = torch.where(better, residual, best_residual)
        return Solution(problem, best, taken)
