"""Who computes a meta-gradient in the benchmark: every estimator here, other libraries, and torch and JAX by hand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax_peer
import numpy as np
import torch
from jax_peer import Work, Worker
from peers import PEERS, in_our_layout, plain_network
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fobmaml import estimators
from fobmaml.arguments import number
from fobmaml.engine import Learner
from fobmaml.estimators import Estimator, chunk_size, estimate
from fobmaml.measure import peak_bytes
from fobmaml.models import CNN1d
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D, TaskBatch

TASKS = 16
INNER_LR, COMPARED_LR = 0.1, 0.01
TOLERANCE = 1e-4
"""Of the relative distance between another library's meta-gradient and ours."""
ESTIMATORS: dict[str, Callable[[GradientDescent], Estimator]] = {
    "forward": estimators.Forward,
    "symmetric": estimators.Symmetric,
    "central4": estimators.Central,
    "maml": estimators.MAML,
    "maml_checkpoint": partial(estimators.MAML, checkpoint=True),
    "fomaml": estimators.FOMAML,
    "reptile": lambda solver: estimators.Reptile(GradientDescent(solver.steps, solver.rates, batch=10)),
    "imaml": estimators.IMAML,
}
OPERATORS = "symmetric_operators"
"""Our symmetric estimator by torch's operators, without the compiled kernel."""


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Workers:
    """The processes of JAX, by number of threads and precision; nothing starts before it is used."""

    started: dict[tuple[int, bool], Worker] = field(default_factory=dict)

    def get(self, threads: int, double: bool) -> Worker:
        return self.started.setdefault((threads, double), Worker(threads, double))

    def stop(self) -> None:
        for worker in self.started.values():
            worker.stop()


class Setting:
    """A width and a number of inner steps: the network, and the tasks."""

    def __init__(self, width: int, steps: int, dtype: torch.dtype = torch.float32, lr: float = INNER_LR):
        self.steps, self.lr, source = steps, lr, MNIST1D()
        generator = torch.Generator().manual_seed(0)
        self.tasks = source.sample("train", TASKS, generator).keyed(generator).to(dtype=dtype)
        torch.manual_seed(0)
        self.model = CNN1d(source.input_shape, source.outputs, width).to(dtype)
        self.loss_fn = source.loss_fn

    def estimator(self, name: str) -> Estimator:
        return ESTIMATORS[name](GradientDescent(self.steps, self.lr))

    def finite_difference(self) -> tuple[float, float]:
        """λ and ν of our symmetric estimator."""
        symmetric = estimators.Symmetric(GradientDescent(self.steps, self.lr))
        return symmetric.lam, number("nu", symmetric.nu)


class Candidate:
    """Who computes the mean meta-gradient of a setting's tasks with so many ``threads``.

    ``at_once``: tasks in memory at a time; ``a_call``: tasks that a call is given. ``how``: which of several ways to
    write it, where there are several.
    """

    engine = "autograd"
    how = ""
    at_once = a_call = 1

    def __init__(self, setting: Setting, threads: int):
        self.setting, self.threads = setting, threads

    def gradient(self, tasks: TaskBatch, limit: float | None = None) -> Any:
        """In a layout of its own. Raises jax_peer.TooLong after ``limit`` seconds, if it can."""
        raise NotImplementedError

    def in_our_layout(self, gradient: Any) -> Tensor:
        """What ``gradient`` returned, as a flat vector of our parameters."""
        return gradient

    def prepare(self, tasks: TaskBatch) -> None:
        """What has to be done before a call on so many tasks, and is not timed."""

    def calls(self, tasks: TaskBatch, limit: float | None = None) -> list[Callable[[], object]]:
        """One for each of the parts of the tasks."""
        return [partial(self.gradient, part, limit) for part in tasks.split(self.a_call)]

    def peak_bytes(self, tasks: TaskBatch) -> int:
        """Of a call."""
        return peak_bytes(partial(self.gradient, tasks))

    def multiply_adds(self, tasks: TaskBatch) -> int:
        """Of a call."""
        with FlopCounterMode(display=False) as counter:
            self.gradient(tasks)
        return round(counter.get_total_flops() / 2)

    def compile_seconds(self, tasks: TaskBatch) -> float | None:
        return None


class Ours(Candidate):
    """``chunk``: tasks at once, None for task_chunk=auto."""

    def __init__(self, setting: Setting, name: str, threads: int, engine: str = "auto", chunk: int | None = None):
        super().__init__(setting, threads)
        self.name, self.estimator, self.asked = name, setting.estimator(name), engine
        self.learner = Learner(setting.model, setting.loss_fn, engine)
        self.theta = self.learner.theta()
        self.at_once = self.a_call = chunk or chunk_size(self.learner, setting.tasks, self.estimator)

    @property
    def engine(self) -> str:  # type: ignore[override]  # it is known when it has been used
        return self.learner.used

    def gradient(self, tasks: TaskBatch, limit: float | None = None) -> Tensor:
        with threads_of_torch(self.threads):
            return estimate(self.estimator, self.learner, self.theta, tasks, self.at_once, diagnose=False).gradient

    def multiply_adds(self, tasks: TaskBatch) -> int:
        """The counter sees torch's operators only, so the same computation is counted there."""
        if self.asked == "stacked":
            return super().multiply_adds(tasks)
        return Ours(self.setting, self.name, self.threads, "stacked", self.at_once).multiply_adds(tasks)


class ByTorch(Candidate):
    """One of PEERS."""

    def __init__(self, setting: Setting, name: str, threads: int):
        super().__init__(setting, threads)
        self.peer, self.network = PEERS[name], plain_network(setting.model)
        self.settings = setting.finite_difference() if self.peer.method == "symmetric" else ()

    def gradient(self, tasks: TaskBatch, limit: float | None = None) -> list[Tensor]:
        with threads_of_torch(self.threads):
            return self.peer.gradient(self.network, tasks, self.setting.steps, self.setting.lr, *self.settings)

    def in_our_layout(self, gradient: Sequence[Tensor]) -> Tensor:
        return in_our_layout(gradient)


class ByJax(Candidate):
    """One of jax_peer.METHODS, written as ``how`` of jax_peer.HOW says; a call is given all tasks."""

    engine = "jax"
    a_call = TASKS

    def __init__(self, setting: Setting, name: str, threads: int, how: str, workers: Workers):
        super().__init__(setting, threads)
        self.how, self.method = how, jax_peer.METHODS[name]
        self.at_once = TASKS if how.endswith("vmap") else 1
        self.worker = workers.get(threads, setting.tasks.support_x.dtype == torch.float64)
        *convolutions, head = (p.detach() for name, p in setting.model.named_parameters() if name.endswith("weight"))
        biases = (p.detach() for name, p in setting.model.named_parameters() if name.endswith("bias"))
        weights = (*convolutions, head.view(len(head), convolutions[-1].shape[0], -1))
        self.layers = [(w.permute(2, 1, 0).numpy().copy(), b.numpy()) for w, b in zip(weights, biases, strict=True)]
        self.works: dict[int, Work] = {}

    def work(self, tasks: TaskBatch) -> Work:
        """The first tasks of the setting are the same every time."""
        if len(tasks) not in self.works:
            setting = self.setting
            x, query_x = (part.numpy() for part in (tasks.support_x, tasks.query_x))
            y, query_y = (part.numpy().astype(np.int32) for part in (tasks.support_y, tasks.query_y))
            inner = (setting.steps, setting.lr, *setting.finite_difference())
            self.works[len(tasks)] = Work(
                self.method, self.how, *inner, setting.model.strides, self.layers, (x, y, query_x, query_y)
            )
        return self.works[len(tasks)]

    def gradient(self, tasks: TaskBatch, limit: float | None = None) -> Work:
        self.worker.run(work := self.work(tasks), limit)
        return work

    def in_our_layout(self, gradient: Work) -> Tensor:
        found = [[torch.tensor(part) for part in layer] for layer in self.worker.gradient(gradient)]
        *convolutions, (head, _) = found
        rows = [*(weights.permute(2, 0, 1) for weights, _ in convolutions), head.permute(2, 1, 0)]
        return torch.cat([torch.cat([row.flatten(), bias]) for row, (_, bias) in zip(rows, found, strict=True)])

    def prepare(self, tasks: TaskBatch) -> None:
        self.worker.prepare(self.work(tasks))

    def peak_bytes(self, tasks: TaskBatch) -> int:
        """What XLA sets aside."""
        return round(self.worker.prepare(self.work(tasks))["bytes"])

    def multiply_adds(self, tasks: TaskBatch) -> int:
        """Those of the same computation by torch."""
        return ByTorch(self.setting, f"loop_{self.method}", self.threads).multiply_adds(tasks)

    def compile_seconds(self, tasks: TaskBatch) -> float | None:
        return self.worker.prepare(self.work(tasks))["compile_seconds"]


def names(report: Callable[[str], object] = print) -> list[str]:
    """Everybody in the tables. Those whose library is not installed are left out, and said in a line each."""
    found = [*ESTIMATORS, OPERATORS]
    for name, missing in [
        *((name, peer.missing()) for name, peer in PEERS.items()),
        *((name, jax_peer.missing()) for name in jax_peer.METHODS),
    ]:
        if missing:
            report(f"{name} is left out: its library is not installed (make .venv/bench)")
        else:
            found.append(name)
    return found


def ways(name: str) -> tuple[str, ...]:
    """How it can be written."""
    return jax_peer.HOW if name in jax_peer.METHODS else ("",)


def candidate(setting: Setting, name: str, workers: Workers, how: str, threads: int) -> Candidate:
    if name in jax_peer.METHODS:
        return ByJax(setting, name, threads, how, workers)
    if name in PEERS:
        return ByTorch(setting, name, threads)
    if name == OPERATORS:
        return Ours(setting, "symmetric", threads, "stacked")
    return Ours(setting, name, threads)


def method_of(name: str) -> str | None:
    """The estimator that somebody else's meta-gradient is compared with."""
    return PEERS[name].method if name in PEERS else jax_peer.METHODS.get(name)


def gradient_error(name: str, how: str, width: int, steps: int, workers: Workers) -> float:
    """Relative distance of somebody else's meta-gradient, mean over two tasks, to ours by the same method.

    In float64, and with inner steps short enough for the inner loop to settle: the derivative of 200 longer ones can
    magnify rounding until two orders of summation give different vectors. Raises AssertionError above TOLERANCE.
    """
    setting, threads = Setting(width, steps, torch.float64, COMPARED_LR), torch.get_num_threads()
    tasks = setting.tasks[:2]
    ours = Ours(setting, str(method_of(name)), threads).gradient(tasks)
    other = candidate(setting, name, workers, how, threads)
    other.prepare(tasks)
    theirs = other.in_our_layout(other.gradient(tasks))
    error = float((theirs - ours).norm() / ours.norm())
    if not error <= TOLERANCE:
        raise AssertionError(
            f"{name} at width {width} and {steps} inner steps is {error:.1e} away from our {method_of(name)}"
        )
    return error
