"""A module's operations, recorded while it runs once: as nodes, where all are known and each follows the one before."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fobmaml.engine.modules import PureModule
from fobmaml.engine.nodes import Activate, Conv, Flatten, GroupNorm, Linear, Node, Pool, Reshape
from fobmaml.engine.recording import Operation, Recording, UnknownLayerError, Value

aten = torch.ops.aten
SAME_VALUES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.alias.default,
    aten.clone.default,
)
"""Operations that give the values of each example in their order, where they give as many."""
ELEMENTWISE = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.tanh.default: "tanh",
    aten.gelu.default: "gelu",
    aten.softplus.default: "softplus",
}
"""With their defaults, of which torch names softplus's: slope and threshold."""
SOFTPLUS = 1, 20
POOLS = {aten.max_pool2d_with_indices.default: "max", aten.avg_pool2d.default: "average"}


def trace(module: PureModule, parameters: Mapping[str, Tensor], x: Tensor) -> list[Node]:
    """The operations of ``module`` with ``parameters`` on examples like ``x`` [N, ...], in their order.

    Where nodes are found, they are what was done to these inputs: that the module does the same to others, and has the
    derivatives that they have, is to be tried. Raises UnknownLayerError for an operation that there is no node for,
    values that are used twice, parameters that are used twice or not at all, and hooks; besides, what the module does.
    """
    for name, layer in module.model.named_modules():
        if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
            raise UnknownLayerError(f"{type(layer).__name__} '{name}' has hooks")
    names, recording = list(parameters), Recording()

    def call(values: Sequence[Tensor], inputs: Tensor) -> Tensor:
        return module(dict(zip(names, values, strict=True)), inputs)

    with module.noting(recording.entered):
        given, start, end = recording.of(call, list(parameters.values()), x)
    reading = _Reading(dict(zip(given, names, strict=True)), start)
    for operation in recording.operations:
        reading.read(operation)
    if end is not reading.at:
        raise UnknownLayerError("the module (output)")
    if reading.unused:
        raise UnknownLayerError(f"parameter '{next(iter(reading.unused.values()))}' is not used")
    return reading.nodes


class _Reading:
    """``nodes`` of operations, of which each takes what the one before has made, from ``start`` on, and parameters."""

    def __init__(self, parameters: dict[Value, str], start: Value):
        self.unused, self.at = parameters, start
        self.examples, self.shape = start.shape[0], start.shape[1:]
        self.before = self.shape  # of the last reshaping
        self.nodes: list[Node] = []
        self.turned: dict[Value, Value] = {}  # transposed matrices, and what they were

    def _expect(self, known: bool, operation: Operation) -> None:
        if not known:
            operation.refuse()

    def read(self, operation: Operation) -> None:
        what: Any = operation.target
        given: list[Any] = [*operation.args, *[None] * 10]
        if what is aten.t.default and given[0] in self.unused:
            self.turned[operation.made] = given[0]
            return
        below = given[1] if what is aten.addmm.default else given[0]
        self._expect(below is self.at, operation)
        if self.at.uses > 1:
            operation.refuse("whose inputs go elsewhere, too")
        self.at, shape = operation.made, operation.made.shape
        self._expect(len(shape) > 1 and shape[0] == self.examples, operation)
        after = shape[1:]
        if what in SAME_VALUES:
            self._expect(math.prod(after) == math.prod(self.shape), operation)
            self._reshape(after)
        elif what in ELEMENTWISE:
            self._expect(operation.args[1:] in ((), SOFTPLUS) and not operation.kwargs, operation)
            self.nodes.append(Activate(ELEMENTWISE[what]))
        elif what is aten.convolution.default:
            self._expect(not given[6] and len(given[3]) == len(after) - 1 < 3, operation)
            sizes = (_pair(given[3], 1), _pair(given[4], 0), _pair(given[5], 1))
            self.nodes.append(
                Conv(self._name(given[1], operation), self._name_if(given[2], operation), *sizes, given[8])
            )
        elif what in (aten.addmm.default, aten.mm.default):
            bias, weight = (given[0], given[2]) if what is aten.addmm.default else (None, given[1])
            self._expect(not operation.kwargs and weight in self.turned, operation)
            self.nodes.append(Linear(self._name(self.turned.pop(weight), operation), self._name_if(bias, operation)))
        elif what is aten.native_group_norm.default:
            weight, bias = self._name_if(given[1], operation), self._name_if(given[2], operation)
            self.nodes.append(GroupNorm(given[6], weight, bias, given[7]))
        elif what in POOLS:
            self._expect(not operation.kwargs and len(self.shape) == 3, operation)
            self._pool(operation, POOLS[what], given)
        elif what is aten.mean.dim or what is aten._adaptive_avg_pool2d.default:
            self._average(operation, given[1], after)
        else:
            operation.refuse()
        self.shape = after

    def _pool(self, operation: Operation, kind: str, given: Sequence[Any]) -> None:
        kernel, padding = _both(given[1]), _both(given[3] or [0])
        stride = _both(given[2]) if given[2] else kernel
        if operation.target is aten.avg_pool2d.default:
            exact = not any(padding) or given[5] is not False  # count_include_pad
            self._expect(not given[4] and exact and given[6] is None, operation)  # ceil_mode, divisor_override
        else:
            self._expect(set(given[4] or [1]) == {1} and not given[5], operation)  # dilation, ceil_mode
        self.nodes.append(Pool(kind, kernel, stride, padding))

    def _average(self, operation: Operation, given: Any, after: tuple[int, ...]) -> None:
        """Of all places, or of windows that divide them."""
        channels, *places = self.shape
        parts = list(after[1:])
        if operation.target is aten.mean.dim:
            every = list(range(2, len(places) + 2))
            self._expect(bool(given) and sorted(dim % (len(places) + 2) for dim in given) == every, operation)
            parts = [1] * len(places)
        self._expect(0 < len(places) == len(parts) < 3 and not operation.kwargs, operation)
        self._expect(all(part and not size % part for size, part in zip(places, parts, strict=True)), operation)
        kernel = _pair([size // part for size, part in zip(places, parts, strict=True)], 1)
        self.nodes.append(Pool("average", kernel, kernel, (0, 0)))
        self.shape = (channels, *parts)
        self._reshape(after)

    def _reshape(self, after: tuple[int, ...]) -> None:
        """Two shapes are one if they differ by a height of 1 only."""
        before = self.shape
        while self.nodes and isinstance(self.nodes[-1], Reshape | Flatten):
            before = self.before
            self.nodes.pop()
        self.before = before
        if _flat(before) != _flat(after):
            self.nodes.append(Flatten() if len(after) == 1 else Reshape(_flat(after)))

    def _name(self, parameter: Any, operation: Operation) -> str:
        """Of a parameter's one use."""
        self._expect(parameter in self.unused, operation)
        return self.unused.pop(parameter)

    def _name_if(self, parameter: Any, operation: Operation) -> str | None:
        return None if parameter is None else self._name(parameter, operation)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def _pair(sizes: Sequence[int], of_height: int) -> tuple[int, int]:
    """(height, width), also of what has a width only."""
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (of_height, sizes[0])


def _both(sizes: Sequence[int]) -> tuple[int, int]:
    """(height, width), also where one number stands for both."""
    return sizes[0], sizes[-1]
