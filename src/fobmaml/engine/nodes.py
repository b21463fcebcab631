"""What a network of known operations is: one node an operation, applied one after another.

Parameters are named as the module names them and have the module's own layout. A one-dimensional operation is a
two-dimensional one of height 1; its weight may be [out, in, kernel width].
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """A convolution: ``weight`` [out, in / groups, (kernel height,) kernel width], ``bias`` [out]."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Linear:
    """A linear layer of an example's values, one vector: ``weight`` [out, in], ``bias`` [out]."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class GroupNorm:
    """Each group of channels, at all places together, is brought to mean 0 and variance 1; ``weight`` and ``bias``, if
    any, [channels]."""

    groups: int
    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class Activate:
    """An elementwise function, by its name in ``engine.activations``."""

    activation: str


@dataclass(frozen=True)
class Pool:
    """Of each window the largest value, or the average, which counts the zeros of the padding."""

    kind: str  # "max" or "average"
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class Reshape:
    """The values of an example, in their order, in another shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Flatten:
    """The values of an example, in their order, as one vector: of channels, the places of the first come first."""


Node = Conv | Linear | GroupNorm | Activate | Pool | Reshape | Flatten
