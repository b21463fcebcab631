"""A multilayer perceptron."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.activations import activation_function
from fobmaml.engine.layers import examples_of


class MLP(nn.Module):
    """``depth`` hidden layers of ``width`` units with an ``activation``: [N, ...] -> [N, outputs]. Depth 0 is a linear
    model. ``activation``: ``silu``, ``gelu``, ``softplus``, ``tanh`` or ``relu``."""

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 3, activation: str = "silu"
    ):
        super().__init__()
        width, depth = whole_number("width", width), whole_number("depth", depth, at_least=0)
        outputs = whole_number("outputs", outputs)
        for size in input_shape:
            whole_number("input_shape", size)
        self.activation = activation_function(activation)
        sizes = [math.prod(input_shape), *[width] * depth, outputs]
        self.values = sizes[0]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...], as many values an example as in ``input_shape`` -> [N, outputs]. Raises ValueError for others."""
        h = x.reshape(*x.shape[:1], self._values(x.shape))
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)

    def _values(self, shape: torch.Size) -> int:
        """Of an example, in inputs [N, ...]."""
        if not shape or shape[1:].numel() != self.values:
            raise refuse("inputs", examples_of(shape), f"{self.values} values an example")
        return self.values
