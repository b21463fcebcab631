"""A feed-forward network with its own parameters in every row, and its derivatives, written out by hand.

One batched matrix product does what a layer does for all rows (task × offset). Signals are channels-last, so that most
of a convolution's windows are views of its input. All buffers are allocated once and used again in every inner step,
no graph is kept, and a step of gradient descent is part of the product that computes the gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.activations import Activation


@dataclass(frozen=True)
class Convolution:
    """A 1-d convolution, padded by one: ``weight`` and ``bias`` name parameters [out, taps, in] and [out]."""

    weight: str
    bias: str
    stride: int
    activation: Activation | None

    def __post_init__(self) -> None:
        whole_number("stride", self.stride)


@dataclass(frozen=True)
class Dense:
    """A linear layer on the whole signal: ``weight`` and ``bias`` name parameters [out, ...] and [out]."""

    weight: str
    bias: str
    activation: Activation | None


def length_after(layer: Convolution | Dense, shapes: Mapping[str, torch.Size], length: int) -> int:
    """Of the signal that leaves a layer."""
    return (length + 2 - shapes[layer.weight][1]) // layer.stride + 1 if isinstance(layer, Convolution) else 1


def lengths_taken(layers: Sequence[Convolution | Dense], shapes: Mapping[str, torch.Size]) -> range | None:
    """Of the inputs that the layers take; None if the first is dense, which takes any of its number of values.

    Raises ValueError for layers that do not follow from each other, or do not name every parameter once.
    """
    names = [name for layer in layers for name in (layer.weight, layer.bias)]
    if sorted(names) != sorted(shapes):  # of a parameter named twice, the gradient would be that of one place
        raise refuse("model", f"layers of {', '.join(names) or 'no parameters'}",
                     f"layers that name each parameter once: {', '.join(shapes)}")
    convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
    last = len(convolutions)
    if not all(isinstance(layer, Convolution) for layer in layers[:last]) or last == len(layers):
        raise refuse("model", f"layers {', '.join(type(layer).__name__ for layer in layers)}",
                     "convolutions, then dense layers")
    places, below = 1, 0
    for i, layer in enumerate(layers):
        weight, bias = shapes[layer.weight], shapes[layer.bias]
        values = math.prod(weight[1:])  # numel() may overflow
        fits = len(weight) > 1 and min(weight) > 0 and bias == weight[:1]
        if isinstance(layer, Convolution):
            fits = fits and len(weight) == 3 and below in (0, weight[2])
        elif i == last and below:
            places = values // below
            fits = fits and places * below == values
        else:
            fits = fits and below in (0, values)
        if not fits:
            above = f" that follows {below} channels" if below else ""
            raise refuse("model", f"{layer.weight} {tuple(weight)} and {layer.bias} {tuple(bias)}",
                         f"a weight [out, taps, in] ([out, ...] if dense){above}, and a bias [out]")
        below = weight[0]
    if not convolutions:
        return None
    least = most = places
    for layer in reversed(convolutions):
        taps = shapes[layer.weight][1]
        least, most = max((least - 1) * layer.stride + taps - 2, 1), most * layer.stride + taps - 3
        if most < 1:
            raise refuse("model", f"{layer.weight} {tuple(shapes[layer.weight])}",
                         "a convolution that some signal leaves as long as the layers above need it")
    return range(least, most + 1)


def check_chain(layers: Sequence[Convolution | Dense], shapes: Mapping[str, torch.Size], x: Tensor) -> list[int]:
    """The lengths of the signals from the inputs ``x`` [R, N, length, channels] to the outputs.

    Raises ValueError, which begins with ``model`` for layers that are no network, with ``inputs`` for others than they
    take.
    """
    lengths = lengths_taken(layers, shapes)
    size = shapes[layers[0].weight][1:]
    takes = f"[examples, {span(lengths)}, {size[1]}]" if lengths else f"{math.prod(size)} values an example"
    if x.dim() != 4 or not x.is_floating_point() or (
            x.shape[2] not in lengths or x.shape[3] != size[1] if lengths else x.shape[2:].numel() != math.prod(size)):
        raise refuse("inputs", f"{x.dtype} {examples_of(x.shape[1:])}", f"{takes}, floating-point numbers")
    found = [x.shape[2]]
    for layer in layers:
        found.append(length_after(layer, shapes, found[-1]))
    return found


def examples_of(shape: Sequence[int]) -> str:
    """A shape [N, ...] for a message that does not depend on the number of examples."""
    return f"[{', '.join(['examples', *map(str, shape[1:])][:len(shape)])}]"


def span(lengths: range) -> str:
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"


class StackedNetwork:
    """The layers, one after another, applied with row r of the parameters to row r of the inputs.

    ``shapes``: of one row's parameters, by name. ``x`` [R, N, length, channels]. ``second_order``: keep what the
    tangents need. ``parameters``: the parameters of all rows, as the list of matrices [R, ., .] that the products take;
    they are read anew by every call of ``outputs``, so they may be changed in place. ``pack`` and ``unpack`` go between
    such lists and {name: [R, ...]}.

    Raises ValueError for layers, inputs, parameters and gradients that do not fit together.

    The calls build on each other: ``outputs``, ``add_gradient``, ``tangent``, ``add_gradient_tangent``; the first and
    third return buffers. Cost, in forward passes: 1, 2, 2 and 4.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[Convolution | Dense], shapes: Mapping[str, torch.Size], x: Tensor,
                 second_order: bool = False):
        lengths = check_chain(layers, shapes, x)
        places = lengths[1:]
        for i in reversed(range(1, len(layers))):
            if _halves(layers[i], shapes):  # its windows then are pairs of places, with nothing in between
                places[i - 1] = 2 * places[i]
        self._layers: list[_Layer] = []
        for i, layer in enumerate(layers):
            below = self._layers[-1] if self._layers else None
            self._layers.append(_Layer(layer, shapes, below.h if below else x, below, lengths[i], lengths[i + 1],
                                       places[i], second_order))
        self.parameters = [w for layer in self._layers for w in layer.parameters]
        self._second_order, self._backward_ready, self._tangent_ready = second_order, False, False

    def pack(self, folded: Mapping[str, Tensor], packed: list[Tensor] | None = None) -> list[Tensor]:
        """``folded`` as a list like ``parameters``, a new one with as many rows if ``packed`` is not given."""
        if packed is None:
            rows = len(next(iter(folded.values())))
            packed = [w.new_empty(rows, *w.shape[1:]) for w in self.parameters]
        for layer, parts in zip(self._layers, self._by_layer(packed), strict=True):
            for part, plain in layer.pairs(parts, folded):
                part.copy_(plain)
        return packed

    def unpack(self, packed: list[Tensor], folded: Mapping[str, Tensor]) -> None:
        """Writes a list like ``parameters`` into ``folded``."""
        for layer, parts in zip(self._layers, self._by_layer(packed), strict=True):
            for part, plain in layer.pairs(parts, folded):
                plain.copy_(part)

    def _by_layer(self, packed: list[Tensor]) -> list[list[Tensor]]:
        if [part.shape[1:] for part in packed] != [w.shape[1:] for w in self.parameters]:
            raise refuse("packed", [tuple(part.shape) for part in packed],
                         f"a list like parameters: {[tuple(w.shape) for w in self.parameters]}")
        rest = iter(packed)
        return [[next(rest) for _ in layer.parameters] for layer in self._layers]

    def _check_outputs(self, name: str, g: Tensor) -> None:
        wanted = self._layers[-1].h[:, :, 0].shape
        if g.shape != wanted:  # an assignment would repeat it
            raise refuse(name, tuple(g.shape), f"a tensor like the outputs, {tuple(wanted)}")

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """[R, N, outputs]."""
        for layer in self._layers:
            layer.forward()
        return self._layers[-1].h[:, :, 0]

    @torch.no_grad()
    def add_gradient(self, g: Tensor, into: list[Tensor], scale: float = 0.0, step: float = 1.0) -> None:
        """into ← scale · into + step · Σₙ gₙ · ∂outputsₙ/∂parameters, g [R, N, outputs]; not into ``parameters``."""
        self._check_outputs("g", g)
        if not self._backward_ready:
            scratch = g.new_empty(max(layer.z[:, :, :1].numel() * layer.split for layer in self._layers))
            g_buffer = g.new_empty(max(layer.h.numel() for layer in self._layers)) if self._second_order else None
            for layer in self._layers:
                layer.prepare_backward(g_buffer, scratch)
            self._backward_ready = True
        self._layers[-1].g[:, :, 0] = g
        for layer, parts in zip(reversed(self._layers), reversed(self._by_layer(into)), strict=True):
            layer.backward(parts, scale, step)

    @torch.no_grad()
    def tangent(self, direction: list[Tensor]) -> Tensor:
        """The derivative of ``outputs`` as the parameters move along a list like them: [R, N, outputs]."""
        if not self._tangent_ready:
            for layer in self._layers:
                layer.prepare_tangent()
            self._tangent_ready = True
        for layer, parts in zip(self._layers, self._by_layer(direction), strict=True):
            layer.tangent(parts)
        return self._layers[-1].h_tangent[:, :, 0]

    @torch.no_grad()
    def add_gradient_tangent(self, g: Tensor, direction: list[Tensor], into: list[Tensor]) -> None:
        """into ← the derivative of the gradient along the same direction, where that of its argument is g."""
        self._check_outputs("g", g)
        self._layers[-1].g[:, :, 0] = g
        for layer, along, parts in zip(reversed(self._layers), reversed(self._by_layer(direction)),
                                       reversed(self._by_layer(into)), strict=True):
            layer.backward_tangent(along, parts)


def _halves(layer: Convolution | Dense, shapes: Mapping[str, torch.Size]) -> bool:
    return isinstance(layer, Convolution) and layer.stride == 2 and shapes[layer.weight][1] == 3


class _Layer:
    """h = a(z), z = C Wc + V Wv, for every row, with the windows as the rows of two matrices.

    C holds the taps that have to be copied out of the input, and a column of ones that the bias belongs to; V is a view
    of the input. A signal may have more places than its length: what is beyond stays zero, or has no effect.
    ``parameters``: [Wc] or [Wc, Wv], transposed ([R, out, in]) but for a Wc with fewer rows than columns: the products
    are faster so.
    """

    def __init__(self, layer: Convolution | Dense, shapes: Mapping[str, torch.Size], source: Tensor,
                 below: "_Layer | None", length_in: int, length: int, places: int, second_order: bool):
        self.layer, self.below, self.second_order = layer, below, second_order
        rows, examples, _, channels = source.shape
        out = shapes[layer.weight][0]
        if isinstance(layer, Dense):
            copied, taps = 0, source.shape[2]
        else:
            taps = shapes[layer.weight][1]
            copied = 1 if below and _halves(layer, shapes) else taps
        windows = rows, examples * places
        self.split, self.copied_taps, self.channels = copied * channels, copied, channels
        self.stride, self.lengths = getattr(layer, "stride", 1), (length_in, length)
        self.narrow = self.split < out

        c = source.new_empty(rows, examples, places, self.split + 1)
        c[..., -1] = 0.0
        c[:, :, :length, -1] = 1.0
        self.copies = self._copies(c, source)
        self._clear_outside(c)
        if not below:
            _fill(self.copies)
        self.c = c.view(*windows, self.split + 1)
        self.v = source.reshape(*windows, source.shape[2] // places * channels) if taps > copied else None
        self.z = source.new_empty(*windows, out)
        self.h = (torch.empty_like(self.z) if layer.activation else self.z).view(rows, examples, places, out)
        self.h_rows = self.h.view_as(self.z)
        self.beyond = None
        if places > length and layer.activation and not layer.activation.zero_at_zero:
            self.beyond = self.h[:, :, length:]

        self.wc = source.new_empty((rows, self.split + 1, out) if self.narrow else (rows, out, self.split + 1))
        self.parameters = [self.wc]
        self.products = [(self.c, self.wc if self.narrow else self.wc.mT)]
        if self.v is not None:
            self.wv = source.new_empty(rows, out, self.v.shape[2])
            self.parameters.append(self.wv)
            self.products.append((self.v, self.wv.mT))

    def _copies(self, windows: Tensor, signal: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is copied where: (part of windows [R, N, places, taps · C + ...], part of signal [R, N, places, C])."""
        parts = []
        for tap in range(self.copied_taps):
            inside, reached = _reach(tap, self.stride, *self.lengths)
            columns = slice(tap * self.channels, (tap + 1) * self.channels)
            parts.append((windows[:, :, inside, columns], signal[:, :, reached]))
        return parts

    def _clear_outside(self, windows: Tensor) -> None:
        """Zero where nothing is copied to."""
        for tap in range(self.copied_taps):
            inside, _ = _reach(tap, self.stride, *self.lengths)
            columns = slice(tap * self.channels, (tap + 1) * self.channels)
            windows[:, :, : inside.start, columns] = 0.0
            windows[:, :, inside.stop :, columns] = 0.0

    def pairs(self, parts: list[Tensor], folded: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The same numbers in packed and in plain order, as views."""
        for name in (self.layer.weight, self.layer.bias):
            if folded[name].dtype != parts[0].dtype or folded[name].device != parts[0].device:  # copies would convert
                raise refuse("inputs", f"{parts[0].dtype} on {parts[0].device}",
                             f"the dtype and device of {name}, {folded[name].dtype} on {folded[name].device}")
        weight = folded[self.layer.weight].flatten(2)
        c = parts[0].mT if self.narrow else parts[0]
        return [(c[:, :, :-1], weight[:, :, :self.split]), (c[:, :, -1], folded[self.layer.bias]),
                *((wv, weight[:, :, self.split:]) for wv in parts[1:])]

    def forward(self) -> None:
        if self.below:
            _fill(self.copies)
        _sum_of_products(self.products, self.z)
        if self.layer.activation:
            self.layer.activation.write(self.z, self.h_rows)
            if self.beyond is not None:
                self.beyond.zero_()

    def prepare_backward(self, g_buffer: Tensor | None, scratch: Tensor) -> None:
        """One scratch serves all layers, for ∂/∂C before it is added to the ∂/∂h below; so does ``g_buffer`` for ∂/∂h.

        Without Hessian products, h and z are free for ∂/∂h and ∂/∂z once they have been read.
        """
        self.g = self.h if g_buffer is None else g_buffer[:self.h.numel()].view_as(self.h)
        self.g_rows = self.g.view_as(self.z)
        self.gz = torch.empty_like(self.z) if self.second_order else self.z
        self.scratch = None
        if self.below:
            self.g_below = self.below.g
            self.g_windows = None if self.v is None else self.g_below.view(self.v.shape)
            if self.split:
                rows, windows, _ = self.z.shape
                self.scratch = scratch[:rows * windows * self.split].view(rows, windows, self.split)
                self.adds = self._copies(self.scratch.view(*self.h.shape[:3], self.split), self.g_below)

    def backward(self, into: list[Tensor], scale: float, step: float) -> None:
        """From ∂/∂h in ``g`` to ∂/∂h of the layer below, and into ← scale · into + step · the parameters' gradient."""
        activation = self.layer.activation
        if self.second_order:
            if activation:
                self.curvature = activation.differentiate(self.z).mul_(self.g_rows)  # z is a′(z) from here on
                torch.mul(self.g_rows, self.z, out=self.gz)
            else:
                self.gz.copy_(self.g_rows)
        elif activation:
            activation.pull_back(self.g_rows, self.z)
        self._parameter_gradient([(self.gz, self.c, self.v)], into, scale, step)
        if self.below:
            self._input_gradient([(self.gz, self.parameters)])

    def _input_gradient(self, products: list[tuple[Tensor, list[Tensor]]]) -> None:
        """Σ gz Wᵀ, for each (gz, parameters), back at the places that the windows were taken from."""
        if self.g_windows is None:
            self.g_below.zero_()
        else:
            _sum_of_products([(gz, parts[1]) for gz, parts in products], self.g_windows)
        if self.scratch is not None:
            _sum_of_products([(gz, parts[0].mT[:, :, :-1] if self.narrow else parts[0][:, :, :-1])
                              for gz, parts in products], self.scratch)
            for window, signal in self.adds:
                signal.add_(window)

    def _parameter_gradient(self, products: list[tuple[Tensor, Tensor, Tensor | None]], into: list[Tensor],
                            scale: float, step: float) -> None:
        """Σ Cᵀgz and Σ Vᵀgz, for each (gz, C, V)."""
        _sum_of_products([(c.mT, gz) if self.narrow else (gz.mT, c) for gz, c, _ in products], into[0], scale, step)
        if len(into) > 1:
            _sum_of_products([(gz.mT, v) for gz, _, v in products if v is not None], into[1], scale, step)

    def prepare_tangent(self) -> None:
        self.z_tangent = torch.empty_like(self.z)
        self.h_tangent = torch.empty_like(self.h) if self.layer.activation else self.z_tangent.view_as(self.h)
        self.h_tangent_rows = self.h_tangent.view_as(self.z)
        if self.below:
            self.c_tangent = torch.empty_like(self.c)
            self.c_tangent[..., -1] = 0.0
            windows = self.c_tangent.view(*self.h.shape[:3], self.split + 1)
            self.tangent_copies = self._copies(windows, self.below.h_tangent)
            self._clear_outside(windows)
            self.v_tangent = None if self.v is None else self.below.h_tangent.view(self.v.shape)

    def tangent(self, direction: list[Tensor]) -> None:
        products = [(self.c, direction[0] if self.narrow else direction[0].mT)]
        if self.v is not None:
            products.append((self.v, direction[1].mT))
        if self.below:
            _fill(self.tangent_copies)
            products.append((self.c_tangent, self.products[0][1]))
            if self.v_tangent is not None:
                products.append((self.v_tangent, self.products[1][1]))
        _sum_of_products(products, self.z_tangent)
        if self.layer.activation:
            torch.mul(self.z_tangent, self.z, out=self.h_tangent_rows)

    def backward_tangent(self, direction: list[Tensor], into: list[Tensor]) -> None:
        """As ``backward``, for the derivatives of everything."""
        gz = self.z_tangent  # nobody reads it again
        if self.layer.activation:
            gz.mul_(self.curvature).addcmul_(self.g_rows, self.z)
        else:
            gz.copy_(self.g_rows)
        gradients = [(gz, self.c, self.v)]
        if self.below:
            self._input_gradient([(gz, self.parameters), (self.gz, direction)])
            gradients.append((self.gz, self.c_tangent, self.v_tangent))
        self._parameter_gradient(gradients, into, 0.0, 1.0)


def _fill(copies: list[tuple[Tensor, Tensor]]) -> None:
    for window, signal in copies:
        window.copy_(signal)


def _sum_of_products(products: list[tuple[Tensor, Tensor]], out: Tensor, scale: float = 0.0, step: float = 1.0) -> None:
    """out ← scale · out + step · Σ A B of batched matrices."""
    for a, b in products:
        # Not out.baddbmm_: tools that count operations do not know that one.
        torch.baddbmm(out, a, b, beta=scale, alpha=step, out=out)
        scale = 1.0


def _reach(tap: int, stride: int, length: int, out: int) -> tuple[slice, slice]:
    """The windows whose ``tap`` lies inside the signal, and the places that it reads there."""
    first = 1 if tap == 0 else 0  # tap 0 of window 0 is the padding on the left
    last = min(out - 1, (length - tap) // stride)
    start = first * stride + tap - 1
    return slice(first, last + 1), slice(start, last * stride + tap, stride)
