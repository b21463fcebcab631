"""Sequences of 1-d convolutions and linear layers, from a module's nodes to what the engines by hand take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fobmaml.engine.activations import activation_function
from fobmaml.engine.layers import Convolution, Dense, check_chain
from fobmaml.engine.network import Network
from fobmaml.engine.nodes import Activate, Conv, Flatten, Linear, Node, Reshape


@dataclass(frozen=True)
class Chain:
    """``layers``, and the ``shapes`` of their parameters by name, as ``Stacked`` and the kernel take them: [out,
    kernel_size, in], [out, places, channels] and [out], where the module has [out, in, kernel_size], [out, channels ·
    places] and [out]. ``channels``: of the inputs; 0: they are one vector. ``as_stored``: the weights of convolutions
    lie in a row in this order."""

    layers: tuple[Convolution | Dense, ...]
    shapes: dict[str, torch.Size]
    channels: int
    as_stored: bool

    def signals(self, x: Tensor) -> Tensor:
        """The module's inputs [R, N, ...] as [R, N, length, channels]."""
        if not self.channels:
            return x.reshape(*x.shape[:2], 1, -1)
        return x.reshape(*x.shape[:2], self.channels, -1).mT

    def fold(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters, for each row one, by name and in its layout, in ``shapes``: views."""
        folded = {}
        for name, shape in self.shapes.items():
            part = parameters[name]
            if len(shape) == 3:
                part = part.view(len(part), shape[0], shape[2], shape[1]).mT
            folded[name] = part
        return folded


def chain_of(nodes: Sequence[Node], network: Network, x: Tensor) -> Chain | str:
    """The same as layers, for inputs like ``x`` [R, N, ...]; text, which of the nodes is none of them, if it is
    another."""
    shapes = network.shapes
    layers: list[Convolution | Dense] = []
    folded = dict(shapes)
    dims, channels = x.dim() - 2, 0  # of a signal, [channels, length] or [values]
    for node in nodes:
        match node:
            case Flatten():
                dims = 1
            case Reshape(shape) if not layers:
                dims = len(shape)
            case Activate(name) if layers and layers[-1].activation is None:
                layers[-1] = replace(layers[-1], activation=activation_function(name))
            case Conv(weight, bias, (1, stride), (0, padding), (1, 1), 1) if dims == 2 and len(shapes[weight]) == 3:
                out, into, size = shapes[weight]
                channels = channels or into
                folded[weight] = torch.Size((out, size, into))
                layers.append(Convolution(weight, bias, stride, None, padding))
            case Linear(weight, bias) if dims == 1:
                out, values = shapes[weight]
                below = shapes[layers[-1].weight][0] if layers else values
                if values % below:
                    return f"{weight} {tuple(shapes[weight])}"
                places = values // below
                if places > 1:
                    folded[weight] = torch.Size((out, places, below))
                layers.append(Dense(weight, bias, None, turned=places > 1 and below > 1))
            case _:
                return f"{node}"
    if not layers or not isinstance(layers[-1], Dense):
        return "a last layer that is not linear"
    turned = [layer.weight for layer in layers if isinstance(layer, Convolution) and min(shapes[layer.weight][1:]) > 1]
    as_stored = network.turned.issuperset(turned)
    chain = Chain(tuple(layers), folded, channels, as_stored)
    try:
        check_chain(layers, folded, chain.signals(x))
    except ValueError as error:
        return str(error)
    return chain
