"""Inputs of several tensors, as one tensor on the way from the tasks to the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fobmaml.arguments import refuse

Inputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]
EXACT = 2**24
"""Whole numbers below this are themselves in float32."""


@dataclass(frozen=True)
class Layout:
    """How the numbers of an example, in one row, are the tensors of a dictionary, by ``names``, or of a tuple (None).

    ``shapes`` of each tensor, of one example; ``dtypes``: of whole numbers and truth values, None where a tensor is of
    real numbers.
    """

    names: tuple[str, ...] | None
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def input_shape(self) -> Any:
        """Shapes of an example's tensors, in the way of the inputs."""
        shapes = tuple(map(tuple, self.shapes))
        return shapes if self.names is None else dict(zip(self.names, shapes, strict=True))

    def unpack(self, x: Tensor) -> Any:
        """[..., numbers] -> a dictionary or tuple of tensors [..., *shape]."""
        parts = x.split([shape.numel() for shape in self.shapes], dim=-1)
        tensors = [
            (part if dtype is None else part.to(dtype)).reshape(*x.shape[:-1], *shape)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return tuple(tensors) if self.names is None else dict(zip(self.names, tensors, strict=True))


def packed(name: str, inputs: Inputs, leading: int = 2) -> tuple[Tensor, Layout | None]:
    """Inputs, all with the same first ``leading`` dimensions, as one tensor [..., numbers] of float32, or of float64 if
    there is some, and their layout; a tensor as it is, without one.

    Raises ValueError, for the argument ``name``, unless it is a tensor or a dictionary or tuple of tensors with the
    same first dimensions, and for whole numbers beyond 2²⁴, which float32 does not hold.
    """
    if isinstance(inputs, Tensor):
        return inputs, None
    takes = "a tensor [tasks, examples, ...], or a dictionary or tuple of such tensors"
    if not isinstance(inputs, Mapping | tuple) or not inputs:
        raise refuse(name, type(inputs).__name__, takes)
    names = tuple(map(str, inputs)) if isinstance(inputs, Mapping) else None
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    for key, tensor in zip(names or range(len(tensors)), tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dim() < leading or tensor.is_complex():
            got: Any = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise refuse(f"{name}[{key}]", got, takes)
        if tensor.shape[:leading] != tensors[0].shape[:leading] or tensor.device != tensors[0].device:
            got = f"{tuple(tensor.shape)} on {tensor.device}"
            raise refuse(f"{name}[{key}]", got, f"{tuple(tensors[0].shape[:leading])} first, as the others have")
        whole = tensor.numel() and not tensor.is_floating_point() and tensor.dtype != torch.bool
        if whole and (most := int(tensor.abs().max())) > EXACT:
            raise refuse(f"{name}[{key}]", most, "whole numbers up to 2²⁴")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    shapes = tuple(t.shape[leading:] for t in tensors)
    dtypes = tuple(None if t.is_floating_point() else t.dtype for t in tensors)
    rows = [t.reshape(*t.shape[:leading], -1).to(dtype) for t in tensors]
    return torch.cat(rows, dim=-1), Layout(names, shapes, dtypes)
