"""What a network of known operations is: one node an operation, applied to what the node before gave.

``Take`` goes back to an earlier result, and ``Sum`` adds one: so a list of nodes says what a graph of operations is.

Parameters are named as the module names them and have the module's own layout. A one-dimensional operation is a
two-dimensional one of height 1; its weight may be [out, in, kernel width].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine.activations import activation_function


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
    """A linear layer of an example's values, one vector, or of the vector at each place of a sequence [places, in]:
    ``weight`` [out, in], ``bias`` [out]."""

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


@dataclass(frozen=True)
class Take:
    """What the node number ``step`` gave, from 0 on; -1: the inputs."""

    step: int


@dataclass(frozen=True)
class Sum:
    """Of what the node before gave and what the node number ``step`` gave, of the same shape."""

    step: int


@dataclass(frozen=True)
class LayerNorm:
    """The vector at each place, [places, values] or [values], is brought to mean 0 and variance 1; ``weight`` and
    ``bias``, if any, [values]."""

    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class RMSNorm:
    """The vector at each place, [places, values] or [values], by the root of its mean square and ``eps``; times
    ``weight`` [values], if any."""

    weight: str | None
    eps: float


@dataclass(frozen=True)
class Shift:
    """Adds a ``parameter`` of an example's shape."""

    parameter: str


@dataclass(frozen=True)
class Embedding:
    """Of a sequence of whole numbers the vectors that have them in a table: ``weight`` [numbers, values], [places] ->
    [places, values]."""

    weight: str


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention of a sequence [places, 3 · values], at each place queries, keys and values, of so
    many ``heads``: [places, values]."""

    heads: int


@dataclass(frozen=True)
class MeanOfPlaces:
    """Of a sequence: [places, values] -> [values]."""


Node = (
    Conv
    | Linear
    | GroupNorm
    | Activate
    | Pool
    | Reshape
    | Flatten
    | Take
    | Sum
    | LayerNorm
    | RMSNorm
    | Shift
    | Embedding
    | Attention
    | MeanOfPlaces
)
Module = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def as_module(nodes: Sequence[Node]) -> Module:
    """(parameters, examples [N, ...]) -> [N, ...]: what the nodes say, by torch's own operators."""

    def call(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        results = [x]
        for node in nodes:
            if isinstance(node, Take):
                results.append(results[node.step + 1])
            elif isinstance(node, Sum):
                results.append(results[-1] + results[node.step + 1])
            else:
                results.append(_applied(node, parameters, results[-1]))
        return results[-1]

    return call


def _applied(node: Node, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    match node:
        case Conv(weight, bias, stride, padding, dilation, groups):
            w, b = parameters[weight], None if bias is None else parameters[bias]
            if w.dim() == 4:
                return F.conv2d(x, w, b, stride, padding, dilation, groups)
            return F.conv1d(x, w, b, stride[1], padding[1], dilation[1], groups)
        case Linear(weight, bias):
            return F.linear(x, parameters[weight], None if bias is None else parameters[bias])
        case GroupNorm(groups, weight, bias, eps):
            scale, shift = (None if name is None else parameters[name] for name in (weight, bias))
            return F.group_norm(x, groups, scale, shift, eps)
        case Activate(activation):
            return activation_function(activation)(x)
        case Pool(kind, kernel, stride, padding):
            of_height_1 = x.unsqueeze(2) if x.dim() == 3 else x
            pool = F.max_pool2d if kind == "max" else F.avg_pool2d
            pooled = pool(of_height_1, kernel, stride, padding)
            return pooled.squeeze(2) if x.dim() == 3 else pooled
        case Reshape(shape):
            return x.reshape(-1, *shape)
        case LayerNorm(weight, bias, eps):
            scale, shift = (None if name is None else parameters[name] for name in (weight, bias))
            return F.layer_norm(x, x.shape[-1:], scale, shift, eps)
        case RMSNorm(weight, eps):
            return F.rms_norm(x, x.shape[-1:], None if weight is None else parameters[weight], eps)
        case Shift(parameter):
            return x + parameters[parameter]
        case Embedding(weight):
            return F.embedding(x, parameters[weight])
        case Attention(heads):
            q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        case MeanOfPlaces():
            return x.mean(1)
        case Flatten():
            return x.flatten(1)
        case _:
            raise refuse("node", node, "one that is applied to what the node before gave")
