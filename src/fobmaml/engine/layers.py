"""What a network that is evaluated by hand says of its layers, and whether they and the inputs fit together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.activations import Activation


@dataclass(frozen=True)
class Convolution:
    """A 1-d convolution: ``weight`` and ``bias``, if any, name parameters [out, kernel_size, in] and [out]."""

    weight: str
    bias: str | None
    stride: int
    activation: Activation | None
    padding: int = 1

    def __post_init__(self) -> None:
        whole_number("stride", self.stride)
        whole_number("padding", self.padding, at_least=0)

    def halves(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Its windows then are pairs of places, with nothing in between."""
        return self.stride == 2 and self.padding == 1 and shapes[self.weight][1] == 3


@dataclass(frozen=True)
class Dense:
    """A linear layer on the whole signal: ``weight`` and ``bias``, if any, name parameters [out, ...] and [out].

    ``turned``: in a row, a weight [out, places, channels] lies as [out, channels, places].
    """

    weight: str
    bias: str | None
    activation: Activation | None
    turned: bool = False


def length_after(layer: Convolution | Dense, shapes: Mapping[str, torch.Size], length: int) -> int:
    """Of the signal that leaves a layer."""
    if isinstance(layer, Dense):
        return 1
    return (length + 2 * layer.padding - shapes[layer.weight][1]) // layer.stride + 1


def lengths_taken(layers: Sequence[Convolution | Dense], shapes: Mapping[str, torch.Size]) -> range | None:
    """Of the inputs that the layers take; None if the first is dense, which takes any of its number of values.

    Raises ValueError for layers that do not follow from each other, or do not name every parameter once.
    """
    names = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
    if sorted(names) != sorted(shapes):  # of a parameter named twice, the gradient would be that of one place
        raise refuse(
            "model",
            f"layers of {', '.join(names) or 'no parameters'}",
            f"layers that name each parameter once: {', '.join(shapes)}",
        )
    convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
    last = len(convolutions)
    if not all(isinstance(layer, Convolution) for layer in layers[:last]) or last == len(layers):
        raise refuse(
            "model", f"layers {', '.join(type(layer).__name__ for layer in layers)}", "convolutions, then dense layers"
        )
    places, below = 1, 0
    for i, layer in enumerate(layers):
        weight = shapes[layer.weight]
        bias = weight[:1] if layer.bias is None else shapes[layer.bias]
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
            raise refuse(
                "model",
                f"{layer.weight} {tuple(weight)} and {layer.bias} {tuple(bias)}",
                f"a weight [out, kernel_size, in] ([out, ...] if dense){above}, and a bias [out]",
            )
        below = weight[0]
    if not convolutions:
        return None
    least = most = places
    for layer in reversed(convolutions):
        beyond = shapes[layer.weight][1] - 2 * layer.padding
        least, most = max((least - 1) * layer.stride + beyond, 1), most * layer.stride + beyond - 1
        if most < 1:
            raise refuse(
                "model",
                f"{layer.weight} {tuple(shapes[layer.weight])}",
                "a convolution that some signal leaves as long as the layers above need it",
            )
    return range(least, most + 1)


def check_chain(layers: Sequence[Convolution | Dense], shapes: Mapping[str, torch.Size], x: Tensor) -> list[int]:
    """The lengths of the signals from the inputs ``x`` [R, N, length, channels] to the outputs.

    Raises ValueError, which begins with ``model`` for layers that are no network, with ``inputs`` for others than they
    take.
    """
    lengths = lengths_taken(layers, shapes)
    size = shapes[layers[0].weight][1:]
    takes = f"[examples, {span(lengths)}, {size[1]}]" if lengths else f"{math.prod(size)} values an example"
    if (
        x.dim() != 4
        or not x.is_floating_point()
        or (x.shape[2] not in lengths or x.shape[3] != size[1] if lengths else x.shape[2:].numel() != math.prod(size))
    ):
        raise refuse("inputs", f"{x.dtype} {examples_of(x.shape[1:])}", f"{takes}, floating-point numbers")
    found = [x.shape[2]]
    for layer in layers:
        found.append(length_after(layer, shapes, found[-1]))
    return found


def examples_of(shape: Sequence[int]) -> str:
    """A shape [N, ...] for a message that does not depend on the number of examples."""
    return f"[{', '.join(['examples', *map(str, shape[1:])][: len(shape)])}]"


def span(lengths: range) -> str:
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
