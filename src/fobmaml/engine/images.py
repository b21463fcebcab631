"""Gradients of chains of convolutions, norms, activations and pools by the compiled kernel ``images.c``.

It takes all passes of all rows, and many steps, in one call. Networks are given as nodes; parameters keep the module's
own layout.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.engine import library
from fobmaml.engine.base import WHOLE, Engine, Steps
from fobmaml.engine.loop import Loop
from fobmaml.engine.losses import CrossEntropy, Part, rows_taken
from fobmaml.engine.memory import check, in_order
from fobmaml.engine.network import Network
from fobmaml.engine.nodes import Activate, Conv, Flatten, GroupNorm, Linear, Node, Pool, Reshape
from fobmaml.engine.rows import MOST_NUMBERS, RowGradient, lines

CONVOLUTION, NORM, MAXIMUM, AVERAGE = range(4)  # as in images.c
ACTIVATIONS = ("identity", "silu", "relu", "tanh", "gelu")
SIGNALS = 2**18
"""Numbers in the signals of examples that a thread takes together: they stay in a processor's second cache (measured on
images of 28 × 28 and 64 channels)."""
FEWEST, MOST = 3, 48
"""Examples taken together: with fewer, the weights are read for too little."""


@dataclass
class Signal:
    """What goes from node to node: channels of height × width; ``flat``, if the network sees one vector."""

    channels: int
    height: int = 1
    width: int = 1
    flat: bool = False

    @staticmethod
    def of(shape: Sequence[int]) -> "Signal":
        """Of an example's shape: [values], [channels, width] or [channels, height, width]."""
        channels, height, width = (*shape, 1, 1)[:3] if len(shape) != 2 else (shape[0], 1, shape[1])
        return Signal(channels, height, width, flat=len(shape) == 1)

    @property
    def numbers(self) -> int:
        return self.channels * self.height * self.width


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
        for node in nodes:
            self._add(node)
        if self.unused or not self.signal.flat or self.signal.height * self.signal.width > 1 or not self.entries:
            raise refuse("model", self._so_far(), f"nodes that take {', '.join(shapes)} and end in a vector")
        if self.entries[0].kind != CONVOLUTION or len(self.entries) > library.MOST_LAYERS:
            raise refuse("model", self._so_far(), f"a convolution first, and at most {library.MOST_LAYERS} nodes")
        self.classes = self.signal.channels
        self.layers = (library.Image * len(self.entries))(*self.entries)

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
            case Flatten():
                signal.flat = True
            case Reshape() if signal.height * signal.width == 1 and not self.entries and self._fits(node):
                self.signal = Signal.of(node.shape)
            case Linear():
                self._linear(node)
            case Conv() if not signal.flat and node.groups == 1 and tuple(node.dilation) == (1, 1):
                out, channels, *kernel = self._shape(node.weight)
                if channels != signal.channels or not 1 <= len(kernel) <= 2:
                    raise refuse("model", f"{node.weight} {(out, channels, *kernel)}", f"one for {signal}")
                size = (1, *kernel) if len(kernel) == 1 else tuple(kernel)
                self._window(CONVOLUTION, out, size, node.stride, node.padding, node.weight, node.bias)
            case GroupNorm() if not signal.flat or signal.height * signal.width == 1:
                groups, channels = whole_number("groups", node.groups), signal.channels
                if channels % groups:
                    raise refuse("model", f"{groups} groups of {channels} channels", "groups of equal size")
                weight, bias = (self._place(name, (channels,)) for name in (node.weight, node.bias))
                self._pointwise(weight, bias, groups, number("eps", node.eps, at_least=0.0))
            case Activate() if node.activation in ACTIVATIONS:
                last = self.entries[-1] if self.entries else None
                if last is None or last.kind != NORM or last.activation:
                    self._pointwise(-1, -1, 0, 0.0)
                self.entries[-1].activation = ACTIVATIONS.index(node.activation)
            case Pool() if not signal.flat and node.kind in ("max", "average"):
                if any(2 * padding > size for padding, size in zip(node.padding, node.kernel, strict=True)):
                    raise refuse("model", f"padding {node.padding}", f"at most half of {node.kernel}")
                kind = MAXIMUM if node.kind == "max" else AVERAGE
                self._window(kind, signal.channels, node.kernel, node.stride, node.padding, None, None)
            case _:
                raise refuse("model", node, f"what the compiled kernel knows, here for {signal}")

    def _fits(self, node: Reshape) -> bool:
        return 1 <= len(node.shape) <= 3 and math.prod(node.shape) == self.signal.numbers

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""
        if name not in self.shapes or len(self.shapes[name]) < 2:
            raise refuse("model", name, f"a weight among {', '.join(self.shapes)}")
        return tuple(self.shapes[name])

    def _linear(self, node: Linear) -> None:
        """A convolution whose window is the whole image: then the weights lie in the same order."""
        signal, (out, *values) = self.signal, self._shape(node.weight)
        if not signal.flat or values != [signal.numbers]:
            raise refuse("model", f"{node.weight} {(out, *values)}", f"[outputs, {signal.numbers}] for {signal}")
        size = signal.height, signal.width
        self._window(CONVOLUTION, out, size, (1, 1), (0, 0), node.weight, node.bias)

    def _window(
        self,
        kind: int,
        out: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        weight: str | None,
        bias: str | None,
    ) -> None:
        signal, after = self.signal, list[int]()
        for size, length, step, pad in zip(kernel, (signal.height, signal.width), stride, padding, strict=True):
            whole_number("kernel", size, at_most=MOST_NUMBERS)
            whole_number("stride", step, at_most=MOST_NUMBERS)
            whole_number("padding", pad, at_least=0, at_most=MOST_NUMBERS)
            after.append((length + 2 * pad - size) // step + 1)
            if after[-1] < 1:
                raise refuse("inputs", f"{signal}", f"what a window of {tuple(kernel)} fits into")
        places = self._place(weight, self._shape(weight) if weight else ()), self._place(bias, (out,))
        steps = (1, signal.channels) if weight in self.turned else (math.prod(kernel), 1)
        self._enter(
            kind,
            Signal(out, after[0], after[1], signal.flat),
            (*kernel, *stride, *padding, *places, *steps, 0, 0, 0.0),
        )

    def _pointwise(self, weight: int, bias: int, groups: int, eps: float) -> None:
        self._enter(NORM, self.signal, (1, 1, 1, 1, 0, 0, weight, bias, 1, 1, groups, 0, eps))

    def _enter(self, kind: int, after: Signal, rest: tuple[float, ...]) -> None:
        s = self.signal
        self.entries.append(
            library.Image(kind, s.channels, s.height, s.width, after.channels, after.height, after.width, *rest)
        )
        self.signal = after

    def at_once(self) -> int:
        """How many examples a thread takes together."""
        signals = (e.inputs * (e.height + 2 * e.pad_height) * (e.width + 2 * e.pad_width) for e in self.entries)
        return min(max(SIGNALS // (2 * sum(signals)), FEWEST), MOST)  # and as many derivatives

    def largest(self) -> int:
        """An upper limit of the numbers in one buffer, for one example."""
        most = self.parameters
        for e in self.entries:
            padded = (e.height + 2 * e.pad_height) * (e.width + 2 * e.pad_width)
            window = e.kernel_height * e.kernel_width
            channels = max(library.LANES, e.inputs), max(library.LANES, e.outputs)
            most = max(most, 2 * padded * channels[0], 4 * window * math.prod(channels), 2 * e.height_out * e.width_out)
        return most


def described(nodes: Sequence[Node], network: Network, shape: Sequence[int]) -> Described | None:
    """Such a network for examples of ``shape``; None where the kernel does not know it."""
    try:
        return Described(nodes, network.shapes, shape, network.turned)
    except ValueError:
        return None


def outputs(described: Described, phi: Tensor, x: Tensor) -> Tensor:
    """The network with parameters phi[r] on x[r]: [R, P], [R, N, ...] -> [R, N, classes]."""
    nothing = x.new_zeros(*x.shape[:2], described.classes)
    return ImageGradient(described, x, nothing, nothing[..., :1]).outputs(phi)


class ImageGradient(RowGradient):
    """See ``RowGradient``, for a network as ``described``.

    ``x`` [R, N, channels, height, width], [R, N, channels, length] or [R, N, values], ``targets`` [R, N, classes], each
    summing to one, ``weights`` [R, N] or [R, N, 1]. Memory, a thread: the parameters three times and the signals of the
    examples taken at once, twice.

    Raises ValueError naming the argument (``x`` is called inputs).
    """

    def __init__(self, described: Described, x: Tensor, targets: Tensor, weights: Tensor):
        check("inputs", x)
        found = library.kernel()
        if found is None:
            raise refuse("engine", "images", f"a compiled kernel: {library.missing()}")
        if x.shape[2:] != described.shape:
            raise refuse(
                "inputs", tuple(x.shape), f"[rows, examples, *{described.shape}], as the network was described for"
            )
        rows_and_examples = x.shape[:2]
        if MOST * described.largest() > MOST_NUMBERS:
            raise refuse("inputs", tuple(x.shape), "signals that fit into memory")
        check("targets", targets, (*rows_and_examples, described.classes))
        check("weights", weights, tuple(rows_and_examples), (*rows_and_examples, 1))
        data = {"inputs": in_order(x), "targets": in_order(targets), "weights": in_order(weights)}
        super().__init__(found, "images", described.layers, data, described.parameters, described.at_once())

    @classmethod
    def of(
        cls, nodes: Sequence[Node], shapes: Mapping[str, torch.Size], x: Tensor, targets: Tensor, weights: Tensor
    ) -> "ImageGradient":
        """For a chain of ``nodes``; raises ValueError as ``Described``, too."""
        check("inputs", x)
        return cls(Described(nodes, shapes, x.shape[2:]), x, targets, weights)

    def outputs(self, start: Tensor) -> Tensor:
        """The network's, [R, N, classes], with the parameters ``start`` [1, P] or [R, P]."""
        check("start", start, (1, self.parameters), (self.rows, self.parameters))
        check("inputs", x := self.data["inputs"])  # its memory may have been taken away since
        found = torch.empty(self.data["targets"].shape)
        if found.numel():
            start = lines(start)
            self.kernel.images_outputs(
                self.layers,
                len(self.layers),
                self.rows,
                self.examples,
                self.block_of(self.examples),
                start.data_ptr(),
                start.stride(0) if len(start) > 1 else 0,
                x.data_ptr(),
                found.data_ptr(),
                self.scratch(self.examples),
                self.threads,
            )
        return found


class FusedImages(Loop):
    """Outputs, gradients and descent in calls of the kernel, for a network as ``described``; Hessian products are
    ``Loop``'s, and descent with momentum calls for one gradient after another. Memory of the descent: the
    displacements, and a few examples' signals a thread."""

    def __init__(self, described: Described, network: Network, x: Tensor, loss: CrossEntropy):
        super().__init__(network, x, loss, WHOLE)
        self.described, self.cross_entropy = described, loss
        loss.prepare(x.new_empty(*x.shape[:2], described.classes))
        self.kernel = ImageGradient(described, x, loss.one_hot, loss.weights)

    def outputs(self, phi: Tensor) -> Tensor:
        return self.kernel.outputs(phi.detach())

    def gradient(self, phi: Tensor) -> Tensor:
        into = torch.empty(phi.shape, dtype=phi.dtype)
        self.kernel.add(phi.detach(), None, into, 0.0, 1.0)
        return into

    def gradient_descent(self, theta: Tensor, steps: Steps) -> Tensor:
        if steps.momentum:
            return Engine.gradient_descent(self, theta, steps)
        return self.kernel.descend(theta, steps, self.cross_entropy)

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "FusedImages":
        loss = self.cross_entropy.of_examples(examples, parts)
        return FusedImages(self.described, self.network, rows_taken(self.x, examples), loss)

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        self.kernel.add(phi, None, into, scale, step)
