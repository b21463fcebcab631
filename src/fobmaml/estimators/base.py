"""What an estimator is, and the one way to run it: ``estimate`` on flat vectors, ``meta_gradient`` on modules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.learner import Learner
from fobmaml.losses import LossFn
from fobmaml.solvers import InnerProblem, Solution, Solver
from fobmaml.tasks.batch import TaskBatch


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns: ``gradients`` [T, P], one row a task, and how to get the adapted parameters.

    ``adapted()`` returns the solution of the unperturbed inner problem. It is a call because some estimators do not
    need that solution themselves: nothing is solved unless somebody asks.
    """

    gradients: Tensor
    adapted: Callable[[], Solution]


class Estimator(ABC):
    """A meta-gradient estimator. To add one, subclass it, implement ``__call__``, and write a file in
    configs/estimator.

    ``solver``: solves the inner problem. ``lam``: λ, the strength of its proximal term; ``lam=0`` is MAML's inner
    problem. Raises ValueError for a negative or, where the formula divides by λ or needs a minimiser, zero ``lam``.
    """

    needs_proximal_term = True
    rows_per_task = 1
    """Rows of parameters that one task occupies while it is solved."""
    query_in_inner_problem = False
    """Whether those rows take gradients of the query set, too."""
    first_order = False
    """Whether it takes gradients only, no Hessian products."""

    def __init__(self, solver: Solver, lam: float):
        if not isinstance(solver, Solver):
            raise refuse("solver", type(solver).__name__, "a fobmaml.solvers.Solver")
        self.solver = solver
        if self.needs_proximal_term:
            self.lam = number("lam", lam, above=0.0)
        else:
            self.lam = number("lam", lam, at_least=0.0)

    @abstractmethod
    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        """The estimate of each task's meta-gradient at ``theta`` [P]."""

    def adapt(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Solution:
        """The solution of the unperturbed inner problem, φᵢ,₀: what a task's parameters are at test time."""
        return self.solver.solve(InnerProblem(learner, theta, tasks, self.lam))


@dataclass(frozen=True)
class MeanEstimate:
    """``gradient`` [P], the mean over tasks; ``query_loss`` and ``residual`` [T], None if they were not asked for."""

    gradient: Tensor
    query_loss: Tensor | None
    residual: Tensor | None


WORK_AT_ONCE = 2**25
"""``task_chunk=auto`` on a CPU: rows × parameters × examples of a gradient that hides the cost of calling the library.

Measured (results/bench_chunks.csv): with less, calls cost time; with more, memory grows and time does not fall.
"""
ROWS_A_THREAD = 8
"""At least so many with the compiled kernel: a row is one thread's, and all threads wait for the last."""


def chunk_size(learner: Learner, tasks: TaskBatch, estimator: Estimator | None = None) -> int:
    """How many of ``tasks`` to solve at once (``task_chunk=auto``): all on a GPU, what keeps a CPU busy elsewhere.

    For a meta-gradient by ``estimator``, or None: to adapt to the support set only.
    """
    if learner.device.type != "cpu":
        return len(tasks)
    support, query = tasks.support_x.shape[1], tasks.query_x.shape[1]
    rows, examples = 1, support
    if estimator is not None:
        rows, examples = estimator.rows_per_task, support + query * estimator.query_in_inner_problem
    at_once = math.ceil(WORK_AT_ONCE / (rows * examples * learner.parameter_count))
    if learner.fused and (estimator is None or estimator.first_order):
        at_once = max(at_once, math.ceil(ROWS_A_THREAD * torch.get_num_threads() / rows))
    return math.ceil(len(tasks) / math.ceil(len(tasks) / at_once))  # chunks of equal size


def estimate(estimator: Estimator, learner: Learner, theta: Tensor, tasks: TaskBatch,
             task_chunk: int | None = None, diagnose: bool = True) -> MeanEstimate:
    """The mean meta-gradient over ``tasks`` at ``theta`` [P], solving ``task_chunk`` tasks at once (None: all).

    ``diagnose``: also the query loss and the residual at the adapted parameters, at the cost of solving the
    unperturbed problem where the estimator does not, and of one more gradient.
    """
    total = torch.zeros_like(theta)
    query_loss, residual = [], []
    for part in tasks.split(task_chunk or len(tasks)):
        result = estimator(learner, theta, part)
        total += result.gradients.sum(0)
        if diagnose:
            adapted = result.adapted()
            with torch.no_grad():
                query_loss.append(learner.query_loss(adapted.phi.detach(), part))
            residual.append(adapted.residual)
    return MeanEstimate(total / len(tasks), torch.cat(query_loss) if diagnose else None,
                        torch.cat(residual) if diagnose else None)


@dataclass(frozen=True)
class MetaGradient:
    """``gradient``: {parameter name: tensor of its shape}, the mean over tasks. ``query_loss`` [T]: fᵢ at the
    unperturbed adapted parameters. ``residual`` [T]: the norm of the inner problem's gradient there."""

    gradient: dict[str, Tensor]
    query_loss: Tensor
    residual: Tensor


def meta_gradient(estimator: Estimator, model: nn.Module, loss_fn: LossFn, tasks: TaskBatch,
                  task_chunk: int | None = None) -> MetaGradient:
    """The meta-gradient at a model's present parameters, by any estimator.

    ``model``: any module whose loss depends on its parameters and inputs alone; it is not changed.
    ``loss_fn(outputs, targets)`` returns the mean loss of one task's examples. ``task_chunk``: how many tasks are
    solved at once (None: all); fewer take less memory. Dtype and device follow the model.

    Raises ValueError for a model with batch statistics or active dropout, and for tasks of another device.
    """
    learner = Learner(model, loss_fn)
    if task_chunk is not None:
        whole_number("task_chunk", task_chunk)
    if tasks.support_x.device != learner.device:
        raise refuse("tasks", f"tensors on {tasks.support_x.device}", f"the model's device, {learner.device}")
    result = estimate(estimator, learner, learner.theta(), tasks.to(dtype=learner.dtype), task_chunk)
    assert result.query_loss is not None
    assert result.residual is not None
    return MetaGradient(learner.fold(result.gradient), result.query_loss, result.residual)
