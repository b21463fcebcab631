"""The inner problem and its solvers. All rows (task × offset) are solved as one batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fobmaml.arguments import number, whole_number
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
            parts = [Part(slice(support), 1.0, "support_y"),
                     Part(slice(support, None), nu.repeat(len(tasks)), "query_y")]
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

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """∇hᵣ(φᵣ) and v ↦ ∇²hᵣ(φᵣ) vᵣ for all rows, each [R, P] -> [R, P]."""
        gradient, hvp = self.engine(second_order=True).linearize(phi)
        return gradient + self.lam * (phi - self.theta), lambda v: hvp(v) + self.lam * v


@dataclass(frozen=True)
class Solution:
    """Where a solver stopped: ``displacement`` φ − θ [R, P] after ``steps`` [R] gradients."""

    problem: InnerProblem
    displacement: Tensor
    steps: Tensor

    @cached_property
    def phi(self) -> Tensor:
        """[R, P]."""
        return self.problem.theta + self.displacement

    @cached_property
    def residual(self) -> Tensor:
        """‖∇hᵣ(φᵣ)‖, [R]. Costs one gradient a row, spent only if somebody reads it."""
        return self.problem.gradient(self.phi).norm(dim=1)


class Solver(ABC):
    """Solves every row of an inner problem from θ, so that all offsets of a stencil share one trajectory.

    To add one, subclass it and implement ``solve``: it starts every row at ``problem.theta`` and moves all parameters
    towards the minimiser of h, the same way for every row, without random numbers of its own. One that leaves
    parameters where they were is refused by the estimators that differentiate the solution. With ``unroll`` too, and
    ``differentiable_steps`` True, MAML can back-propagate through it.
    """

    differentiable_steps = False

    @abstractmethod
    def solve(self, problem: InnerProblem) -> Solution:
        """An approximate minimiser a row, started at ``problem.theta``."""

    def unroll(self, problem: InnerProblem, checkpoint: bool = False) -> tuple[Solution, Callable[[Tensor], Tensor]]:
        """``solve``, and v ↦ (∂φᵣ/∂θ)ᵀ vᵣ for all rows, [R, P] -> [R, P], which may be called once.

        ``checkpoint``: keep each step's parameters only, and compute its activations again when they are needed.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be differentiated through")


class GradientDescent(Solver):
    """Gradient descent with heavy-ball momentum: v ← μv + ∇h(φ), φ ← φ − lr·v, ``steps`` times.

    Cost: ``steps`` gradients a row. Memory: flat in ``steps`` unless unrolled.
    Raises ValueError unless steps ≥ 1, lr > 0 and 0 ≤ momentum < 1.
    """

    differentiable_steps = True

    def __init__(self, steps: int = 10, lr: float = 0.1, momentum: float = 0.0):
        self.steps = whole_number("steps", steps)
        self.lr = number("lr", lr, above=0.0)
        self.momentum = number("momentum", momentum, at_least=0.0, below=1.0)

    def solve(self, problem: InnerProblem) -> Solution:
        displacement = problem.engine().gradient_descent(problem.theta, self.steps, self.lr, problem.lam, self.momentum)
        return self._solution(problem, displacement)

    def _solution(self, problem: InnerProblem, displacement: Tensor) -> Solution:
        return Solution(problem, displacement, torch.full((problem.rows,), self.steps))

    def unroll(self, problem: InnerProblem, checkpoint: bool = False) -> tuple[Solution, Callable[[Tensor], Tensor]]:
        """Memory: ``steps`` times a gradient's activations, or one time and ``steps`` × [R, P] with ``checkpoint``.

        Cost of the pull-back: a Hessian-vector product a step, and with ``checkpoint`` one more gradient.
        """
        displacement = velocity = torch.zeros_like(problem.theta)
        hessians: list[Tensor | Callable[[Tensor], Tensor]] = []  # where to take one, or its products
        for _ in range(self.steps):
            phi = problem.theta + displacement
            if checkpoint:
                gradient = problem.gradient(phi)
                hessians.append(phi)
            else:
                gradient, product = problem.linearize(phi)
                hessians.append(product)
            velocity = self.momentum * velocity + gradient
            displacement = displacement - self.lr * velocity

        def pull_back(v: Tensor) -> Tensor:
            by_phi, by_velocity, by_theta = v, torch.zeros_like(v), torch.zeros_like(v)
            while hessians:
                by_velocity = by_velocity - self.lr * by_phi
                hessian = hessians.pop()
                product = problem.linearize(hessian)[1] if isinstance(hessian, Tensor) else hessian
                by_phi = by_phi + product(by_velocity)
                by_theta = by_theta - problem.lam * by_velocity
                by_velocity = self.momentum * by_velocity
            return by_theta + by_phi

        return self._solution(problem, displacement), pull_back


class BarzilaiBorwein(Solver):
    """Gradient descent with Barzilai–Borwein step lengths, ‖s‖² / sᵀy or sᵀy / ‖y‖² in turn, a row its own.

    No step length to tune: ``lr`` is the first one only. A row stops once its residual is at most ``tol``; the solve
    stops when all have, or after ``steps`` gradients a row. Where the curvature sᵀy along a step is not positive, or a
    step would be longer than ten times the last, the last step length is doubled instead. The row with the smallest
    residual seen is returned. Reference: Barzilai & Borwein, IMA J. Numer. Anal. 8 (1988); alternation after Dai &
    Fletcher, Numer. Math. 100 (2005).

    The step lengths make the solution a rough function of the problem: use it to convergence, or finite differences
    measure the solver. Cost: at most ``steps`` gradients a row, the first of them at θ; memory: flat.
    Raises ValueError unless steps ≥ 2, lr > 0 and tol ≥ 0.
    """

    def __init__(self, steps: int = 200, lr: float = 0.1, tol: float = 1e-6):
        self.steps = whole_number("steps", steps, at_least=2)
        self.lr = number("lr", lr, above=0.0)
        self.tol = number("tol", tol, at_least=0.0)

    def solve(self, problem: InnerProblem) -> Solution:
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
        return Solution(problem, best - problem.theta, taken)


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

    def solve(self, problem: InnerProblem) -> Solution:
        phi = problem.theta
        taken = torch.zeros(problem.rows, dtype=torch.long, device=phi.device)
        for _ in range(self.steps):
            gradient, hessian_product = problem.linearize(phi)
            residual = gradient.norm(dim=1)
            active = residual > self.tol
            if not active.any():
                break
            taken += active
            # A finished row asks for nothing: its right-hand side is zero.
            target = -gradient * active.unsqueeze(1)
            forcing = residual.sqrt().clamp(max=0.5)
            step = conjugate_gradients(hessian_product, target, self.cg_steps, forcing).x
            step = torch.where(step.any(dim=1, keepdim=True), step, target)
            phi = phi + self._length(problem, phi, step, gradient).unsqueeze(1) * step
        return Solution(problem, phi - problem.theta, taken)

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


class Inexact(NewtonCG):
    """A solve of known precision: ``NewtonCG``'s solution, moved by exactly ``delta`` in a random direction a row.

    For measuring how an estimator's bias depends on δ = ‖φ − φ*‖ where the errors of different offsets have nothing in
    common, which is the theory's case; a real solver's errors partly cancel. The directions come from a generator
    that ``seed`` starts, so that no two solves share one. Cost: that of ``NewtonCG``, whose ``tol`` must be far below
    λ · ``delta``. Raises ValueError unless delta ≥ 0.
    """

    def __init__(self, delta: float = 1e-3, seed: int = 0, steps: int = 100, tol: float = 1e-13, cg_steps: int = 250):
        super().__init__(steps, tol, cg_steps)
        self.delta = number("delta", delta, at_least=0.0)
        self.generator = torch.Generator().manual_seed(whole_number("seed", seed, at_least=0))

    def solve(self, problem: InnerProblem) -> Solution:
        exact = super().solve(problem)
        away = torch.randn(exact.displacement.shape, generator=self.generator, dtype=torch.float64)
        away *= self.delta / away.norm(dim=1, keepdim=True)
        return Solution(problem, exact.displacement + away.to(exact.displacement), exact.steps)


@dataclass(frozen=True)
class LinearStatistics:
    """Of R linear solves Ax = b, [R] each: ``steps`` taken, a product with A each; ``relative_residual``: ‖b − Ax‖/‖b‖;
    ``negative_curvature``: whether A was found not to be positive definite: the solve stopped there, at zero if that
    was its first step."""

    steps: Tensor
    relative_residual: Tensor
    negative_curvature: Tensor


@dataclass(frozen=True)
class LinearSolve(LinearStatistics):
    """``x`` [R, P]."""

    x: Tensor


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
    taken = torch.zeros_like(rr, dtype=torch.long)
    for _ in range(steps):
        active = (rr > threshold) & ~negative
        if not active.any():
            break
        ap = product(p)
        taken += active
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
    return LinearSolve(taken, relative, negative, x)
