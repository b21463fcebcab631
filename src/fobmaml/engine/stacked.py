"""Sequences of 1-d convolutions and linear layers, all rows at once, with the derivatives written out by hand.

For each layer, one batched matrix product serves all rows. It is faster than autograd for three reasons: buffers are
allocated once and used again in every inner step, no graph is recorded, and a step of gradient descent is part of the
product that computes the gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine.base import Engine, Steps
from fobmaml.engine.chain import Chain
from fobmaml.engine.layers import Convolution, Dense, check_chain
from fobmaml.engine.losses import Part, RowLoss, rows_taken
from fobmaml.engine.network import Network
from fobmaml.engine.passes import LayerPasses


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
    def __init__(
        self,
        layers: Sequence[Convolution | Dense],
        shapes: Mapping[str, torch.Size],
        x: Tensor,
        second_order: bool = False,
    ):
        lengths = check_chain(layers, shapes, x)
        places = lengths[1:]
        for i in reversed(range(1, len(layers))):
            layer = layers[i]
            if isinstance(layer, Convolution) and layer.halves(shapes):
                places[i - 1] = 2 * places[i]
        self._layers: list[LayerPasses] = []
        for i, layer in enumerate(layers):
            below = self._layers[-1] if self._layers else None
            self._layers.append(
                LayerPasses(
                    layer, shapes, below.h if below else x, below, lengths[i], lengths[i + 1], places[i], second_order
                )
            )
        self.parameters = [w for layer in self._layers for w in layer.parameters]
        self._second_order, self._backward_ready, self._tangent_ready = second_order, False, False

    @torch.no_grad()
    def read(self, x: Tensor) -> None:
        """Takes ``x`` of the same shape in place of the inputs."""
        self._layers[0].read(x)

    def pack(self, folded: Mapping[str, Tensor], packed: list[Tensor] | None = None) -> list[Tensor]:
        """``folded`` as a list like ``parameters``, a new one with as many rows if ``packed`` is not given."""
        if packed is None:
            rows = len(next(iter(folded.values())))
            packed = [w.new_zeros(rows, *w.shape[1:]) for w in self.parameters]  # a missing bias is zero
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
            raise refuse(
                "packed",
                [tuple(part.shape) for part in packed],
                f"a list like parameters: {[tuple(w.shape) for w in self.parameters]}",
            )
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
        for layer, along, parts in zip(
            reversed(self._layers), reversed(self._by_layer(direction)), reversed(self._by_layer(into)), strict=True
        ):
            layer.backward_tangent(along, parts)


class Stacked(Engine):
    """Takes networks that are a ``chain``. Memory: the activations of all rows, of ``linearize`` three times."""

    def __init__(self, network: Network, x: Tensor, loss: RowLoss, chain: Chain):
        super().__init__(network, x, loss)
        self.chain = chain

    @cached_property
    def _passes(self) -> StackedNetwork:
        return self._new_passes()

    def _new_passes(self, second_order: bool = False) -> StackedNetwork:
        return StackedNetwork(self.chain.layers, self.chain.shapes, self.chain.signals(self.x), second_order)

    def _folded(self, rows: Tensor) -> dict[str, Tensor]:
        return self.chain.fold(self.network.views(rows))

    def _at(self, phi: Tensor, passes: StackedNetwork) -> StackedNetwork:
        """``passes``, with the parameters ``phi`` [R, P]."""
        passes.pack(self._folded(phi.detach()), passes.parameters)
        return passes

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "Stacked":
        loss = self.row_loss.of_examples(examples, parts)
        return Stacked(self.network, rows_taken(self.x, examples), loss, self.chain)

    def outputs(self, phi: Tensor) -> Tensor:
        return self._at(phi, self._passes).outputs()

    def gradient(self, phi: Tensor) -> Tensor:
        g, _ = self.row_loss.linearize(self.outputs(phi))
        into = [torch.empty_like(part) for part in self._passes.parameters]
        self._passes.add_gradient(g, into)
        return self._unpack(into)

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        # Of its own, so that what the products need stays as it is.
        passes = self._at(phi, self._new_passes(second_order=True))
        g, loss_tangent = self.row_loss.linearize(passes.outputs(), second_order=True)
        gradient = [torch.empty_like(part) for part in passes.parameters]
        passes.add_gradient(g, gradient)

        def product(v: Tensor) -> Tensor:
            direction = passes.pack(self._folded(v))
            into = [torch.empty_like(part) for part in direction]
            passes.add_gradient_tangent(loss_tangent(passes.tangent(direction)), direction, into)
            return self._unpack(into, passes)

        return self._unpack(gradient, passes), product

    def gradient_descent(self, theta: Tensor, steps: Steps) -> Tensor:
        rates, lam, momentum, draws = steps
        engine = self if draws is None else self.of_examples(draws.examples[:, 0], draws.parts)
        passes = engine._passes
        start = passes.pack(self._folded(theta[:1] if theta.stride(0) == 0 else theta))
        displacement = [torch.zeros_like(part) for part in passes.parameters]
        velocity = [torch.zeros_like(part) for part in displacement] if momentum else displacement
        for step, rate in enumerate(rates):
            if draws is not None and step:
                engine = self.of_examples(draws.examples[:, step], draws.parts)
                passes.read(self.chain.signals(engine.x))  # over the copy that the first step took
            for phi, origin, d in zip(passes.parameters, start, displacement, strict=True):
                torch.add(origin, d, out=phi)
            g, _ = engine.row_loss.linearize(passes.outputs())
            if momentum:
                passes.add_gradient(g, velocity, momentum, 1.0)
                for d, v in zip(displacement, velocity, strict=True):
                    d.sub_(v.add_(d, alpha=lam), alpha=rate)
            else:
                passes.add_gradient(g, displacement, 1.0 - rate * lam, -rate)
        return self._unpack(displacement, passes)

    def _unpack(self, packed: list[Tensor], passes: StackedNetwork | None = None) -> Tensor:
        rows = packed[0].new_empty(len(packed[0]), self.network.parameter_count)
        (passes or self._passes).unpack(packed, self._folded(rows))
        return rows
