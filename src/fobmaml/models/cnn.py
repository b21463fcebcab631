"""A one-dimensional CNN, as a plain module and on stacked parameters."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fobmaml.arguments import refuse, whole_number
from fobmaml.models.activations import activation_function

HALVINGS = 3


class CNN1d(nn.Module):
    """``depth`` convolutions of ``width`` channels and a linear layer: [N, length] -> [N, outputs].

    The first convolution has 5 taps, the others 3; the first three have stride 2, later ones keep the length. Depth 3
    and width 25 give MNIST-1D's reference CNN (Greydanus & Kobak 2024, arXiv:2011.14439). Weights are stored
    [taps, channels in, channels out], the layout in which a window of a channels-last signal is one matrix row.

    Raises ValueError for inputs that are not sequences, or too short.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 3,
                 activation: str = "silu"):
        super().__init__()
        width, depth = whole_number("width", width), whole_number("depth", depth)
        if len(input_shape) != 1 or input_shape[0] < 3:
            raise refuse("input_shape", tuple(input_shape),
                         "one sequence of at least 3 values; model=mlp takes others")
        self.activation = activation_function(activation)
        self.strides = [2 if layer < HALVINGS else 1 for layer in range(depth)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        length, channels = input_shape[0], 1
        for layer, stride in enumerate(self.strides):
            taps = 5 if layer == 0 else 3
            self._add(taps, channels, width)
            length, channels = (length + 2 - taps) // stride + 1, width
        self._add(1, length * channels, outputs)

    def _add(self, taps: int, channels_in: int, channels_out: int) -> None:
        bound = 1.0 / math.sqrt(taps * channels_in)  # as torch.nn.Conv1d and Linear do
        self.weights.append(nn.Parameter(torch.empty(taps, channels_in, channels_out).uniform_(-bound, bound)))
        self.biases.append(nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)  # [N, channels, length]
        for weight, bias, stride in zip(self.weights, self.biases, self.strides, strict=False):
            h = self.activation(F.conv1d(h, weight.permute(2, 1, 0), bias, stride=stride, padding=1))
        return h.transpose(1, 2).flatten(1) @ self.weights[-1][0] + self.biases[-1]

    def forward_stacked(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Row r of ``parameters`` applied to row r of ``x``: [R, N, length] -> [R, N, outputs].

        One batched matrix product a layer; ``torch.func.vmap`` of ``forward`` would be a grouped convolution, several
        times slower on a CPU.
        """
        rows, examples, _ = x.shape
        h = x.unsqueeze(-1)  # [R, N, length, channels]
        for layer, stride in enumerate(self.strides):
            weight, bias = parameters[f"weights.{layer}"], parameters[f"biases.{layer}"]
            windows = Windows.apply(h, weight.shape[1], stride)
            h = self.activation(torch.baddbmm(bias.unsqueeze(1), windows, weight.flatten(1, 2)))
            h = h.view(rows, examples, -1, weight.shape[-1])
        last = len(self.strides)
        weight, bias = parameters[f"weights.{last}"], parameters[f"biases.{last}"]
        return torch.baddbmm(bias.unsqueeze(1), h.flatten(2), weight.flatten(1, 2))


class Windows(torch.autograd.Function):
    """All windows of a channels-last signal padded by one zero on each side.

    [R, N, length, C] -> [R, N · length_out, taps · C]. Its transpose is ``WindowsTransposed``, so that both can be
    differentiated as often as needed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, taps: int, stride: int) -> Tensor:  # type: ignore[no-untyped-def]
        rows, examples, length, channels = x.shape
        ctx.geometry = taps, stride, length, examples
        out = (length + 2 - taps) // stride + 1
        windows = x.new_empty(rows, examples, out, taps, channels)
        for tap in range(taps):
            inside, source = _reach(tap, stride, length, out)
            windows[:, :, : inside.start, tap] = 0.0
            windows[:, :, inside.stop :, tap] = 0.0
            windows[:, :, inside, tap] = x[:, :, source]
        return windows.view(rows, examples * out, taps * channels)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return WindowsTransposed.apply(gradient, *ctx.geometry), None, None


class WindowsTransposed(torch.autograd.Function):
    """The transpose of ``Windows``: every window entry is added to the place that it was taken from."""

    @staticmethod
    def forward(ctx, windows: Tensor, taps: int, stride: int, length: int, examples: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.geometry = taps, stride
        rows, out = windows.shape[0], (length + 2 - taps) // stride + 1
        windows = windows.view(rows, examples, out, taps, -1)
        x = windows.new_zeros(rows, examples, length, windows.shape[-1])
        for tap in range(taps):
            inside, source = _reach(tap, stride, length, out)
            x[:, :, source] += windows[:, :, inside, tap]
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return Windows.apply(gradient, *ctx.geometry), None, None, None, None


def _reach(tap: int, stride: int, length: int, out: int) -> tuple[slice, slice]:
    """The windows whose ``tap`` lies inside the signal, and the positions that it reads there."""
    first = 1 if tap == 0 else 0  # tap 0 of window 0 is the padding on the left
    last = min(out - 1, (length - tap) // stride)
    start = first * stride + tap - 1
    return slice(first, last + 1), slice(start, last * stride + tap, stride)
