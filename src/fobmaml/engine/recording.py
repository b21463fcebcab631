"""What torch's operators are called on while a function runs once, whatever class or function calls them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import functionalize
from torch.utils._python_dispatch import TorchDispatchMode

WRITE_BACK = torch.ops.aten.copy_.default
OF_ITS_OWN = torch.ops.aten.add_.Scalar
"""Torch's norm by the root of the mean square adds ε to the mean, below what makes new tensors of writes: where it is
known (``engine.root_mean_square``), the mean is nobody else's."""


class UnknownLayerError(Exception):
    """A module is no sequence of known operations; the text names the layer that decided."""


@dataclass(eq=False)
class Value:
    """A tensor that was given, or came of an operation: its shape, and how many operations take it."""

    shape: tuple[int, ...]
    uses: int = 0


@dataclass(eq=False)
class Operation:
    """A call of ``target``, one of torch's operators, in ``layer``. In ``args`` and ``kwargs`` a Value stands for each
    tensor that came of those given, and ``taken`` are these; other tensors are as they are. ``made``: its results."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    taken: list[Value]
    made: list[Value]
    layer: str

    def refuse(self, why: str = "") -> NoReturn:
        raise UnknownLayerError(f"{self.layer} ({why or self.target})")


class _Operations:
    """What ``Recording`` does of itself: a class of its own, as a method that ``TorchDispatchMode`` sees is wrapped by
    what takes seconds to import."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.operations = "the module", list[Operation]()
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets its number

    def entered(self, layer: str) -> Callable[[], None]:
        """Operations from here on are those of ``layer``; returns how to undo it."""
        before, self.layer = self.layer, layer

        def undo() -> None:
            self.layer = before

        return undo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken: dict[Value, None] = {}

        def value(each: Any) -> Any:
            if (known := self._values.get(id(each))) is not None:
                taken[known] = None
                return known
            return type(each)(map(value, each)) if type(each) in (list, tuple) else each

        found = func(*args, **(kwargs or {}))
        named = {name: value(each) for name, each in (kwargs or {}).items()}
        operation = Operation(func, value(args), named, list(taken), [], self.layer)
        several = found if type(found) in (list, tuple) else [found]
        if taken and not all(isinstance(each, Tensor) for each in several):
            operation.refuse()
        if taken:
            operation.made = [self._value_of(each) for each in several]
            self.operations.append(operation)
        return found

    def _value_of(self, tensor: Tensor) -> Value:
        self._kept.append(tensor)
        return self._values.setdefault(id(tensor), Value(tuple(tensor.shape)))


class Recording(_Operations, TorchDispatchMode):
    """``operations`` in their order, each of the layer that ``entered`` names."""

    def of(
        self, call: Callable[..., Any], parameters: Sequence[Tensor], x: Tensor
    ) -> tuple[list[Value], Value, Value | None]:
        """Of ``call(parameters, x)``: what stands for the parameters, for ``x``, and for the result (None where that is
        no tensor that came of them). Afterwards ``operations`` are those that the result depends on. What writes into
        a tensor is recorded as what it computes, and the tensors given are not changed. Raises UnknownLayerError where
        anything but tensors comes of a tensor, and for operations that write all the same."""
        with torch.inference_mode(False), torch.no_grad():
            given = [tensor.clone() for tensor in (*parameters, x)]
            values = [self._value_of(tensor) for tensor in given]
            with self:
                result = functionalize(call, remove="mutations")(given[:-1], given[-1])
        while self.operations and self.operations[-1].target is WRITE_BACK and self.operations[-1].args[0] in values:
            self.operations.pop()  # what the function has written into what it was given
        for operation in self.operations:
            if operation.target._schema.is_mutable and operation.target is not OF_ITS_OWN:
                operation.refuse()
        end = self._values.get(id(result))
        needed, kept = {end}, []
        for operation in reversed(self.operations):
            if not needed.isdisjoint(operation.made):
                needed.update(operation.taken)
                kept.append(operation)
                for value in operation.taken:
                    value.uses += 1
        self.operations = kept[::-1]
        return values[:-1], values[-1], end
