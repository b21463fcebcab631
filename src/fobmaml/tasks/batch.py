"""A batch of tasks, and what a source of tasks offers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from fobmaml.arguments import refuse

Split = Literal["train", "validation", "test"]
"""What tasks are for; the three share no example."""


@dataclass(frozen=True)
class TaskBatch:
    """T tasks, each with a support (training) and a query (test) set.

    ``support_x`` [T, S, ...], ``support_y`` [T, S, ...], ``query_x`` [T, Q, ...], ``query_y`` [T, Q, ...]. ``keys``
    [T], integers: a task's own decides what a solver draws of it that takes batches. Raises ValueError if the tensors
    do not belong together.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("support_x", "support_y", "query_x", "query_y"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dim() < 2:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise refuse(name, got, "a tensor [tasks, examples, ...]")
            if tensor.shape[0] != self.support_x.shape[0] or 0 in tensor.shape[:2]:
                raise refuse(
                    name,
                    tuple(tensor.shape),
                    f"a tensor of {self.support_x.shape[0]} tasks with at least one example each",
                )
        for part in ("support", "query"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if x.shape[1] != y.shape[1]:
                raise refuse(f"{part}_y", tuple(y.shape), f"{x.shape[1]} examples a task, as in {part}_x")
        for kind in ("x", "y"):
            s, q = getattr(self, f"support_{kind}"), getattr(self, f"query_{kind}")
            if s.shape[2:] != q.shape[2:] or s.dtype != q.dtype or s.device != q.device:
                raise refuse(
                    f"query_{kind}",
                    f"{q.dtype} {tuple(q.shape)} on {q.device}",
                    f"examples like support_{kind}'s: {s.dtype} [..., *{tuple(s.shape[2:])}] on {s.device}",
                )

        if self.keys is not None and (self.keys.dtype != torch.int64 or self.keys.shape != (len(self),)):
            raise refuse("keys", f"{self.keys.dtype} {tuple(self.keys.shape)}", f"torch.int64 ({len(self)},)")

    def __len__(self) -> int:
        return self.support_x.shape[0]

    def __getitem__(self, rows: slice) -> "TaskBatch":
        keys = None if self.keys is None else self.keys[rows]
        return TaskBatch(self.support_x[rows], self.support_y[rows], self.query_x[rows], self.query_y[rows], keys)

    def keyed(self, generator: torch.Generator | None = None) -> "TaskBatch":
        """The same tasks, with new ``keys`` from ``generator``, torch's own by default."""
        keys = torch.randint(2**62, (len(self),), generator=generator).to(self.support_x.device)
        return replace(self, keys=keys)

    def pooled(self) -> "TaskBatch":
        """The same tasks, with all of their examples in the support set."""
        x, y = torch.cat([self.support_x, self.query_x], dim=1), torch.cat([self.support_y, self.query_y], dim=1)
        return replace(self, support_x=x, support_y=y)

    def split(self, count: int) -> Iterator["TaskBatch"]:
        """The tasks in order, ``count`` at a time; the last part may be smaller."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TaskBatch":
        """The same tasks on ``device``; floating-point tensors as ``dtype``, class labels as they are."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        keys = None if self.keys is None else self.keys.to(device)
        return TaskBatch(move(self.support_x), move(self.support_y), move(self.query_x), move(self.query_y), keys)


class TaskSource(Protocol):
    """Where tasks come from. To add a data set, write a class with these members and a file in configs/dataset."""

    input_shape: tuple[int, ...]
    """Shape of one example."""
    outputs: int
    """Number of values that the network returns for one example: classes, where ``classification``."""
    classification: bool
    """Whether ``argmax`` of the outputs is a class, so that an accuracy exists (``measure.accuracy``: of which shapes).
    """
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    """(outputs [N, ...], targets [N, ...]) -> mean loss, a scalar. In a class body: ``staticmethod(function)``."""

    def sample(self, split: Split, count: int, generator: torch.Generator) -> TaskBatch:
        """``count`` tasks of a split, on the CPU; all randomness from ``generator``. Labels of classes are 0 ...
        ``outputs`` − 1, or what the loss ignores: −100, or its ``ignore_index``."""
        ...
