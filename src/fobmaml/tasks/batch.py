"""A batch of tasks, and what a source of tasks offers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.tasks.layout import Layout, packed

Split = Literal["train", "validation", "test"]
"""What tasks are for; the three share no example."""


@dataclass(frozen=True)
class TaskBatch:
    """T tasks, each with a support (training) and a query (test) set.

    ``support_x`` [T, S, ...], ``support_y`` [T, S, ...], ``query_x`` [T, Q, ...], ``query_y`` [T, Q, ...]. Inputs may
    also be dictionaries or tuples of such tensors, which the model is then called with; here they are kept as the
    numbers of each example in one row, and ``layout`` says how to get them back. ``keys``
    [T], integers: a task's own decides what a solver draws of it that takes batches. ``support_mask`` [T, S],
    ``query_mask`` [T, Q]: of tasks with unequal numbers of examples, which there are; the others only fill the tensors
    up (``padded``), and count in no loss and no metric. Raises ValueError if the tensors do not belong together.

    >>> x, y = torch.randn(3, 20, 2), torch.randn(3, 20, 1)
    >>> len(fobmaml.TaskBatch(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:]))
    3
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    keys: Tensor | None = None
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    layout: Layout | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.support_x, Tensor):
            support, layout = packed("support_x", self.support_x)
            query, other = packed("query_x", self.query_x)
            if layout != other:
                raise refuse("query_x", other, f"tensors like support_x's: {layout}")
            for name, value in (("support_x", support), ("query_x", query), ("layout", layout)):
                object.__setattr__(self, name, value)
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

        for part in ("support", "query"):
            x, mask = getattr(self, f"{part}_x"), getattr(self, f"{part}_mask")
            if mask is None:
                continue
            if mask.dtype != torch.bool or mask.shape != x.shape[:2] or mask.device != x.device:
                got = f"{mask.dtype} {tuple(mask.shape)} on {mask.device}"
                raise refuse(f"{part}_mask", got, f"torch.bool {tuple(x.shape[:2])} on {x.device}, as {part}_x")
            if not mask.any(1).all():
                raise refuse(f"{part}_mask", "a task without examples", "at least one example a task")
        if self.keys is not None and (self.keys.dtype != torch.int64 or self.keys.shape != (len(self),)):
            raise refuse("keys", f"{self.keys.dtype} {tuple(self.keys.shape)}", f"torch.int64 ({len(self)},)")

    def __len__(self) -> int:
        return self.support_x.shape[0]

    @classmethod
    def padded(cls, tasks: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> "TaskBatch":
        """Tasks (support_x [S, ...], support_y, query_x [Q, ...], query_y), S and Q each task's own, as one batch: the
        shorter ones are filled up with copies of their last example, and masks say where. Raises ValueError if they do
        not belong together."""
        layout = None
        if not isinstance(tasks[0][0], Tensor):
            rows = [(packed("support_x", s_x, 1), s_y, packed("query_x", q_x, 1), q_y) for s_x, s_y, q_x, q_y in tasks]
            layout = rows[0][0][1]
            if any(part[1] != layout for row in rows for part in (row[0], row[2])):
                raise refuse("tasks", "inputs of different layouts", "the same tensors in every task")
            tasks = [(s_x[0], s_y, q_x[0], q_y) for s_x, s_y, q_x, q_y in rows]
        found: dict[str, Tensor | None] = {}
        columns = [*zip(*tasks, strict=True)]
        for of, (xs, ys) in {"support": columns[:2], "query": columns[2:]}.items():
            lengths = [len(x) for x in xs]
            if (labels := [len(y) for y in ys]) != lengths:
                raise refuse(f"{of}_y", f"{labels} examples a task", f"as many as {of}_x: {lengths}")
            if min(lengths) < 1:
                raise refuse(f"{of}_x", "a task without examples", "at least one example a task")
            sizes, places = np.array(lengths)[:, None], np.arange(max(lengths))
            chosen = sizes.cumsum()[:, None] - sizes + np.minimum(places, sizes - 1)
            rows_of = torch.from_numpy(chosen.ravel()).to(xs[0].device)
            for kind, parts in (("x", xs), ("y", ys)):
                if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
                    got = ", ".join(sorted({f"{part.dtype} [{len(part)}, *{list(part.shape[1:])}]" for part in parts}))
                    raise refuse(f"{of}_{kind}", got, "the same type and shape of an example in every task")
                joined = torch.cat(parts).index_select(0, rows_of)
                found[f"{of}_{kind}"] = joined.view(len(lengths), -1, *joined.shape[1:])
            whole = min(lengths) == max(lengths)
            found[f"{of}_mask"] = None if whole else torch.from_numpy(places < sizes).to(xs[0].device)
        return cls(**found, layout=layout)  # type: ignore[arg-type]

    def __getitem__(self, rows: slice | Tensor) -> "TaskBatch":
        changed: dict[str, Any] = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return self._like(changed) if isinstance(rows, slice) else replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}

    def _like(self, changed: dict[str, Tensor]) -> "TaskBatch":
        """With these tensors, which belong together as its own do and are not checked again."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), **changed)
        return other

    @classmethod
    def joined(cls, parts: Sequence["TaskBatch"]) -> "TaskBatch":
        """The tasks of all parts. Raises ValueError unless they have the same tensors, of the same shapes."""
        tensors = [part.tensors() for part in parts]
        kinds = {(part.layout, *((name, *t.shape[1:]) for name, t in part.tensors().items())) for part in parts}
        if len(kinds) > 1:
            raise refuse(
                "tasks", "batches of different shapes", "equal numbers of examples, or masks (TaskBatch.padded)"
            )
        joined: dict[str, Any] = {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}
        return replace(parts[0], **joined)

    @property
    def mask(self) -> Tensor | None:
        """Of support and query examples together, [T, S + Q]; None: all are there."""
        if self.support_mask is None and self.query_mask is None:
            return None
        parts = (self.support_mask, self.support_x), (self.query_mask, self.query_x)
        return torch.cat([x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for m, x in parts], dim=1)

    def keyed(self, *generators: torch.Generator) -> "TaskBatch":
        """The same tasks, with new ``keys``, each generator's for its share of them; by default torch's own."""
        share = len(self) // len(generators or (None,))
        keys = [torch.randint(2**62, (share,), generator=each) for each in generators or (None,)]
        return self._like({"keys": torch.cat(keys).to(self.support_x.device)})

    def pooled(self) -> "TaskBatch":
        """The same tasks, with all of their examples in the support set."""
        x, y = torch.cat([self.support_x, self.query_x], dim=1), torch.cat([self.support_y, self.query_y], dim=1)
        return replace(self, support_x=x, support_y=y, support_mask=self.mask)

    def split(self, count: int) -> Iterator["TaskBatch"]:
        """The tasks in order, ``count`` at a time; the last part may be smaller."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TaskBatch":
        """The same tasks on ``device``; floating-point tensors as ``dtype``, class labels as they are."""
        return self._like(
            {
                name: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
                for name, t in self.tensors().items()
            }
        )


class TaskSource(Protocol):
    """Where tasks come from. To add a data set, write a class with these members and a file in configs/dataset.

    Two more, if there are: ``support_loss``, as ``loss_fn``, for the support examples; ``novel_classes``, whether
    classes of test tasks are none of training's.
    """

    input_shape: tuple[int, ...]
    """Shape of one example; of several tensors, as ``tasks.layout.Layout.input_shape``."""
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

    if not TYPE_CHECKING:  # for a type checker, a source need not have it

        @staticmethod
        def from_dataloader(*loaders, **settings):
            """A source of batches of tasks that data loaders bring: ``fobmaml.tasks.Stream``."""
            from fobmaml.tasks.stream import Stream

            return Stream(*loaders, **settings)
