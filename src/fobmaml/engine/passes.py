"""One layer's passes for stacked parameters, written out by hand: forward, backward, and the derivatives of both.

Signals are [R, N, places, channels]. With the channels last, most windows of a convolution are views of its input.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine.layers import Convolution, Dense


class LayerPasses:
    """h = a(z), z = C Wc + V Wv, for every row, with the windows as the rows of two matrices.

    C holds the taps that have to be copied out of the input, and a column of ones that the bias belongs to (of zeros
    without one); V is a view of the input. A signal may have more places than its length: what is beyond stays zero, or
    has no effect.
    ``parameters``: [Wc] or [Wc, Wv], transposed ([R, out, in]) but for a Wc with fewer rows than columns: the products
    are faster so.
    """

    def __init__(
        self,
        layer: Convolution | Dense,
        shapes: Mapping[str, torch.Size],
        source: Tensor,
        below: "LayerPasses | None",
        length_in: int,
        length: int,
        places: int,
        second_order: bool,
    ):
        self.layer, self.below, self.second_order = layer, below, second_order
        rows, examples, _, channels = source.shape
        out = shapes[layer.weight][0]
        if isinstance(layer, Dense):
            copied, kernel_size = 0, source.shape[2]
        else:
            kernel_size = shapes[layer.weight][1]
            copied = 1 if below and isinstance(layer, Convolution) and layer.halves(shapes) else kernel_size
        windows = rows, examples * places
        self.split, self.copied_taps, self.channels = copied * channels, copied, channels
        self.stride, self.padding = getattr(layer, "stride", 1), getattr(layer, "padding", 0)
        self.lengths = length_in, length
        self.narrow = self.split < out

        c = source.new_empty(rows, examples, places, self.split + 1)
        c[..., -1] = 0.0
        c[:, :, :length, -1] = 0.0 if layer.bias is None else 1.0
        self.source = source.contiguous()
        self.copies = self._copies(c, self.source)
        self._clear_outside(c)
        if not below:
            _fill(self.copies)
        self.c = c.view(*windows, self.split + 1)
        self.v = self.source.view(*windows, source.shape[2] // places * channels) if kernel_size > copied else None
        self.z = source.new_empty(*windows, out)
        self.h = (torch.empty_like(self.z) if layer.activation else self.z).view(rows, examples, places, out)
        self.h_rows = self.h.view_as(self.z)
        self.beyond = None
        if places > length and layer.activation and not layer.activation.zero_at_zero:
            self.beyond = self.h[:, :, length:]

        self.wc = source.new_zeros((rows, self.split + 1, out) if self.narrow else (rows, out, self.split + 1))
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
            inside, reached = _reach(tap - self.padding, self.stride, *self.lengths)
            columns = slice(tap * self.channels, (tap + 1) * self.channels)
            parts.append((windows[:, :, inside, columns], signal[:, :, reached]))
        return parts

    def _clear_outside(self, windows: Tensor) -> None:
        """Zero where nothing is copied to."""
        for tap in range(self.copied_taps):
            inside, _ = _reach(tap - self.padding, self.stride, *self.lengths)
            columns = slice(tap * self.channels, (tap + 1) * self.channels)
            windows[:, :, : inside.start, columns] = 0.0
            windows[:, :, inside.stop :, columns] = 0.0

    def pairs(self, parts: list[Tensor], folded: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The same numbers in packed and in plain order, as views."""
        for name in (self.layer.weight, self.layer.bias):
            if name is None:
                continue
            if folded[name].dtype != parts[0].dtype or folded[name].device != parts[0].device:  # copies would convert
                raise refuse(
                    "inputs",
                    f"{parts[0].dtype} on {parts[0].device}",
                    f"the dtype and device of {name}, {folded[name].dtype} on {folded[name].device}",
                )
        weight = folded[self.layer.weight]
        as_taps = weight.dim() == 4 and weight.shape[3] == self.channels
        taps = weight if as_taps else weight.flatten(2).unflatten(2, (-1, self.channels))
        c = parts[0].mT if self.narrow else parts[0]
        return [
            (c[:, :, :-1].unflatten(2, (self.copied_taps, self.channels)), taps[:, :, : self.copied_taps]),
            *([] if self.layer.bias is None else [(c[:, :, -1], folded[self.layer.bias])]),
            *((wv.unflatten(2, (-1, self.channels)), taps[:, :, self.copied_taps :]) for wv in parts[1:]),
        ]

    def read(self, x: Tensor) -> None:
        """In place of the inputs, which it may write over."""
        self.source.copy_(x)
        _fill(self.copies)

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
        self.g = self.h if g_buffer is None else g_buffer[: self.h.numel()].view_as(self.h)
        self.g_rows = self.g.view_as(self.z)
        self.gz = torch.empty_like(self.z) if self.second_order else self.z
        self.scratch = None
        if self.below:
            self.g_below = self.below.g
            self.g_windows = None if self.v is None else self.g_below.view(self.v.shape)
            if self.split:
                rows, windows, _ = self.z.shape
                self.scratch = scratch[: rows * windows * self.split].view(rows, windows, self.split)
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
            _sum_of_products(
                [(gz, parts[0].mT[:, :, :-1] if self.narrow else parts[0][:, :, :-1]) for gz, parts in products],
                self.scratch,
            )
            for window, signal in self.adds:
                signal.add_(window)

    def _parameter_gradient(
        self, products: list[tuple[Tensor, Tensor, Tensor | None]], into: list[Tensor], scale: float, step: float
    ) -> None:
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


def _reach(offset: int, stride: int, length: int, out: int) -> tuple[slice, slice]:
    """The windows of which the number at ``offset`` from their place lies inside the signal, and where it lies."""
    first = max(-(offset // stride), 0)
    last = min(out - 1, (length - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)
