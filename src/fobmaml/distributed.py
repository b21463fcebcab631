"""One run on several processes, started by torchrun.

The first process holds the state of the run: it trains, measures and writes. Before each meta-step it sends the
parameters to the others; every process computes the meta-gradient of its share of the tasks; the first receives the
mean. The others keep nothing from one step to the next. With one process nothing here communicates.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fobmaml.tasks import TaskBatch

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""The others wait while the first one measures. Where a process ends, the rest learn it at once, not so late."""
END = -1


class ProcessLost(RuntimeError):
    """Another process of this run has failed or ended."""


def rank() -> int:
    """0 in the first process."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def size() -> int:
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, on entry; alone, it does nothing."""
    if size() > 1:
        with _losses_named():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        if dist.is_initialized():
            with suppress(RuntimeError):  # where a process is gone, what it led to here has come first
                dist.destroy_process_group()


def everywhere(call: Callable[[], T]) -> T:
    """What ``call()`` returns here, if it returns in every process. Raises its error, or ProcessLost with another's."""
    if size() == 1:
        return call()
    errors: list[str | None] = [None] * size()
    try:
        result = call()
    except Exception as error:
        with suppress(RuntimeError):  # of the gather, where a process is gone: this error came first
            dist.all_gather_object(errors, str(error) or type(error).__name__)
        raise
    with _losses_named():
        dist.all_gather_object(errors, None)
    for process, text in enumerate(errors):
        if text is not None:
            raise ProcessLost(f"process {process} of {size()}: {text}")
    return result


def share(tasks: TaskBatch) -> TaskBatch:
    """This process's tasks of a meta-batch: as equal parts as there are processes."""
    edges = [len(tasks) * process // size() for process in (rank(), rank() + 1)]
    return tasks[slice(*edges)]


def announce(step: int, fraction: float, logged: bool, theta: Tensor) -> None:
    """The first process says which meta-step is next, how much of training is behind it, whether it is logged, and its
    parameters ``theta`` [P]; or that there is none: ``END``."""
    if size() == 1:
        return
    with _losses_named():
        dist.broadcast(torch.tensor([step, fraction, logged], dtype=torch.float64, device=theta.device), 0)
        if step != END:
            dist.broadcast(theta, 0)


def end(device: torch.device) -> None:
    """The first process says that no meta-step is left: the others' ``turns`` end."""
    with suppress(ProcessLost):
        announce(END, 1.0, False, torch.zeros(0, device=device))


def turns(theta: Tensor) -> Iterator[tuple[int, float, bool]]:
    """In the other processes: (step, fraction, logged) of every meta-step, its parameters in ``theta`` [P]."""
    turn = torch.zeros(3, dtype=torch.float64, device=theta.device)
    while True:
        with _losses_named():
            dist.broadcast(turn, 0)
            step, fraction, logged = turn.tolist()
            if step == END:
                return
            dist.broadcast(theta, 0)
        yield int(step), fraction, bool(logged)


def mean(values: Tensor, tasks: int, of: int) -> Tensor:
    """In the first process: the mean over all ``of`` tasks of ``values``, here the mean over ``tasks`` of them."""
    if size() == 1:
        return values
    total = values * tasks
    with _losses_named():
        dist.reduce(total, 0)
    return total / of


def total(counts: Sequence[int]) -> list[int]:
    """In the first process: of each of ``counts`` the sum over the processes."""
    if size() == 1:
        return list(counts)
    summed = torch.tensor(counts)
    with _losses_named():
        dist.reduce(summed, 0)
    return summed.tolist()


@contextmanager
def _losses_named() -> Iterator[None]:
    """torch.distributed raises some RuntimeError where a process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("another process of this run has ended") from error
