"""The inner problem and its solvers. All rows (task × offset) are solved as one batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
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

    def objective(self, phi: Tensor) -> Tensor:
        """hᵣ at each row: [R, P] -> [R]."""
        with torch.no_grad():
            return self.data_loss(phi) + 0.5 * self.lam * (phi - self.theta).square().sum(1)

    def hessian_product(self, phi: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ ∇²hᵣ(φᵣ) vᵣ for all rows, [R, P] -> [R, P]. The graph of the gradient is built once."""
        phi = phi.detach().requires_grad_()
        gradient = self.gradient(phi, differentiable=True)

        def product(v: Tensor) -> Tensor:
            (hv,) = torch.autograd.grad(gradient, phi, v, retain_graph=True)
            return hv

        return product


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


class NewtonCG(Solver):
    """Newton's method with steps by conjugate gradients and a backtracking line search: for precise solves.

    The step's linear system is solved to a relative residual of min(1/2, ‖∇h‖^{1/2}), or until negative curvature
    shows, as in Nocedal & Wright, Numerical Optimization (2006), algorithm 7.1. A row stops once its residual is at
    most ``tol``. With few examples the Hessian is λI and a part of low rank, which conjugate gradients use and step
    length rules do not. Cost: as many Hessian-vector products as that takes, at most ``steps`` × ``cg_steps`` a row;
    ``Solution.steps`` counts Newton steps. Memory: one twice-differentiable gradient, flat in steps.
    Raises ValueError unless steps ≥ 1, cg_steps ≥ 1 and tol ≥ 0.
    """

    def __init__(self, steps: int = 100, tol: float = 1e-8, cg_steps: int = 250):
        self.steps = whole_number("steps", steps)
        self.tol = number("tol", tol, at_least=0.0)
        self.cg_steps = whole_number("cg_steps", cg_steps)

    def solve(self, problem: InnerProblem, differentiable: bool = False) -> Solution:
        if differentiable:
            raise ValueError("solver=NewtonCG: takes estimators that do not back-propagate through the solve")
        phi = problem.theta
        taken = torch.zeros(problem.rows, dtype=torch.long, device=phi.device)
        for _ in range(self.steps):
            gradient = problem.gradient(phi)
            residual = gradient.norm(dim=1)
            active = residual > self.tol
            if not active.any():
                break
            taken += active
            # A finished row asks for nothing: its right-hand side is zero.
            target = -gradient * active.unsqueeze(1)
            forcing = residual.sqrt().clamp(max=0.5)
            step = conjugate_gradients(problem.hessian_product(phi), target, self.cg_steps, forcing).x
            step = torch.where(step.any(dim=1, keepdim=True), step, target)
            phi = phi + self._length(problem, phi, step, gradient).unsqueeze(1) * step
        return Solution(problem, phi, taken)

    @staticmethod
    def _length(problem: InnerProblem, phi: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
        """The first of 1, 1/2, 1/4, ... that decreases each row enough (Armijo), up to the objective's rounding."""
        start, slope = problem.objective(phi), (gradient * step).sum(1)
        rounding = 100 * torch.finfo(phi.dtype).eps * (1 + start.abs())
        length = torch.ones_like(start)
        for _ in range(40):
            enough = problem.objective(phi + length.unsqueeze(1) * step) <= start + 1e-4 * length * slope + rounding
            if enough.all():
                break
            length = torch.where(enough, length, 0.5 * length)
        return length


@dataclass(frozen=True)
class LinearSolve:
    """``x`` [R, P]; ``relative_residual`` [R]; ``negative_curvature`` [R], True where the matrix was found not to be
    positive definite (the row stopped there)."""

    x: Tensor
    relative_residual: Tensor
    negative_curvature: Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int,
                        tol: float | Tensor) -> LinearSolve:
    """Solves Aᵣxᵣ = bᵣ for all rows at once, each until ‖r‖ ≤ tol‖b‖; ``product`` applies all A: [R, P] -> [R, P].

    ``tol`` may differ by row, [R]. Cost: at most ``steps`` products.
    """
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = b.square().sum(1)
    threshold = tol**2 * rr
    negative = torch.zeros_like(rr, dtype=torch.bool)
    for _ in range(steps):
        active = (rr > threshold) & ~negative
        if not active.any():
            break
        ap = product(p)
        curvature = (p * ap).sum(1)
        negative |= active & (curvature <= 0)
        active &= curvature > 0
        alpha = torch.where(active, rr / curvature, 0.0).unsqueeze(1)
        x = x + alpha * p
        r = r - alpha * ap
        previous, rr = rr, torch.where(active, r.square().sum(1), rr)
        p = torch.where(active.unsqueeze(1), r + (rr / previous).unsqueeze(1) * p, p)
    norm = b.norm(dim=1)
    relative = torch.where(norm > 0, rr.sqrt() / norm, 0.0)
    return LinearSolve(x, relative, negative)
