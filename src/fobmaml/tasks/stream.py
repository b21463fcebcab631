"""Tasks in the order in which loaders bring them: more than fit in memory, or without an end."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.tasks.batch import Split, TaskBatch

TAKES = "a loader of fobmaml.TaskBatch or of (support_x, support_y, query_x, query_y), each [tasks, examples, ...]"


class Stream:
    """A ``TaskSource`` of batches of tasks that a ``torch.utils.data.DataLoader`` brings, or anything else that can be
    gone through more than once.

    ``train`` is gone through again and again; meta-step t of b tasks takes tasks t·b, ..., t·b + b − 1 (``seek``), so
    that a run continued from a checkpoint goes on at its place: it passes over what it had, and ``load_state_dict``
    refuses a stream that is another one. Everything that the loaders draw by torch's own generator, the order of
    ``shuffle=True`` and random changes of examples, is a function of ``seed``. Of ``validation`` and ``test`` the first
    tasks are kept.

    ``outputs``, ``loss_fn``, ``classification``, ``support_loss``: as of ``TaskSource``. The tasks of a meta-step need
    equal numbers of examples, or masks for all (``TaskBatch.padded``). Raises ValueError for a loader of something
    else, and, where tasks are asked for, for one that has none or too few.
    """

    def __init__(
        self,
        train: Iterable[Any],
        validation: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        *,
        outputs: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        classification: bool = True,
        support_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ):
        self.outputs, self.loss_fn, self.classification = outputs, loss_fn, classification
        self.support_loss = support_loss or loss_fn
        self._seed = whole_number("seed", seed, at_least=0, at_most=2**63 - 1)
        self._loaders: dict[Split, Iterable[Any] | None] = {"train": train, "validation": validation, "test": test}
        self._kept: dict[Split, list[TaskBatch]] = {"train": [], "validation": [], "test": []}
        self._wanted, self._flow = 0, _Flow(train, self._seed)
        first = self._first("train", 1)
        self.input_shape = tuple(first.support_x.shape[2:]) if first.layout is None else first.layout.input_shape

    def seek(self, position: int) -> None:
        """The next training tasks that are drawn are those from number ``position`` on."""
        self._wanted = position

    def sample(self, split: Split, count: int, generator: torch.Generator) -> TaskBatch:
        """Of training tasks those at ``seek``'s place, of the others the first ones."""
        if split != "train" or self._wanted == 0:  # asked for at other times, too, without going back
            return self._first(split, count)
        if self._wanted < self._flow.position:
            self._flow = _Flow(self._flow.loader, self._seed)
        self._flow.skip(self._wanted - self._flow.position)
        return self._flow.take(count)

    def _first(self, split: Split, count: int) -> TaskBatch:
        loader, kept = self._loaders[split], self._kept[split]
        if loader is None:
            raise refuse("split", split, f"one that has a loader: {split}=")
        if sum(map(len, kept)) < count:
            kept[:] = [_Flow(loader, self._seed, again=split == "train").take(count)]
        return kept[0][:count]

    def state_dict(self) -> dict[str, int]:
        """How far training tasks were taken, and a sum of them."""
        return {"position": self._flow.position, "sum": self._flow.sum}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Passes over the tasks that there were. Raises ValueError if they are others now."""
        if self._flow.position > state["position"]:
            self._flow = _Flow(self._flow.loader, self._seed)
        self._flow.skip(state["position"] - self._flow.position)
        if self._flow.sum != state["sum"]:
            raise ValueError(
                "dataset: the stream's first tasks are not those that the checkpoint has seen, so that it cannot go on "
                "at the same place: takes loaders whose order and random numbers are torch's"
            )


class _Flow:
    """The tasks of a loader one after another, from the beginning; ``again``: and again at its end."""

    def __init__(self, loader: Iterable[Any], seed: int, again: bool = True):
        self.loader, self.again = loader, again
        self.position = self.sum = 0
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._batches: Iterator[Any] | None = None
        self._rest: TaskBatch | None = None

    def skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._some(count))

    def take(self, count: int) -> TaskBatch:
        parts: list[TaskBatch] = []
        while (missing := count - sum(map(len, parts))) > 0:
            parts.append(self._some(missing))
        return TaskBatch.joined(parts) if len(parts) > 1 else parts[0]

    def _some(self, at_most: int) -> TaskBatch:
        """The next tasks of a batch."""
        batch = self._rest if self._rest is not None else self._next()
        some, self._rest = batch[:at_most], batch[at_most:] if len(batch) > at_most else None
        self.position += len(some)
        for task in some.split(1):
            for tensor in task.tensors().values():
                numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                self.sum = zlib.crc32(numbers.data, self.sum)
        return some

    def _next(self) -> TaskBatch:
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(self._random)
            found = None if self._batches is None else next(self._batches, None)
            if found is None and (self._batches is None or self.again):
                self._batches = iter(self.loader)
                found = next(self._batches, None)
            self._random = torch.random.get_rng_state()
        if found is None:
            raise refuse("tasks", self.position, f"more of {type(self.loader).__name__}, which brings no others")
        return found if isinstance(found, TaskBatch) else _batch(found)


def _batch(found: Any) -> TaskBatch:
    if not isinstance(found, Sequence) or len(found) != 4:
        got = f"{type(found).__name__}" + (f" of {len(found)}" if isinstance(found, Sequence) else "")
        raise refuse("train", got, TAKES)
    return TaskBatch(*found)
