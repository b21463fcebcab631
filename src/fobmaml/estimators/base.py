"""What an estimator is, and the one way to run it: ``estimate`` on flat vectors, ``meta_gradient`` on modules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Self, cast

import torch
from torch import Tensor, nn

from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.engine import Learner, Work
from fobmaml.engine.losses import LossFn
from fobmaml.engine.selection import Adapt
from fobmaml.precision import full_precision
from fobmaml.solvers import InnerProblem, LinearStatistics, Solution, Solver
from fobmaml.tasks.batch import TaskBatch


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns: ``gradients`` [T, P], one row a task, and how to get the adapted parameters.

    ``adapted()`` returns the solution of the unperturbed inner problem. It is a call because some estimators do not
    need that solution themselves: nothing is solved unless somebody asks. ``linear``: what a linear solve met, if the
    estimator does one. ``variables``: the derivatives by the estimator's own, one a task each.
    """

    gradients: Tensor
    adapted: Callable[[], Solution]
    linear: LinearStatistics | None = None
    variables: dict[str, Tensor] = field(default_factory=dict)

    def norms(self) -> Tensor:
        """Of each task's meta-gradient, ``gradients`` and ``variables`` together, [T]."""
        parts = (self.gradients, *self.variables.values())
        return torch.stack([part.flatten(1).norm(dim=1) for part in parts]).norm(dim=0)


@dataclass(frozen=True)
class Cost:
    """Of one task: the ``rows`` of parameters that are solved at once, the ``examples`` of each row's gradient, and,
    ``second_order``, whether Hessian products are taken."""

    rows: int
    examples: int
    second_order: bool


@dataclass(frozen=True)
class Adaptation:
    """How a task's parameters are found at test time, where that differs from training: by ``solver``, with ``lam``,
    the λ of the inner problem (0: no proximal term). None: the estimator's. Raises ValueError for anything else."""

    solver: Solver | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise refuse("solver", type(self.solver).__name__, "a fobmaml.solvers.Solver")
        if self.lam is not None:
            number("lam", self.lam, at_least=0.0)


class Estimator(ABC):
    """A meta-gradient estimator. To add one, subclass it, implement ``__call__``, and write a file in
    configs/estimator.

    ``solver``: solves the inner problem. ``lam``: λ, the strength of its proximal term; ``lam=0`` is MAML's inner
    problem. Raises ValueError for a negative or, where the formula divides by λ or needs a minimiser, zero ``lam``.
    """

    nu: float | str | None = None
    """ν, of an estimator that has it; ``auto``: chosen for the tasks, see ``settled``."""
    envelope = 0.0
    """α, of an estimator of ∇(F + αM), M the Moreau envelope of the support loss (``FiniteDifference``)."""
    needs_proximal_term = True
    differentiates_solution = False
    """Whether its formula takes the solver's result for the minimiser in all parameters."""
    progress = 0.0
    """The part of training that is over, from 0 to 1, for formulas that change on the way. Whoever trains sets it."""
    learn_lr = 0.0
    """The outer learning rate of its own variables, as a multiple of θ's."""

    def __init__(self, solver: Solver, lam: float):
        if not isinstance(solver, Solver):
            raise refuse("solver", type(solver).__name__, "a fobmaml.solvers.Solver")
        self.solver = solver
        self.lam = number("lam", lam, above=0.0) if self.needs_proximal_term else number("lam", lam, at_least=0.0)

    @abstractmethod
    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        """The estimate of each task's meta-gradient at ``theta`` [P]."""

    def variables(self, learner: Learner) -> dict[str, nn.Parameter]:
        """Its own outer variables, trained beside θ: the same objects at every call."""
        return {}

    def cost(self, support: int, query: int) -> Cost:
        """For tasks of so many support and query examples; by default that of a method with Hessian products."""
        return Cost(1, support, second_order=True)

    def reference(self, tol: float) -> "tuple[Estimator, str] | None":
        """What its bias is measured against, to a residual of ``tol`` in float64, and what to call that. None: the
        exact meta-gradient of the inner problem that it solves, see ``measure.bias``."""
        return None

    def settled(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> "Estimator":
        """The estimator with that chosen which it leaves to the tasks, ``nu="auto"``; by default itself."""
        return self

    def adapt(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Solution:
        """The solution of the unperturbed inner problem, φᵢ,₀: what a task's parameters are at test time."""
        return self.solve(InnerProblem(learner, theta, tasks, self.lam))

    def adapting(self, by: Adaptation) -> Self:
        """This one, to ``adapt`` only: with another solver or λ, of which its formula may have no use."""
        other = copy(self)
        other.solver = by.solver or self.solver
        other.lam = self.lam if by.lam is None else float(by.lam)
        return other

    def solve(self, problem: InnerProblem) -> Solution:
        """By the solver. Raises ValueError for a solution that is none: of another shape, or, for an estimator that
        differentiates it, with some parameters moved and others left where they were although they have a slope."""
        solution = self._solved(problem)
        displacement, wanted = solution.displacement, (problem.rows, problem.learner.parameter_count)
        name = type(self.solver).__name__
        if displacement.shape != wanted:
            raise refuse(
                "solver",
                name,
                f"one whose solution is a displacement {list(wanted)}, and this one's has the "
                f"shape {list(displacement.shape)}",
            )
        if self.differentiates_solution and (still := self._left_behind(problem, displacement)):
            raise refuse(
                "solver", name, f"one that moves every parameter, and this one leaves {', '.join(still)} where it was"
            )
        return solution

    def _solved(self, problem: InnerProblem) -> Solution:
        """Of a network's last module alone, by features that are computed once, where that is what moves."""
        if self.solver.for_all_parameters or (head := problem.of_head()) is None:
            return self.solver.solve(problem)
        solution = self.solver.solve(head)
        return replace(solution, problem=problem, displacement=problem.lifted(solution.displacement))

    @staticmethod
    def _left_behind(problem: InnerProblem, displacement: Tensor) -> list[str]:
        """Parameters that no row has moved, although a step as long as the others' would have been seen in them.

        A solution that is θ itself is none of this: the problem may start at its solution, and ``residual`` tells.
        """
        if displacement[:1].all():  # the usual case, at little cost
            return []
        unflatten = problem.learner.unflatten
        for part in (displacement[:1], displacement):  # one row shows it nearly always
            moved = {name: part.any() for name, part in unflatten(part).items() if name in problem.learner.adapted}
            moved = dict(zip(moved, torch.stack([*moved.values()]).tolist(), strict=True))
            if all(moved.values()):
                return []
        if not any(moved.values()):
            return []
        with problem.learner.work.only(0):
            slope, start = unflatten(problem.gradient(problem.theta)), unflatten(problem.theta)
        length = displacement.norm() / math.hypot(*(slope[name].norm() for name in moved if moved[name]))
        rounding = 100 * torch.finfo(displacement.dtype).eps
        return [
            name
            for name in moved
            if not moved[name] and slope[name].any() and length * slope[name].norm() > rounding * start[name].norm()
        ]


@dataclass(frozen=True)
class MeanEstimate:
    """``gradient`` [P], the mean over tasks; ``query_loss`` and ``residual`` [T], None if they were not asked for;
    ``linear``: what each task's linear solve met, None for estimators without. ``work``: what the estimator took, all
    tasks together. ``clipped`` [T]: whose meta-gradient was shortened, None without ``task_clip``. ``variables``: as
    ``gradient``, by the estimator's own variables; ``nu``: the ν that was taken, None for estimators without."""

    gradient: Tensor
    query_loss: Tensor | None
    residual: Tensor | None
    linear: LinearStatistics | None
    work: Work
    clipped: Tensor | None
    variables: dict[str, Tensor]
    nu: float | None = None


def chunk_size(learner: Learner, tasks: TaskBatch, estimator: Estimator | None = None, measure: bool = False) -> int:
    """How many of ``tasks`` to solve at once (``task_chunk=auto``): all on a GPU, what keeps a CPU busy elsewhere.

    For a meta-gradient of the network of ``learner`` by ``estimator``, or None: to adapt to the support set only.
    ``measure``: the engine for it is chosen first, at the cost of ``Learner.measure``.
    """
    support, query = tasks.support_x.shape[1], tasks.query_x.shape[1]
    cost = estimator.cost(*_at_a_step(estimator.solver, support, query)) if estimator else Cost(1, support, False)
    if measure:
        learner.measure(tasks.support_x, cost.examples, cost.second_order)
    if learner.device.type != "cpu":
        return len(tasks)
    rows = learner.rows_at_once(tasks.support_x, cost.examples, cost.second_order)
    at_once = math.ceil(rows / cost.rows)
    return math.ceil(len(tasks) / math.ceil(len(tasks) / at_once))  # chunks of equal size


def _at_a_step(solver: Solver, support: int, query: int) -> tuple[int, int]:
    return min(solver.batch or support, support), min(solver.query_batch or query, query)


def estimate(
    estimator: Estimator,
    learner: Learner,
    theta: Tensor,
    tasks: TaskBatch,
    task_chunk: int | None = None,
    diagnose: bool = True,
    task_clip: float | None = None,
) -> MeanEstimate:
    """The mean meta-gradient by ``estimator`` over ``tasks`` at ``theta`` [P] of the network of ``learner``, solving
    ``task_chunk`` tasks at once (None: all). ``diagnose``: also the query loss and the residual at the adapted
    parameters, at the cost of solving the unperturbed problem where the estimator does not, and of one more gradient,
    which are no part of ``work``.
    ``task_clip``: a task's meta-gradient, with its derivatives by ``variables``, is scaled to a norm of at most that,
    before the mean: one factor a task, so that it keeps its direction and none outweighs the others in any part; the
    bias is measured without. Memory: that of one chunk. Raises ValueError for tasks that do not fit the network.
    """
    total, work, variables = torch.zeros_like(theta), Work(), dict[str, Tensor]()
    query_loss, residual, linear, clipped = [], [], [], []
    with torch.inference_mode(False), full_precision(learner.device):
        tasks, before = learner.check(tasks), learner.work.read()
        settled = estimator.settled(learner, theta, tasks)
        for part in tasks.split(task_chunk or len(tasks)):
            result = settled(learner, theta, part)
            work += learner.work.read() - before
            factor = None
            if task_clip is not None:
                norms = result.norms()
                clipped.append(norms > task_clip)
                factor = (task_clip / norms).clamp(max=1.0)
            total += _summed(result.gradients, factor)
            for name, each in result.variables.items():
                variables[name] = variables.get(name, 0.0) + _summed(each, factor) / len(tasks)
            if result.linear is not None:
                linear.append((result.linear.steps, result.linear.relative_residual, result.linear.negative_curvature))
            if diagnose:
                adapted = result.adapted()
                with torch.no_grad():
                    query_loss.append(learner.query_loss(adapted.phi.detach(), part))
                residual.append(adapted.residual)
            before = learner.work.read()  # diagnosis is no part of it
        return MeanEstimate(
            total / len(tasks),
            torch.cat(query_loss) if diagnose else None,
            torch.cat(residual) if diagnose else None,
            LinearStatistics(*map(torch.cat, zip(*linear, strict=True))) if linear else None,
            work,
            torch.cat(clipped) if clipped else None,
            variables,
            settled.nu if isinstance(settled.nu, float) else None,
        )


def _summed(each: Tensor, factor: Tensor | None) -> Tensor:
    """Over tasks, [T, ...] -> [...], each times its ``factor`` [T]."""
    return each.sum(0) if factor is None else (factor @ each.flatten(1)).view(each.shape[1:])


@dataclass(frozen=True)
class MetaGradient:
    """``gradient``: {parameter name: tensor of its shape}, the mean over tasks, and as ``solver.lr`` the derivative by
    step lengths where the estimator learns them (``Estimator.variables``). ``query_loss`` [T]: fᵢ at the
    unperturbed adapted parameters. ``residual`` [T]: the norm of the inner problem's gradient there. ``linear``: what
    the linear solves met, None for estimators without. ``engine``: what computed it (``Learner``). ``work``: what the
    estimator took, all tasks together: ``work.example_gradients``, ``work.hessian_products``. ``clipped`` [T]: whose
    meta-gradient was shortened, None without ``task_clip``. ``nu``: the ν that was taken, None for estimators
    without."""

    gradient: dict[str, Tensor]
    query_loss: Tensor
    residual: Tensor
    linear: LinearStatistics | None
    engine: str
    work: Work
    clipped: Tensor | None
    nu: float | None = None


def meta_gradient(
    estimator: Estimator,
    model: nn.Module,
    loss_fn: LossFn,
    tasks: TaskBatch,
    task_chunk: int | str | None = "auto",
    engine: str = "auto",
    task_clip: float | None = None,
    adapt: Adapt = "all",
    support_loss: LossFn | None = None,
) -> MetaGradient:
    """The meta-gradient at a model's present parameters, by any estimator.

    ``model``: any module whose outputs are a function of its parameters and inputs; it is not changed.
    ``loss_fn(outputs, targets)`` returns the mean loss of one task's examples. ``task_chunk``: how many tasks are
    solved at once (None: all); fewer take less memory, and ``auto`` as few as are fast. ``engine``: see ``Learner``.
    ``task_clip``: each task's meta-gradient is scaled to a norm of at most that before the mean, so that no task
    outweighs the others. ``adapt``: which parameters the inner problem moves, the others being θ: ``all``, ``head``,
    ``norm-and-head`` or a list of patterns of their names (``engine.selection``); the meta-gradient is by all.
    ``support_loss``: of the support examples, where that is not ``loss_fn``. Dtype and device follow the model;
    autocast is left.

    Raises ValueError, naming the argument, for a model with running batch statistics or active dropout, a loss that is
    not one number, labels without an output, and tasks of another device.

    >>> estimator = fobmaml.estimators.Symmetric(solver, lam=2.0, nu=0.1)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).query_loss
    tensor([2.2500])
    """
    if not isinstance(estimator, Estimator):
        raise refuse("estimator", type(estimator).__name__, "one of fobmaml.estimators")
    if not isinstance(tasks, TaskBatch):
        raise refuse("tasks", type(tasks).__name__, "a fobmaml.TaskBatch")
    if isinstance(task_chunk, str):
        one_of("task_chunk", task_chunk, ("auto",))
    elif task_chunk is not None:
        whole_number("task_chunk", task_chunk)
    if task_clip is not None:
        number("task_clip", task_clip, above=0.0)
    with torch.inference_mode(False):
        learner = Learner(model, loss_fn, engine, adapt, support_loss)
        tasks = learner.check(tasks.to(dtype=learner.dtype))
        if tasks.keys is None and estimator.solver.takes_batches:
            tasks = tasks.keyed()
        chunk = chunk_size(learner, tasks, estimator) if isinstance(task_chunk, str) else task_chunk
        result = estimate(estimator, learner, learner.theta(), tasks, chunk, task_clip=task_clip)
        return MetaGradient(
            learner.unflatten(result.gradient) | result.variables,
            cast(Tensor, result.query_loss),
            cast(Tensor, result.residual),
            result.linear,
            learner.used,
            result.work,
            result.clipped,
            result.nu,
        )
