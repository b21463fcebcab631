"""A module's operations, found by torch.fx while it runs once: as nodes, where all are known and each follows the one
before."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from fobmaml.engine.modules import PureModule
from fobmaml.engine.nodes import Activate, Conv, Flatten, GroupNorm, Linear, Node, Pool, Reshape

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
FIRST_OF_SEVERAL = (aten.native_group_norm.default, aten.max_pool2d_with_indices.default)
"""Operations with several outputs, of which the first is the layer's."""
LAYER = "nn_module_stack"
"""What torch.fx calls the note of a node's layer."""


_one_at_a_time = Lock()
"""torch.fx changes ``Module.__call__`` while it traces."""


class UnknownLayerError(Exception):
    """A module is no sequence of known operations; the text names the layer that decided."""


def trace(module: PureModule, parameters: Mapping[str, Tensor], x: Tensor) -> list[Node]:
    """The operations of ``module`` with ``parameters`` on examples like ``x`` [N, ...], in their order.

    Where nodes are found, they are what was done to these inputs: that the module does the same to others, and has the
    derivatives that they have, is to be tried. Raises UnknownLayerError for an operation that there is no node for,
    values that are used twice, parameters that are used twice or not at all, and hooks; besides, what the module does.
    """
    for name, layer in module.model.named_modules():
        if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
            raise UnknownLayerError(f"{type(layer).__name__} '{name}' has hooks")
    names = list(parameters)

    def call(values: Sequence[Tensor], inputs: Tensor) -> Tensor:
        return module(dict(zip(names, values, strict=True)), inputs)

    with _one_at_a_time, torch.no_grad(), traceback.preserve_node_meta(), module.noting(_note):
        graph = make_fx(functionalize(call, remove="mutations"))([parameters[name] for name in names], x).graph
    graph.eliminate_dead_code()
    return _Reading(graph, names, x).nodes


def _note(layer: str) -> Callable[[], None]:
    """Operations traced from here on are those of ``layer``; returns how to undo it."""
    notes = traceback.get_current_meta()
    before = notes.get(LAYER)
    notes[LAYER] = {layer: layer}

    def undo() -> None:
        notes[LAYER] = before

    return undo


class _Reading:
    """``nodes`` from a graph of torch's operators, whose inputs are the parameters and then the examples."""

    def __init__(self, graph: fx.Graph, names: Sequence[str], x: Tensor):
        self.examples, self.shape = len(x), tuple(x.shape[1:])
        self.before = self.shape  # of the last reshaping
        self.nodes: list[Node] = []
        *given, self.at = [node for node in graph.nodes if node.op == "placeholder"]
        self.unused = dict(zip(given, names, strict=True))
        self.turned: dict[fx.Node, fx.Node] = {}  # transposed matrices, and what they were
        for node in graph.nodes:
            if node.op == "output":
                self._expect(node.all_input_nodes == [self.at], node)
            elif node.op != "placeholder":
                self._read(node)
        if self.unused:
            raise UnknownLayerError(f"parameter '{next(iter(self.unused.values()))}' is not used")

    def _refuse(self, node: fx.Node, why: str = "") -> NoReturn:
        layer = next(iter(node.meta.get(LAYER) or ["the module"]))
        raise UnknownLayerError(f"{layer} ({why or (node.name if node.op == 'output' else node.target)})")

    def _expect(self, known: bool, node: fx.Node) -> None:
        if not known:
            self._refuse(node)

    def _read(self, node: fx.Node) -> None:
        what: Any = node.target
        given: list[Any] = [*node.args, *[None] * 10]
        if what is aten.t.default and given[0] in self.unused:
            self.turned[node] = given[0]
            return
        below = given[1] if what is aten.addmm.default else given[0]
        self._expect(below is self.at, node)
        if len(self.at.users) > 1:
            self._refuse(node, "whose inputs go elsewhere, too")
        self.at = node
        if what in FIRST_OF_SEVERAL:
            after = self.shape  # ``getitem`` says
        else:
            shape: Sequence[int] = getattr(node.meta.get("val"), "shape", ())  # () of several outputs
            self._expect(len(shape) > 1 and shape[0] == self.examples, node)
            after = tuple(shape[1:])
        if what is operator.getitem:
            self._expect(given[1] == 0, node)
        elif what in SAME_VALUES:
            self._expect(math.prod(after) == math.prod(self.shape), node)
            self._reshape(after)
        elif what in ELEMENTWISE:
            self._expect(node.args[1:] in ((), SOFTPLUS) and not node.kwargs, node)
            self.nodes.append(Activate(ELEMENTWISE[what]))
        elif what is aten.convolution.default:
            self._expect(not given[6] and len(given[3]) == len(after) - 1 < 3, node)
            sizes = (_pair(given[3], 1), _pair(given[4], 0), _pair(given[5], 1))
            self.nodes.append(Conv(self._name(given[1], node), self._name_if(given[2], node), *sizes, given[8]))
        elif what in (aten.addmm.default, aten.mm.default):
            bias, weight = (given[0], given[2]) if what is aten.addmm.default else (None, given[1])
            self._expect(not node.kwargs and weight in self.turned, node)
            self.nodes.append(Linear(self._name(self.turned.pop(weight), node), self._name_if(bias, node)))
        elif what is aten.native_group_norm.default:
            weight, bias = self._name_if(given[1], node), self._name_if(given[2], node)
            self.nodes.append(GroupNorm(given[6], weight, bias, given[7]))
        elif what in POOLS:
            self._expect(not node.kwargs and len(self.shape) == 3, node)
            self._pool(node, POOLS[what], given)
        elif what is aten.mean.dim or what is aten._adaptive_avg_pool2d.default:
            self._average(node, given[1], after)
        else:
            self._refuse(node)
        self.shape = after

    def _pool(self, node: fx.Node, kind: str, given: Sequence[Any]) -> None:
        kernel, padding = _both(given[1]), _both(given[3] or [0])
        stride = _both(given[2]) if given[2] else kernel
        if node.target is aten.avg_pool2d.default:
            exact = not any(padding) or given[5] is not False  # count_include_pad
            self._expect(not given[4] and exact and given[6] is None, node)  # ceil_mode, divisor_override
        else:
            self._expect(set(given[4] or [1]) == {1} and not given[5], node)  # dilation, ceil_mode
        self.nodes.append(Pool(kind, kernel, stride, padding))

    def _average(self, node: fx.Node, given: Any, after: tuple[int, ...]) -> None:
        """Of all places, or of windows that divide them."""
        channels, *places = self.shape
        parts = list(after[1:])
        if node.target is aten.mean.dim:
            every = list(range(2, len(places) + 2))
            self._expect(bool(given) and sorted(dim % (len(places) + 2) for dim in given) == every, node)
            parts = [1] * len(places)
        self._expect(0 < len(places) == len(parts) < 3 and not node.kwargs, node)
        self._expect(all(part and not size % part for size, part in zip(places, parts, strict=True)), node)
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

    def _name(self, parameter: Any, node: fx.Node) -> str:
        """Of a parameter's one use."""
        self._expect(parameter in self.unused, node)
        return self.unused.pop(parameter)

    def _name_if(self, parameter: Any, node: fx.Node) -> str | None:
        return None if parameter is None else self._name(parameter, node)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def _pair(sizes: Sequence[int], of_height: int) -> tuple[int, int]:
    """(height, width), also of what has a width only."""
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (of_height, sizes[0])


def _both(sizes: Sequence[int]) -> tuple[int, int]:
    """(height, width), also where one number stands for both."""
    return sizes[0], sizes[-1]
