"""A one-dimensional CNN."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.activations import activation_function
from fobmaml.engine.layers import Convolution, Dense, examples_of, lengths_taken, span

HALVINGS = 3


class CNN1d(nn.Module):
    """``depth`` convolutions of ``width`` channels and a linear layer: [N, length] -> [N, outputs].

    ``length`` is that of ``input_shape``, or another of ``lengths``: the strides leave as many places of it. The first
    convolution has a kernel of size 5, the others 3; the first three have stride 2, later ones keep the length. Depth 3
    and width 25 give MNIST-1D's reference CNN (Greydanus & Kobak 2024, arXiv:2011.14439). Weights are stored
    [channels out, kernel_size, channels in], the layout of the windows of a channels-last signal.

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
        self.strides = [2 if layer < HALVINGS else 1 for layer in range(depth)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        length, channels = input_shape[0], 1
        for layer, stride in enumerate(self.strides):
            kernel_size = 5 if layer == 0 else 3
            self._add(kernel_size, channels, width)
            length, channels = (length + 2 - kernel_size) // stride + 1, width
        self._add(length, channels, outputs)
        shapes = {name: p.shape for name, p in self.named_parameters()}
        self.lengths = lengths_taken(CNN1d.stacked_layers(self), shapes) or range(0)

    def _add(self, kernel_size: int, channels_in: int, channels_out: int) -> None:
        bound = 1.0 / math.sqrt(kernel_size * channels_in)  # as torch.nn.Conv1d and Linear do
        # Drawn in this order so that a seed stands for the network that the measurements in results/ began with.
        drawn = torch.empty(kernel_size, channels_in, channels_out).uniform_(-bound, bound)
        self.weights.append(nn.Parameter(drawn.permute(2, 0, 1).contiguous()))
        self.biases.append(nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, length] -> [N, outputs]. Raises ValueError for other inputs."""
        self._check(x.shape)
        h = x.unsqueeze(1)  # [N, channels, length]
        for weight, bias, stride in zip(self.weights, self.biases, self.strides, strict=False):
            h = self.activation(F.conv1d(h, weight.mT, bias, stride=stride, padding=1))
        return F.linear(h.mT.flatten(1), self.weights[-1].flatten(1), self.biases[-1])

    def stacked_layers(self) -> list[Convolution | Dense]:
        """The same network for ``engine.stacked.Stacked``; a signal there is [length, channels]."""
        last = len(self.strides)
        return [
            *(
                Convolution(f"weights.{i}", f"biases.{i}", stride, self.activation)
                for i, stride in enumerate(self.strides)
            ),
            Dense(f"weights.{last}", f"biases.{last}", None),
        ]

    def stacked_inputs(self, x: Tensor) -> Tensor:
        """[R, N, length] -> [R, N, length, 1 channel]. Raises ValueError as ``forward`` does."""
        self._check(x.shape[1:])
        return x.unsqueeze(-1)

    def _check(self, shape: torch.Size) -> None:
        if len(shape) != 2 or shape[1] not in self.lengths:
            raise refuse("inputs", examples_of(shape), f"[examples, {span(self.lengths)}]")
