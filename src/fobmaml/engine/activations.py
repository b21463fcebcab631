"""Activations by name, with the derivatives that hand-written passes need.

The theory needs twice-differentiable losses, which rules ReLU out for bias measurements.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fobmaml.arguments import one_of


class Activation:
    """An elementwise function a, its derivatives by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.zero_at_zero = float(function(torch.zeros(()))) == 0.0

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)

    def write(self, z: Tensor, out: Tensor) -> None:
        """out ← a(z)."""
        out.copy_(self.function(z))

    def pull_back(self, g: Tensor, z: Tensor) -> None:
        """z ← g ⊙ a′(z)."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            z.copy_(torch.autograd.grad(self.function(leaf), leaf, g)[0])

    def differentiate(self, z: Tensor) -> Tensor:
        """z ← a′(z); returns a″(z)."""
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            (first,) = torch.autograd.grad(self.function(leaf).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), leaf, allow_unused=True)  # none: piecewise linear
        z.copy_(first)
        return torch.zeros_like(z) if second is None else second


class SiLU(Activation):
    """z σ(z), the default, by torch's fused kernels."""

    def __init__(self) -> None:
        super().__init__(F.silu)

    def write(self, z: Tensor, out: Tensor) -> None:
        torch.ops.aten.silu.out(z, out=out)

    def pull_back(self, g: Tensor, z: Tensor) -> None:
        torch.ops.aten.silu_backward.grad_input(g, z, grad_input=z)

    def differentiate(self, z: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        q = 1.0 - s
        slope = s * q
        second = q.sub_(s).mul_(z).add_(2.0).mul_(slope)  # σ′ (2 + z (1 − 2σ))
        z.mul_(slope).add_(s)  # σ + z σ′
        return second


ACTIVATIONS: dict[str, Activation] = {
    "silu": SiLU(),
    "gelu": Activation(F.gelu),
    "softplus": Activation(F.softplus),
    "tanh": Activation(torch.tanh),
    "relu": Activation(F.relu),
}


def activation_function(name: str) -> Activation:
    return ACTIVATIONS[one_of("activation", name, tuple(ACTIVATIONS))]
