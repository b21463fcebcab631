"""A network of nodes as the compiled kernel ``images.c`` takes it."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.engine import library
from fobmaml.engine.network import Network
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
from fobmaml.engine.rows import MOST_NUMBERS

CONVOLUTION, NORM, LAYER, SHIFT, EMBEDDING, MAXIMUM, AVERAGE, SUM, ATTENTION = range(9)  # as in images.c
ACTIVATIONS = ("identity", "silu", "relu", "tanh", "gelu")
MOST_WORDS = 2**24
"""Whole numbers that float32 tells apart: as such the kernel reads them."""
SIGNALS = 2**18
"""Numbers in the signals of examples that a thread takes together: they stay in a processor's second cache (measured on
images of 28 × 28 and 64 channels)."""
FEWEST, ENOUGH, MOST = 3, 24, 48
"""Examples taken together: with fewer, the weights are read for too little, and up to ENOUGH also at the signals'
expense where these are few beside the parameters (measured on residual networks of 0.8 and 3 million)."""


@dataclass(frozen=True)
class Signal:
    """What goes from node to node: channels of height × width; ``flat``, if the network sees one vector; ``sequence``,
    if it sees the channels of one place after another's. ``number``: as images.c counts them, 0 for the inputs."""

    channels: int
    height: int = 1
    width: int = 1
    flat: bool = False
    sequence: bool = False
    number: int = 0

    @staticmethod
    def of(shape: Sequence[int]) -> "Signal":
        """Of an example's shape: [values], [channels, width] or [channels, height, width]."""
        channels, height, width = (*shape, 1, 1)[:3] if len(shape) != 2 else (shape[0], 1, shape[1])
        return Signal(channels, height, width, flat=len(shape) == 1)

    @property
    def image(self) -> bool:
        """Whether the network sees channels of places."""
        return not self.flat and not self.sequence

    @property
    def vectors(self) -> "Signal | None":
        """The same as a sequence of vectors or one vector, if it is that; inputs of two axes may be."""
        if (self.places == 1) if self.flat else self.sequence:
            return self
        if self.number or self.flat or self.height > 1:
            return None
        return replace(self, channels=self.width, width=self.channels, sequence=True)

    @property
    def places(self) -> int:
        return self.height * self.width

    @property
    def numbers(self) -> int:
        return self.channels * self.places


class Described:
    """``nodes`` as the kernel takes them, ``layers``, for examples of ``shape``, and ``classes``: how many outputs.

    ``shapes``: of the parameters by name, in the order of a row; ``turned``: see ``Network``. Raises ValueError for
    what the kernel does not know: a network that does not begin with a convolution or linear layer or does not end in
    one vector, dilated and grouped convolutions, other activations than ``ACTIVATIONS``, parameters that are not taken
    exactly once.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        shapes: Mapping[str, torch.Size],
        shape: Sequence[int],
        turned: Collection[str] = (),
    ):
        self.shape = tuple(shape)
        *begins, self.parameters = accumulate((math.prod(each) for each in shapes.values()), initial=0)
        self.starts = dict(zip(shapes, begins, strict=True))
        self.shapes, self.unused, self.turned = shapes, set(shapes), turned
        if not 1 <= len(shape) <= 3:
            raise refuse("inputs", tuple(shape), "examples [values], [channels, length] or [channels, height, width]")
        self.signal, self.entries = Signal.of(shape), list[library.Image]()
        self.sequences = set[bool]()  # whether the inputs are taken as such
        self.words = 0  # below which they have to be whole numbers; 0: they are any numbers
        self.results = [self.signal]  # of the inputs, and of each node
        self.again = {node.step for node in nodes if isinstance(node, Take | Sum)}  # whose results are taken again
        for node in nodes:
            self._add(node)
            self.results.append(self.signal)
        if self.unused or not self.signal.flat or self.signal.height * self.signal.width > 1 or not self.entries:
            raise refuse("model", self._so_far(), f"nodes that take {', '.join(shapes)} and end in a vector")
        self._check_graph()
        self.classes = self.signal.channels
        self.layers = (library.Image * len(self.entries))(*self.entries)

    def _check_graph(self) -> None:
        """Raises ValueError for what images.c does not expect."""
        count = len(self.entries)
        if self.entries[0].of or count > library.MOST_LAYERS:
            raise refuse("model", self._so_far(), f"inputs taken first, and at most {library.MOST_LAYERS} nodes")
        takers: dict[int, list[library.Image]] = {number: [] for number in range(count)}
        for entry in self.entries:
            for signal in (entry.of, entry.other) if entry.kind == SUM else (entry.of,):
                takers[signal].append(entry)
        alike = {(entry.kind, entry.inputs, entry.height, entry.width) for entry in takers[0]}
        if not {kind for kind, *_ in alike} <= {CONVOLUTION, EMBEDDING} or len(alike) > 1 or len(self.sequences) > 1:
            raise refuse("model", self._so_far(), "inputs that convolutions alone, or linear layers alone, take alike")
        if self.signal.number != count or not all(takers.values()):
            raise refuse("model", self._so_far(), "nodes of which the last one alone is taken by no other")
        for entries in takers.values():  # the padding of others is zero
            if len(entries) > 1 and any(e.kind == MAXIMUM and (e.pad_height or e.pad_width) for e in entries):
                raise refuse("model", self._so_far(), "pools of largest values that share no signal, where padded")

    @property
    def _step(self) -> int:
        """The number of the node that is being added."""
        return len(self.results) - 1

    def _result(self, step: int) -> Signal:
        if whole_number("step", step, at_least=-1) >= self._step:
            raise refuse("step", step, f"the number of a node before, up to {self._step - 1}")
        return self.results[step + 1]

    def _so_far(self) -> str:
        return f"{len(self.entries)} nodes to {self.signal}"

    def _place(self, name: str | None, *shapes: tuple[int, ...]) -> int:
        """Where the parameter begins in a row; -1 for none."""
        if name is None:
            return -1
        if name not in self.unused or self.shapes[name] not in shapes:
            raise refuse("model", f"{name} {tuple(self.shapes.get(name, ()))}", f"one of {shapes}, taken once")
        self.unused.remove(name)
        return self.starts[name]

    def _add(self, node: Node) -> None:
        signal = self.signal
        match node:
            case Take():
                self.signal = self._result(node.step)
            case Sum():
                other = self._result(node.step)
                if replace(other, number=signal.number) != signal or other.number == signal.number:
                    raise refuse("model", f"{signal} and {other}", "two signals of one shape, to be added")
                self._same(SUM, signal, other=other.number)
            case Flatten():
                self.signal = replace(signal, flat=True)
            case Reshape() if signal.height * signal.width == 1 and not signal.number and self._fits(node):
                self.signal = Signal.of(node.shape)
            case Linear():
                self._linear(node)
            case LayerNorm() if seen := signal.vectors:
                weight, bias = (self._place(name, (seen.channels,)) for name in (node.weight, node.bias))
                self._same(LAYER, seen, weight, bias, groups=1, eps=number("eps", node.eps, at_least=0.0))
            case RMSNorm() if seen := signal.vectors:
                weight, eps = self._place(node.weight, (seen.channels,)), number("eps", node.eps, at_least=0.0)
                self._same(LAYER, seen, weight, eps=eps)
            case Shift() if seen := signal.vectors:
                shape = (seen.channels,) if seen.flat else (seen.width, seen.channels)
                self._same(SHIFT, seen, self._place(node.parameter, shape))
            case Embedding() if signal.flat and not signal.number:
                table, channels = self._matrix(node.weight)
                if table > MOST_WORDS:
                    raise refuse("model", f"{node.weight} {(table, channels)}", f"at most {MOST_WORDS} vectors")
                self.words, self.signal = table, Signal(1, 1, signal.channels, sequence=True)
                after = replace(self.signal, channels=channels)
                self._same(EMBEDDING, after, self._place(node.weight, (table, channels)), groups=table)
            case Attention() if signal.sequence and not signal.flat:
                heads, channels = whole_number("heads", node.heads), signal.channels // 3
                if 3 * channels != signal.channels or channels % heads:
                    raise refuse("model", f"{heads} heads of {signal}", "queries, keys and values of equal size")
                self._same(ATTENTION, replace(signal, channels=channels), groups=heads)
            case MeanOfPlaces() if signal.sequence and not signal.flat:
                after = Signal(signal.channels, flat=True)
                self._window(AVERAGE, after, (1, signal.width), (1, 1), (0, 0), None, None)
            case Conv() if (
                not signal.flat and not signal.sequence and node.groups == 1 and tuple(node.dilation) == (1, 1)
            ):
                out, channels, *kernel = self._shape(node.weight)
                if channels != signal.channels or not 1 <= len(kernel) <= 2:
                    raise refuse("model", f"{node.weight} {(out, channels, *kernel)}", f"one for {signal}")
                size = (1, *kernel) if len(kernel) == 1 else tuple(kernel)
                after = replace(signal, channels=out)
                self._window(CONVOLUTION, after, size, node.stride, node.padding, node.weight, node.bias)
            case GroupNorm() if signal.image or signal.places == 1:
                groups, channels = whole_number("groups", node.groups), signal.channels
                if channels % groups:
                    raise refuse("model", f"{groups} groups of {channels} channels", "groups of equal size")
                weight, bias = (self._place(name, (channels,)) for name in (node.weight, node.bias))
                self._same(NORM, signal, weight, bias, groups, eps=number("eps", node.eps, at_least=0.0))
            case Activate() if node.activation in ACTIVATIONS:
                last = self.entries[-1] if self.entries and signal.number == len(self.entries) else None
                same = (step for step, result in enumerate(self.results, -1) if result.number == signal.number)
                again = not self.again.isdisjoint(same)
                if last is None or last.kind not in (NORM, SUM) or last.activation or again:
                    self._same(NORM, signal)
                self.entries[-1].activation = ACTIVATIONS.index(node.activation)
            case Pool() if signal.image and node.kind in ("max", "average"):
                if any(2 * padding > size for padding, size in zip(node.padding, node.kernel, strict=True)):
                    raise refuse("model", f"padding {node.padding}", f"at most half of {node.kernel}")
                kind = MAXIMUM if node.kind == "max" else AVERAGE
                self._window(kind, signal, node.kernel, node.stride, node.padding, None, None)
            case _:
                raise refuse("model", node, f"what the compiled kernel knows, here for {signal}")

    def _fits(self, node: Reshape) -> bool:
        return 1 <= len(node.shape) <= 3 and math.prod(node.shape) == self.signal.numbers

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""
        if name not in self.shapes or len(self.shapes[name]) < 2:
            raise refuse("model", name, f"a weight among {', '.join(self.shapes)}")
        return tuple(self.shapes[name])

    def _matrix(self, name: str) -> tuple[int, int]:
        """Of a table."""
        rows, *columns = self._shape(name)
        if len(columns) != 1:
            raise refuse("model", f"{name} {(rows, *columns)}", "a table, [numbers, values]")
        return rows, columns[0]

    def _linear(self, node: Linear) -> None:
        """A convolution: of a vector one whose window is the whole image, and in a sequence one of a single place."""
        signal, (out, *values) = self.signal, self._shape(node.weight)
        if not signal.flat and (seen := signal.vectors) and values == [seen.channels]:
            self.signal = seen
            self._window(CONVOLUTION, replace(seen, channels=out), (1, 1), (1, 1), (0, 0), node.weight, node.bias)
        elif signal.flat and values == [signal.numbers]:
            size = signal.height, signal.width
            self._window(CONVOLUTION, Signal(out, flat=True), size, (1, 1), (0, 0), node.weight, node.bias)
        else:
            raise refuse("model", f"{node.weight} {(out, *values)}", f"[outputs, values] for {signal}")

    def _window(
        self,
        kind: int,
        after: Signal,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        weight: str | None,
        bias: str | None,
    ) -> None:
        """``after``: as far as windows do not say its size."""
        signal, sizes = self.signal, list[int]()
        for size, length, step, pad in zip(kernel, (signal.height, signal.width), stride, padding, strict=True):
            whole_number("kernel", size, at_most=MOST_NUMBERS)
            whole_number("stride", step, at_most=MOST_NUMBERS)
            whole_number("padding", pad, at_least=0, at_most=MOST_NUMBERS)
            sizes.append((length + 2 * pad - size) // step + 1)
            if sizes[-1] < 1:
                raise refuse("inputs", f"{signal}", f"what a window of {tuple(kernel)} fits into")
        places = (
            self._place(weight, self._shape(weight) if weight else ()),
            self._place(bias, (after.channels,)),
        )
        one_by_one = weight in self.turned or signal.sequence  # the channels of a place lie beside each other
        steps = (1, signal.channels) if one_by_one else (math.prod(kernel), 1)
        window = (*kernel, *stride, *padding, *places, *steps, 0, 0)
        self._enter(kind, replace(after, height=sizes[0], width=sizes[1]), window)

    def _same(
        self,
        kind: int,
        after: Signal,
        weight: int = -1,
        bias: int = -1,
        groups: int = 0,
        other: int = 0,
        eps: float = 0.0,
    ) -> None:
        """What has as many places as before."""
        self._enter(kind, after, (1, 1, 1, 1, 0, 0, weight, bias, 1, 1, groups, 0), other, eps)

    def _enter(self, kind: int, after: Signal, window: tuple[int, ...], other: int = 0, eps: float = 0.0) -> None:
        s = self.signal
        if not s.number:
            self.sequences.add(s.sequence)
        before = s.channels, s.height, s.width
        self.entries.append(
            library.Image(kind, *before, after.channels, after.height, after.width, *window, s.number, other, eps)
        )
        self.signal = replace(after, number=len(self.entries))

    def entered(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [R, N, ...] as the kernel reads them, [R, N, channels, places]. Raises ValueError for words that there
        are no vectors for."""
        if self.words:
            least, most = (int(word) for word in x.aminmax()) if x.numel() else (0, 0)
            if least < 0 or most >= self.words:
                raise refuse("inputs", least if least < 0 else most, f"whole numbers from 0 to {self.words - 1}")
            return x.float()
        if True not in self.sequences:
            return x
        return (x if x.dim() == 4 else x.unflatten(-1, (-1, self.entries[0].inputs))).mT

    def at_once(self) -> int:
        """How many examples a thread takes together."""
        signals = sum(e.inputs * (e.height + 2 * e.pad_height) * (e.width + 2 * e.pad_width) for e in self.entries)
        signals += sum(e.groups * e.width**2 for e in self.entries if e.kind == ATTENTION)
        few = max(min(3 * self.parameters // signals, ENOUGH), FEWEST)
        return min(max(SIGNALS // (2 * signals), few), MOST)  # and as many derivatives

    def largest(self) -> int:
        """An upper limit of the numbers in one buffer, for one example."""
        most = self.parameters
        for e in self.entries:
            padded = (e.height + 2 * e.pad_height) * (e.width + 2 * e.pad_width)
            window = e.kernel_height * e.kernel_width
            channels = max(library.LANES, e.inputs), max(library.LANES, e.outputs)
            most = max(most, 2 * padded * channels[0], 4 * window * math.prod(channels), 2 * e.height_out * e.width_out)
            if e.kind == ATTENTION:
                most = max(most, e.groups * e.width * (e.width + library.LANES))
            if e.kind == EMBEDDING:
                most = max(most, e.groups * channels[1])
        return most


def described(nodes: Sequence[Node], network: Network, shape: Sequence[int]) -> Described | None:
    """Such a network for examples of ``shape``; None where the kernel does not know it."""
    try:
        return Described(nodes, network.shapes, shape, network.turned)
    except ValueError:
        return None
