"""Activations by name. The theory needs twice-differentiable losses, which rules ReLU out for bias measurements."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fobmaml.arguments import one_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "softplus": F.softplus, "tanh": torch.tanh, "relu": F.relu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[one_of("activation", name, tuple(ACTIVATIONS))]
