"""A one-dimensional CNN."""

import math

import torch
from torch import Tensor, nn

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.activations import activation_function
from fobmaml.engine.layers import examples_of, span

HALVINGS = 3


class CNN1d(nn.Module):
    """``depth`` convolutions of ``width`` channels and a linear layer: [N, length] -> [N, outputs].

    ``length`` is that of ``input_shape``, or another of ``lengths``: the strides leave as many places of it. The first
    convolution has a kernel of size 5, the others 3; the first three have stride 2, later ones keep the length. Depth 3
    and width 25 give MNIST-1D's reference CNN (Greydanus & Kobak 2024, arXiv:2011.14439).
    ``activation``: ``silu``, ``gelu``, ``softplus``, ``tanh`` or ``relu``.

    Raises ValueError for inputs that are not sequences, or too short.
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 3, activation: str = "silu"
    ):
        super().__init__()
        width, depth = whole_number("width", width), whole_number("depth", depth)
        outputs = whole_number("outputs", outputs)
        if len(input_shape) != 1 or input_shape[0] < 3:
            raise refuse("input_shape", tuple(input_shape), "one sequence of at least 3 values; model=mlp takes others")
        self.activation = activation_function(activation)
        self.convolutions = nn.ModuleList()
        length, channels = input_shape[0], 1
        self.strides = [2 if layer < HALVINGS else 1 for layer in range(depth)]
        sizes = [5, *[3] * (depth - 1)]
        for size, stride in zip(sizes, self.strides, strict=True):
            convolution = nn.Conv1d(channels, width, size, stride, padding=1, device="meta")
            _draw(convolution, (width, channels, size))
            self.convolutions.append(convolution)
            length, channels = (length + 2 - size) // stride + 1, width
        self.head = nn.Linear(channels * length, outputs, device="meta")
        _draw(self.head, (outputs, channels, length))
        least = most = length
        for size, stride in zip(reversed(sizes), reversed(self.strides), strict=True):
            least, most = max((least - 1) * stride + size - 2, 1), most * stride + size - 3
        self.lengths = range(least, most + 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, length] -> [N, outputs]. Raises ValueError for other inputs."""
        if x.dim() != 2 or x.shape[1] not in self.lengths:
            raise refuse("inputs", examples_of(x.shape), f"[examples, {span(self.lengths)}]")
        h = x.unsqueeze(1)  # [N, channels, length]
        for convolution in self.convolutions:
            h = self.activation(convolution(h))
        return self.head(h.flatten(1))


def _draw(layer: nn.Conv1d | nn.Linear, shape: tuple[int, int, int]) -> None:
    """Parameters as torch.nn.Conv1d and Linear draw them, but in an order in which a seed stands for the network that
    the measurements in results/ began with. ``layer``: on the meta device, where torch itself has drawn nothing
    (``to_empty`` would import sympy). ``shape``: the weight's as (out, in, places)."""
    channels_out, channels_in, places = shape
    bound = 1.0 / math.sqrt(channels_in * places)
    weight = torch.empty(places, channels_in, channels_out).uniform_(-bound, bound).permute(2, 1, 0)
    layer.weight = nn.Parameter(weight.reshape(layer.weight.shape))
    layer.bias = nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound))
