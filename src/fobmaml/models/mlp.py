"""A multilayer perceptron, as a plain module and on stacked parameters."""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from fobmaml.arguments import whole_number
from fobmaml.models.activations import activation_function


class MLP(nn.Module):
    """``depth`` hidden layers of ``width`` units: [N, ...] -> [N, outputs]. Depth 0 is a linear model."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 3,
                 activation: str = "silu"):
        super().__init__()
        width, depth = whole_number("width", width), whole_number("depth", depth, at_least=0)
        self.activation = activation_function(activation)
        sizes = [math.prod(input_shape), *[width] * depth, outputs]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)

    def forward_stacked(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Row r of ``parameters`` applied to row r of ``x``: [R, N, ...] -> [R, N, outputs]."""
        h = x.flatten(2)
        last = len(self.layers) - 1
        for layer in range(last + 1):
            weight, bias = parameters[f"layers.{layer}.weight"], parameters[f"layers.{layer}.bias"]
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))
            h = self.activation(h) if layer < last else h
        return h
