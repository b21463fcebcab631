"""What networks share: checks of their inputs, activations and norms by name."""

import math

from torch import Tensor, nn

from fobmaml.arguments import one_of, refuse, whole_number

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}
GROUPS = 8
"""Of channels that are normalised together, where the channels divide into so many."""


def activation_layer(name: str) -> nn.Module:
    return ACTIVATIONS[one_of("activation", name, tuple(ACTIVATIONS))]()


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 8 groups, or as many as divide both. It stands where the few-shot literature has batch statistics, with which
    a task's loss would not be a function of its parameters alone. Reference: Wu & He 2018, arXiv:1803.08494."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def image_shape(input_shape: tuple[int, ...], halvings: int) -> tuple[int, int, int]:
    """(channels, height, width) of images that so many halvings leave at least one place of. Raises ValueError for
    others."""
    shape = tuple(input_shape)
    if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < 2**halvings:
        raise refuse(
            "input_shape",
            shape,
            f"(channels, height, width), both at least {2**halvings}, which {halvings} poolings halve",
        )
    return shape[0], shape[1], shape[2]


class Images(nn.Module):
    """Lets images [N, channels, height, width] of one shape through. Raises ValueError for others."""

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise refused(x, ", ".join(map(str, self.shape)))
        return x

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class Sequences(nn.Module):
    """Sequences as vectors, [N, L, ``features``], for a network of ``width``.

    ``input_shape``: (length,), of values [N, L] or, with ``tokens`` the size of their vocabulary, of whole numbers
    below it [N, L], which get vectors of ``width`` numbers that are learned; or (length, d), of vectors [N, L, d].
    L is at most ``length``. Raises ValueError for others.
    """

    def __init__(self, input_shape: tuple[int, ...], width: int, tokens: int | None = None):
        super().__init__()
        shape = tuple(input_shape)
        if len(shape) not in ((1, 2) if tokens is None else (1,)) or min(shape) < 1:
            takes = "(length,), or (length, d) for vectors" if tokens is None else "(length,), with tokens"
            raise refuse("input_shape", shape, takes)
        self.length, self.vector = shape[0], shape[1:]
        self.features = 1 if len(shape) == 1 else shape[1]
        self.embedding: nn.Embedding | None = None
        if tokens is not None:
            self.embedding, self.features = nn.Embedding(whole_number("tokens", tokens), width), width

    def forward(self, x: Tensor) -> Tensor:
        """[N, L], [N, L, d] -> [N, L, features]."""
        if x.shape[2:] != self.vector or x.dim() < 2 or not 1 <= x.shape[1] <= self.length:
            raise refused(x, ", ".join([f"1 to {self.length}", *map(str, self.vector)]))
        if self.embedding is not None:
            if x.is_floating_point():
                raise refuse("inputs", f"numbers of {x.dtype}", "whole numbers, for a network of tokens")
            return self.embedding(x)
        return x if self.vector else x.unsqueeze(-1)


def refused(x: Tensor, takes: str) -> ValueError:
    """The error for inputs of a wrong shape, whatever the number of examples."""
    got = ", ".join(["examples", *map(str, x.shape[1:])][: x.dim()])
    return refuse("inputs", f"[{got}]", f"[examples, {takes}]")
