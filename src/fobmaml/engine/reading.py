"""What the operations of a module are as nodes: which number each operation takes from where."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fobmaml.engine.nodes import (
    Activate,
    Attention,
    Conv,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MeanOfPlaces,
    Node,
    Pool,
    Reshape,
    RMSNorm,
    Shift,
    Sum,
    Take,
)
from fobmaml.engine.operators import ELEMENTWISE, POOLS, PRODUCTS, SAME_NUMBERS, SOFTPLUS
from fobmaml.engine.recording import Operation, Value
from fobmaml.engine.root_mean_square import RootMeanSquares

aten = torch.ops.aten


@dataclass(frozen=True)
class Numbers:
    """Which numbers a tensor has: those of the parameter ``of``, or of what the node number ``of`` gave (-1: the
    inputs). ``at``: of each, its place there, int64 of the tensor's shape; None: all of them in their order."""

    of: int | str
    at: Tensor | None = None

    def places(self, shape: Sequence[int]) -> Tensor:
        return torch.arange(math.prod(shape)).view(*shape) if self.at is None else self.at


class Reading:
    """``nodes`` of operations, on examples like ``start`` [N, ...], whose numbers wander through shapes and orders of
    axes: what counts is which number is where."""

    def __init__(self, parameters: dict[Value, str], start: Value):
        self.examples, self.nodes = start.shape[0], list[Node]()
        self.shapes: dict[int | str, tuple[int, ...]] = {-1: start.shape[1:]}  # of an example's result; of a parameter
        self.shapes |= {name: value.shape for value, name in parameters.items()}
        self.known = {start: Numbers(-1)} | {value: Numbers(name) for value, name in parameters.items()}
        self.unused = dict.fromkeys(parameters.values())
        self.squares = RootMeanSquares()

    def _expect(self, known: bool, operation: Operation) -> None:
        if not known:
            operation.refuse()

    def read(self, operation: Operation) -> None:
        """The next operation, of what was given or came of operations before."""
        what: Any = operation.target
        if self.squares.take(operation):
            return
        given: list[Any] = [*operation.args, *[None] * 10]
        values = [each for each in given if isinstance(each, Value)]
        if (eps := self.squares.eps_of(operation)) is not None:
            values = [each for each in values if each.shape == operation.made[0].shape][:1]
        self._expect(bool(values) and all(each in self.known for each in values), operation)
        below, after = values[0], operation.made[0].shape[1:]
        if eps is not None:
            numbers, shape, _ = self._rows(below, operation)
            self._enter(operation, RMSNorm(None, eps), shape, numbers.at)
        elif what is aten.mul.Tensor:
            self._gain(operation, values)
        elif what in SAME_NUMBERS:
            self._move(operation)
        elif what in PRODUCTS:
            bias, factor, weight = given[:3] if what is aten.addmm.default else (None, *given[:2])
            self._expect(not operation.kwargs and all(isinstance(each, Value) for each in (factor, weight)), operation)
            self._linear(operation, factor, weight, bias)
        elif what is aten.add.Tensor:
            self._expect(len(values) == len(operation.args) == 2 and not operation.kwargs, operation)
            self._add(operation, *values)
        elif what in ELEMENTWISE:
            self._expect(operation.args[1:] in ((), SOFTPLUS) and not operation.kwargs, operation)
            numbers = self._whole(below, operation)
            self._back_to(numbers.of)
            self._enter(operation, Activate(ELEMENTWISE[what]), self.shapes[numbers.of], numbers.at)
        elif what is aten.native_layer_norm.default:
            self._expect(len(given[1]) == 1, operation)
            numbers, shape, _ = self._rows(below, operation)
            weight, bias = self._name_if(given[2], operation), self._name_if(given[3], operation)
            self._enter(operation, LayerNorm(weight, bias, given[4]), shape, numbers.at)
        elif what is aten.embedding.default:
            table, numbers_of = given[:2]
            known = len(values) == 2 and given[2] in (None, -1) and not any(given[3:]) and not operation.kwargs
            self._expect(known and numbers_of in self.known and self._ordered(numbers_of), operation)
            self._bring(numbers_of, numbers_of.shape[1:])
            self._expect(len(numbers_of.shape) == 2, operation)
            self._enter(operation, Embedding(self._name(table, operation)), after)
        elif what is aten._scaled_dot_product_flash_attention_for_cpu.default:
            self._expect(len(values) == 3 and not any(given[3:]) and not operation.kwargs, operation)
            self._attend(operation, values)
        else:
            self._expect(len(below.shape) > 1 and self._ordered(below), operation)
            self._of_channels(operation, below, given, after)

    def _of_channels(self, operation: Operation, below: Value, given: list[Any], after: tuple[int, ...]) -> None:
        """What takes signals [channels, ...]."""
        what: Any = operation.target
        self._bring(below, below.shape[1:])
        if what is aten.convolution.default:
            self._expect(not given[6] and len(given[3]) == len(after) - 1 < 3, operation)
            sizes = (_pair(given[3], 1), _pair(given[4], 0), _pair(given[5], 1))
            weight, bias = self._name(given[1], operation), self._name_if(given[2], operation)
            self._enter(operation, Conv(weight, bias, *sizes, given[8]), after)
        elif what is aten.native_group_norm.default:
            gain, shift = self._name_if(given[1], operation), self._name_if(given[2], operation)
            self._enter(operation, GroupNorm(given[6], gain, shift, given[7]), after)
        elif what in POOLS:
            self._expect(not operation.kwargs and len(below.shape) == 4, operation)
            self._pool(operation, POOLS[what], given)
        elif what is aten.mean.dim and len(below.shape) == 3 and [dim % 3 for dim in given[1] or ()] == [1]:
            self._expect(not operation.kwargs, operation)
            self._enter(operation, MeanOfPlaces(), after[-1:])
        elif what is aten.mean.dim or what is aten._adaptive_avg_pool2d.default:
            self._average(operation, below.shape[1:], given[1])
        else:
            operation.refuse()

    def ends(self, end: Value) -> bool:
        """Makes ``end`` the last result, if it has the numbers of each example by itself, in their order."""
        if end not in self.known or not self._ordered(end):
            return False
        self._bring(end, end.shape[1:])
        return True

    def _ordered(self, value: Value) -> bool:
        """Whether it is [N, ...] with all numbers of a result in their order."""
        numbers = self.known[value]
        if numbers.at is not None or isinstance(numbers.of, str) or value.shape[:1] != (self.examples,):
            return False
        return math.prod(value.shape[1:]) == math.prod(self.shapes[numbers.of])

    def _whole(self, value: Value, operation: Operation) -> Numbers:
        """The numbers of a value that has all of a result's, each once."""
        numbers = self.known[value]
        self._expect(isinstance(numbers.of, int), operation)
        if numbers.at is not None:
            count = self.examples * math.prod(self.shapes[numbers.of])
            self._expect(torch.equal(numbers.at.flatten().sort()[0], torch.arange(count)), operation)
        return numbers

    def _enter(self, operation: Operation, node: Node, shape: tuple[int, ...], at: Tensor | None = None) -> None:
        self.nodes.append(node)
        self.shapes[len(self.nodes) - 1] = shape
        self.known[operation.made[0]] = Numbers(len(self.nodes) - 1, at)

    def _back_to(self, step: int | str) -> None:
        """Makes what a node gave the last result."""
        if isinstance(step, int) and step != len(self.nodes) - 1:
            self.nodes.append(Take(step))
            self.shapes[len(self.nodes) - 1] = self.shapes[step]

    def _bring(self, value: Value, shape: tuple[int, ...]) -> None:
        """The same with an example's numbers in this shape. Two shapes are one if they differ by a height of 1 only."""
        step = self.known[value].of
        self._back_to(step)
        if _flat(self.shapes[step]) != _flat(shape):
            self.nodes.append(Flatten() if len(shape) == 1 else Reshape(_flat(shape)))
            self.shapes[len(self.nodes) - 1] = shape

    def _move(self, operation: Operation) -> None:
        source: Any = operation.args[0]
        self._expect(isinstance(source, Value), operation)
        numbers = self.known[source]
        moved = SAME_NUMBERS[operation.target](numbers.places(source.shape), *operation.args[1:], **operation.kwargs)
        several = moved if isinstance(moved, list | tuple) else [moved]
        whole = math.prod(self.shapes[numbers.of]) * (1 if isinstance(numbers.of, str) else self.examples)
        for made, at in zip(operation.made, several, strict=True):
            ordered = at.numel() == whole and torch.equal(at.flatten(), torch.arange(whole))
            self.known[made] = Numbers(numbers.of, None if ordered else at)

    def _rows(self, value: Value, operation: Operation) -> tuple[Numbers, tuple[int, ...], Tensor | None]:
        """Of [..., values], which is made the last result: its numbers, the shape [places, values] or [values] that
        these are in, and which of them stands in each line (None: all in their order)."""
        numbers, size = self._whole(value, operation), value.shape[-1]
        count = math.prod(self.shapes[numbers.of])
        self._expect(bool(size) and count % size == 0, operation)
        lines: Tensor | None = None
        shape: tuple[int, ...] = (count // size, size)
        if numbers.at is None:
            shape = (size,) if value.shape == (self.examples, count) else shape
        else:
            first = numbers.at[..., 0]
            together = numbers.at == first.unsqueeze(-1) + torch.arange(size)
            self._expect(bool(together.all() and (first % size == 0).all()), operation)
            lines = first // size
        self._bring(value, shape)
        return numbers, shape, lines

    def _linear(self, operation: Operation, below: Value, weight: Value, bias: Value | None) -> None:
        of = self.known[weight].of
        self._expect(isinstance(of, str) and len(self.shapes[of]) == 2, operation)
        out, size = self.shapes[of]
        turned = torch.arange(out * size).view(out, size).t()
        places = self.known[weight].places(weight.shape)
        self._expect(places.shape[-2:] == turned.shape and bool((places == turned).all()), operation)
        _, shape, lines = self._rows(below, operation)
        at = None if lines is None else lines.unsqueeze(-1) * out + torch.arange(out)
        node = Linear(self._name_of(str(of), operation), self._name_if(bias, operation))
        self._enter(operation, node, (*shape[:-1], out), at)

    def _add(self, operation: Operation, one: Value, other: Value) -> None:
        if isinstance(self.known[one].of, str):
            one, other = other, one
        if isinstance(self.known[other].of, str):
            self._shift(operation, one, other)
            return
        numbers, added = self._whole(one, operation), self._whole(other, operation)
        if added.of == len(self.nodes) - 1:
            numbers, added = added, numbers
        self._expect(isinstance(added.of, int) and numbers.of != added.of and one.shape == other.shape, operation)
        self._expect(_flat(self.shapes[numbers.of]) == _flat(self.shapes[added.of]), operation)
        alike = numbers.at is added.at is None
        self._expect(alike or torch.equal(numbers.places(one.shape), added.places(one.shape)), operation)
        self._back_to(numbers.of)
        self._enter(operation, Sum(int(added.of)), self.shapes[numbers.of], numbers.at)

    def _shift(self, operation: Operation, value: Value, parameter: Value) -> None:
        """By a bias of the linear layer that gave the last result, or by a parameter of an example's shape."""
        numbers, last = self.known[value], self.nodes[-1] if self.nodes else None
        once = all(each.uses < 2 for each, found in self.known.items() if found.of == numbers.of)
        if isinstance(last, Linear) and last.bias is None and numbers.of == len(self.nodes) - 1 and once:
            out = self.shapes[last.weight][:1]
            same = parameter.shape == out == value.shape[-1:]
            whole, shape, _ = self._rows(value, operation) if same else (numbers, (), None)
            if same and shape == self.shapes[numbers.of]:
                self.nodes[-1] = Linear(last.weight, self._name(parameter, operation))
                self.known[operation.made[0]] = whole
                return
        self._expect(self._ordered(value) and parameter.shape == value.shape[1:], operation)
        self._bring(value, value.shape[1:])
        self._enter(operation, Shift(self._name(parameter, operation)), value.shape[1:])

    def _gain(self, operation: Operation, values: list[Value]) -> None:
        """Of the norm by the root of the mean square that gave the last result."""
        self._expect(len(values) == 2, operation)
        value, gain = sorted(values, key=lambda each: isinstance(self.known[each].of, str))
        norm = self.nodes[-1] if self.nodes else None
        if not isinstance(norm, RMSNorm) or norm.weight is not None or self.known[value].of != len(self.nodes) - 1:
            operation.refuse()
        once = all(each.uses < 2 for each, found in self.known.items() if found.of == self.known[value].of)
        self._expect(once and gain.shape == value.shape[-1:], operation)
        self.known[operation.made[0]] = self._rows(value, operation)[0]
        self.nodes[-1] = replace(norm, weight=self._name(gain, operation))

    def _attend(self, operation: Operation, values: list[Value]) -> None:
        """Of queries, keys and values [N, heads, places, size] that lie beside each other."""
        self._expect(all(value.shape == values[0].shape for value in values) and len(values[0].shape) == 4, operation)
        _, heads, places, size = values[0].shape
        step, width = self.known[values[0]].of, heads * size
        self._expect(isinstance(step, int) and self.shapes[step] == (places, 3 * width), operation)
        whole = torch.arange(self.examples * places * 3 * width).view(self.examples, places, 3, heads, size)
        for value, wanted in zip(values, whole.permute(2, 0, 3, 1, 4), strict=True):
            numbers = self.known[value]
            self._expect(numbers.of == step and torch.equal(numbers.places(value.shape), wanted), operation)
        self._back_to(step)
        at = torch.arange(self.examples * places * width).view(self.examples, places, heads, size).transpose(1, 2)
        self._enter(operation, Attention(heads), (places, width), at)

    def _pool(self, operation: Operation, kind: str, given: Sequence[Any]) -> None:
        kernel, padding = _both(given[1]), _both(given[3] or [0])
        stride = _both(given[2]) if given[2] else kernel
        if operation.target is aten.avg_pool2d.default:
            exact = not any(padding) or given[5] is not False  # count_include_pad
            self._expect(not given[4] and exact and given[6] is None, operation)  # ceil_mode, divisor_override
        else:
            self._expect(set(given[4] or [1]) == {1} and not given[5], operation)  # dilation, ceil_mode
        self._enter(operation, Pool(kind, kernel, stride, padding), operation.made[0].shape[1:])

    def _average(self, operation: Operation, before: tuple[int, ...], given: Any) -> None:
        """Of all places, or of windows that divide them."""
        channels, *places = before
        parts = list(operation.made[0].shape[2:])
        if operation.target is aten.mean.dim:
            every = list(range(2, len(places) + 2))
            self._expect(bool(given) and sorted(dim % (len(places) + 2) for dim in given) == every, operation)
            parts = [1] * len(places)
        self._expect(0 < len(places) == len(parts) < 3 and not operation.kwargs, operation)
        self._expect(all(part and not size % part for size, part in zip(places, parts, strict=True)), operation)
        kernel = _pair([size // part for size, part in zip(places, parts, strict=True)], 1)
        self._enter(operation, Pool("average", kernel, kernel, (0, 0)), (channels, *parts))

    def _name(self, parameter: Any, operation: Operation) -> str:
        """Of a parameter's one use, as it is."""
        self._expect(parameter in self.known and self.known[parameter].at is None, operation)
        return self._name_of(self.known[parameter].of, operation)

    def _name_of(self, name: int | str, operation: Operation) -> str:
        self._expect(name in self.unused, operation)
        self.unused.pop(str(name))
        return str(name)

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
