"""The inner problem, and what a solver returns."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine import Learner
from fobmaml.engine.base import Draws, Engine
from fobmaml.engine.losses import Part, rows_taken
from fobmaml.tasks.batch import TaskBatch
from fobmaml.tasks.draws import drawn


class InnerProblem:
    """The perturbed inner problems hᵣ(φ) = f̂ᵢ(φ) + νⱼ fᵢ(φ) + (λ/2)‖φ − θ‖², one row r a task i and offset j.

    φ moves in the parameters that the learner adapts (``Learner.adapt``), and is θ in the others.

    ``theta`` [P] or [T, P], one a task. ``lam``: λ. ``nu``: [J] offsets, each applied to every task (row r = i·J + j),
    or None for the unperturbed problem, which never touches the query set.
    """

    def __init__(self, learner: Learner, theta: Tensor, tasks: TaskBatch, lam: float, nu: Tensor | None = None):
        self.learner, self.tasks, self.lam, self.nu = learner, tasks, lam, nu
        self.draws: Draws | None = None
        self.offsets = 1 if nu is None else len(nu)
        self.rows = len(tasks) * self.offsets
        self.start = theta = theta.detach()
        if theta.dim() == 1:
            self.theta = theta.expand(self.rows, -1)  # [R, P]
        else:
            self.theta = theta.repeat_interleave(self.offsets, dim=0)
        if nu is None:
            self.x, targets, mask = tasks.support_x, tasks.support_y, tasks.support_mask
        else:
            self.x = torch.cat([tasks.support_x, tasks.query_x], dim=1).repeat_interleave(self.offsets, dim=0)
            targets = torch.cat([tasks.support_y, tasks.query_y], dim=1).repeat_interleave(self.offsets, dim=0)
            mask = tasks.mask if tasks.mask is None else tasks.mask.repeat_interleave(self.offsets, dim=0)
        self.loss = learner.row_loss(targets, self._parts(tasks.support_x.shape[1]), mask)

    def _parts(self, support: int) -> list[Part]:
        """So many support examples, and query examples behind them if there is an offset."""
        own = self.learner.support_loss
        if self.nu is None:
            return [Part(slice(None), 1.0, "support_y", own)]
        factor = self.nu.repeat(len(self.tasks))
        return [Part(slice(support), 1.0, "support_y", own), Part(slice(support, None), factor, "query_y")]

    def drawn(self, steps: int, batch: int | None = None, query_batch: int | None = None) -> "InnerProblem":
        """The same problem, of whose support and query examples each of ``steps`` takes so many (None: all).

        What is drawn depends on a task's key, not on ν: the steps of all offsets, and of the unperturbed problem, see
        the same examples, so that the draws cancel in differences. Raises ValueError for tasks without keys, and for
        tasks with masks.
        """
        sets = [(self.tasks.support_x.shape[1], batch)]
        if self.nu is not None:
            sets.append((self.tasks.query_x.shape[1], query_batch))
        if all(size is None for _, size in sets):
            return self
        if self.tasks.mask is not None:
            raise refuse(
                "tasks", "masks", "tasks of equal numbers of examples, for a solver that draws batches of them"
            )
        if (keys := self.tasks.keys) is None:
            raise refuse("tasks", "no keys", "tasks with keys to draw batches by (TaskBatch.keyed)")
        chosen, before = [], 0
        for stream, (count, size) in enumerate(sets):
            if size is None:
                examples = torch.arange(count, device=keys.device).expand(len(keys), steps, -1)
            else:
                examples = drawn(keys, count, size, steps, stream)
            chosen.append(before + examples)
            before += count
        examples = torch.cat(chosen, dim=2).repeat_interleave(self.offsets, dim=0)
        problem = copy(self)
        problem.draws = Draws(examples, self._parts(chosen[0].shape[2]))
        return problem

    def at(self, step: int) -> "InnerProblem":
        """The problem that a step of a ``drawn`` one sees."""
        if self.draws is None:
            return self
        examples, problem = self.draws.examples[:, step], copy(self)
        problem.draws = None
        problem.x = rows_taken(self.x, examples)
        problem.loss = self.loss.of_examples(examples, self.draws.parts)
        return problem

    def engine(self, second_order: bool = False) -> Engine:
        """Of f̂ + ν f, the problem without its proximal term. Support and query are one pass."""
        return self.learner.engine_for(self.x, self.loss, second_order)

    def of_head(self, query: bool = False) -> "InnerProblem | None":
        """The same problem of the parameters that φ moves in alone, if they are the network's last module
        (``Learner.features``) and θ is one for all tasks; else None. ``query``: its tasks' query sets are needed, also
        without ``nu``."""
        if self.learner.moves is None or self.start.dim() != 1:
            return None
        if (found := self.learner.features(self.start, self.tasks, query or self.nu is not None)) is None:
            return None
        return InnerProblem(found[0], self.start[self.learner.moves != 0], found[1], self.lam, self.nu)

    def restricted(self, v: Tensor) -> Tensor:
        """Rows of this as rows of ``of_head``."""
        return v if self.learner.moves is None else v[:, self.learner.moves != 0]

    def lifted(self, v: Tensor) -> Tensor:
        """Rows of ``of_head`` as rows of this, zero in the other parameters."""
        rows = torch.zeros_like(self.theta, memory_format=torch.contiguous_format)
        if self.learner.moves is not None:
            rows[:, self.learner.moves != 0] = v
        return rows

    def moved(self, v: Tensor) -> Tensor:
        """[R, P] in the parameters that φ moves in, zero in the others."""
        return v if self.learner.moves is None else v * self.learner.moves

    def gradient(self, phi: Tensor) -> Tensor:
        """∇hᵣ at each row, in the parameters that φ moves in: [R, P] -> [R, P]."""
        return self.moved(self.engine().gradient(phi)) + self.lam * (phi - self.theta)

    def objective(self, phi: Tensor) -> Tensor:
        """hᵣ at each row: [R, P] -> [R]."""
        return self.engine().loss(phi) + 0.5 * self.lam * (phi - self.theta).square().sum(1)

    def linearize(self, phi: Tensor, engine: Engine | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """∇hᵣ(φᵣ), as ``gradient``, and v ↦ ∇²hᵣ(φᵣ) vᵣ in all parameters, for all rows, each [R, P] -> [R, P].

        ``engine``: for several calls one, so that they share its memory; by default one of their own.
        """
        gradient, hvp = (engine or self.engine(second_order=True)).linearize(phi)
        gradient = self.moved(gradient)
        if self.lam == 0.0:
            return gradient, hvp
        return (
            torch.add(gradient, phi - self.theta, alpha=self.lam),
            lambda v: torch.add(hvp(v), v, alpha=self.lam),
        )

    def hessian(self, phi: Tensor) -> Callable[[Tensor], Tensor]:
        """The second of ``linearize`` alone. The gradient that comes with it does not count as work: what the products
        need of it counts with them."""
        with self.learner.work.only(0):
            return self.linearize(phi)[1]


RESULTS = ("converged", "out of steps", "negative curvature", "diverged")
"""How a row's solve may have ended."""


@dataclass(frozen=True)
class Solution:
    """Where a solver stopped in ``problem``: ``displacement`` φ − θ [R, P], and what it took there.

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
    def envelope(self) -> Tensor:
        """−∇_θ min hᵣ / λ, [R, P], at the solution taken for the minimiser.

        φ − θ in the parameters that φ moves in, −∇(f̂ + νf)(φ)/λ in those where it is θ. Costs a gradient a row, where
        there are such.
        """
        moves = self.problem.learner.moves
        if moves is None:
            return self.displacement
        held = (1.0 - moves) * self.problem.engine().gradient(self.phi)
        return self.displacement - held / self.problem.lam

    @property
    def result(self) -> list[str]:
        """Of each row, one of ``RESULTS``. Costs ``residual``."""
        number = torch.where(self.residual <= self.tol, 0, 1)
        if self.negative_curvature is not None:
            number = torch.where((number == 1) & self.negative_curvature, 2, number)
        return [RESULTS[n] for n in torch.where(self.residual.isfinite(), number, 3).tolist()]
