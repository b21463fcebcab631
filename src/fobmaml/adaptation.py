"""A network adapted to tasks by their support sets: what a trained initialisation is for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.engine import Learner
from fobmaml.engine.losses import LossFn
from fobmaml.engine.modules import private_copy
from fobmaml.engine.selection import Adapt
from fobmaml.estimators import chunk_size
from fobmaml.precision import full_precision
from fobmaml.solvers import InnerProblem, Solution, Solver
from fobmaml.tasks import TaskBatch


class AdaptedTasks:
    """One network, that of ``learner``, with its own parameters φᵢ for each of T tasks, ``phi`` [T, P].

    ``tasks(x)``: the outputs of all, [T, N, ...] -> [T, N, ...], ``chunk`` tasks at once and without a graph.
    ``tasks[i]``: task i's network as a module of its own, see ``adapt``. ``len(tasks)`` is T.
    """

    def __init__(self, learner: Learner, phi: Tensor, chunk: int):
        self.learner, self.phi, self.chunk = learner, phi, chunk

    def __len__(self) -> int:
        return len(self.phi)

    def __getitem__(self, task: int) -> nn.Module:
        with torch.inference_mode(False), torch.no_grad():
            model = private_copy(self.learner.model, share=False)
            parameters = dict(model.named_parameters())
            for name, values in self.learner.unflatten(self.phi[task]).items():
                parameters[name].copy_(values)
        return model

    def __call__(self, x: Any) -> Tensor:
        x = placed(self.learner, "x", x)
        if x.dim() < 2 or len(x) != len(self):
            raise refuse("x", list(x.shape), f"[{len(self)} tasks, examples, ...]")
        parts = zip(self.phi.split(self.chunk), x.split(self.chunk), strict=True)
        with full_precision(self.learner.device):
            return torch.cat([self.learner.outputs(phi, examples) for phi, examples in parts])


def adapt(
    model: nn.Module,
    solver: Solver,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    lam: float = 0.0,
    engine: str = "auto",
    adapt: Adapt = "all",
) -> nn.Module:
    """``model``, adapted to one task: a module of the same class with the parameters φ ≈ argmin f̂(φ) + (λ/2)‖φ − θ‖².

    ``x``, ``y``: its support set, [S, ...] each, tensors or NumPy arrays; there need be no query set. ``loss_fn``,
    ``engine`` and ``adapt``, what moves: as in ``meta_gradient``. ``lam``: λ, 0 for no proximal term. The module shares
    nothing with ``model``, which comes back as it was, and is the caller's own: to call, train, save or export. Cost:
    the solver's K gradients of S examples.
    Raises ValueError for a bad argument.

    >>> x, y = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    >>> network = fobmaml.adapt(model, fobmaml.solvers.GradientDescent(steps=1, lr=0.1), loss_fn, x, y)
    >>> network(x).item(), model(x).item()
    (0.2..., 0.0)
    """
    return adapt_tasks(model, solver, loss_fn, one_task("x", x), one_task("y", y), lam, None, engine, adapt)[0]


def adapt_tasks(
    model: nn.Module,
    solver: Solver,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    lam: float = 0.0,
    task_chunk: int | str | None = "auto",
    engine: str = "auto",
    adapt: Adapt = "all",
) -> AdaptedTasks:
    """``adapt`` to many tasks at once: ``x``, ``y`` [T, S, ...].

    ``task_chunk``, ``engine``: as in ``meta_gradient``; ``lam`` and the others as in ``adapt``.
    Cost: the solver's K gradients of S examples a task. Memory: T rows of P parameters, and the work of one chunk.
    Raises ValueError for a bad argument.

    >>> x, y = torch.ones(3, 1, 1), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    >>> networks = fobmaml.adapt_tasks(model, solver, loss_fn, x, y)
    >>> networks(x).flatten()
    tensor([1.0000, 2.0000, 3.0000])
    """
    if not isinstance(solver, Solver):
        raise refuse("solver", type(solver).__name__, "a fobmaml.solvers.Solver")
    lam = number("lam", lam, at_least=0.0)
    with torch.inference_mode(False):
        learner = Learner(model, loss_fn, engine, adapt)
        theta = learner.theta()
        return adapted(learner, lambda part: solver.solve(InnerProblem(learner, theta, part, lam)), x, y, task_chunk)


def adapted(
    learner: Learner,
    solve: Callable[[TaskBatch], Solution],
    x: Any,
    y: Any,
    task_chunk: int | str | None = "auto",
) -> AdaptedTasks:
    """``solve`` of tasks with the support sets ``x``, ``y`` [T, S, ...], ``task_chunk`` at once."""
    if isinstance(task_chunk, str):
        one_of("task_chunk", task_chunk, ("auto",))
    elif task_chunk is not None:
        whole_number("task_chunk", task_chunk)
    with torch.inference_mode(False), full_precision(learner.device):
        x, y = placed(learner, "x", x), placed(learner, "y", y)
        tasks = learner.check(TaskBatch(x, y, x, y))  # nothing looks at the query set
        # A solver that takes batches draws the same for every task, so that none depends on those beside it.
        tasks = replace(tasks, keys=torch.zeros(len(tasks), dtype=torch.long, device=learner.device))
        chunk = chunk_size(learner, tasks) if isinstance(task_chunk, str) else task_chunk or len(tasks)
        return AdaptedTasks(learner, torch.cat([solve(part).phi.detach() for part in tasks.split(chunk)]), chunk)


def placed(learner: Learner, name: str, values: Any) -> Tensor:
    """A tensor or array as a tensor on the network's device, floating-point values in its dtype."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(name, type(values).__name__, f"a tensor or an array of numbers ({error})") from None
    return values.to(learner.device, learner.dtype if values.is_floating_point() else None)


def one_task(name: str, values: Any) -> Any:
    """[S, ...] as [1, S, ...]."""
    if not hasattr(values, "shape") or not len(values.shape):
        raise refuse(name, type(values).__name__, "a tensor or an array [examples, ...]")
    return values[None]
