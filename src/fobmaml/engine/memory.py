"""What compiled code is told of tensors: that they are what it takes, and where their numbers lie."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fobmaml.arguments import number, refuse

ALIGNMENT = 64
"""Of the kernel's own memory, in bytes."""


def check(name: str, tensor: Tensor, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> range:
    """Its addresses. Raises ValueError for anything but numbers in this machine's memory, of this type and of one of
    ``shapes`` if given."""
    if not isinstance(tensor, Tensor):
        raise refuse(name, type(tensor).__name__, "a tensor")
    if (
        tensor.dtype != dtype
        or tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or (shapes and tensor.shape not in shapes)
    ):
        wanted = f" of shape {' or '.join(map(str, shapes))}" if shapes else ""
        raise refuse(
            name,
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, {tensor.layout}",
            f"{dtype}{wanted} on the CPU, {torch.strided}",
        )
    if not tensor.numel():
        return range(0)
    try:
        first, memory = tensor.data_ptr(), tensor.untyped_storage()
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        addresses = range(first, first + dtype.itemsize * (steps + 1))
        if first and addresses.stop <= memory.data_ptr() + memory.nbytes():
            return addresses
    except RuntimeError:  # tensors of torch.func have none
        pass
    raise refuse(name, f"a {type(tensor).__name__} without memory", "numbers in memory")


def check_in_order(name: str, tensor: Tensor, shape: tuple[int, ...]) -> range:
    """The same, for numbers that are written or read as they lie there."""
    addresses = check(name, tensor, shape)
    if not tensor.is_contiguous() or tensor.is_neg() or addresses.start % tensor.itemsize:
        raise refuse(name, f"strides {tensor.stride()}", "a contiguous tensor")
    return addresses


def check_written(into: Tensor, shape: tuple[int, ...], read: Mapping[str, range], besides: str | None = None) -> None:
    """That ``into`` can be written and has memory of its own, or all that is read as ``besides``."""
    written = check_in_order("into", into, shape)
    for name, there in read.items():
        if there.start < written.stop and written.start < there.stop and not (name == besides and there == written):
            or_that = f", or all of the {besides}'s" if besides else ""
            raise refuse("into", f"memory of {name}", f"memory of its own{or_that}")


def in_order(tensor: Tensor) -> Tensor:
    """The same numbers one after another, at addresses that their type has; no later ``resize_`` of it is seen."""
    tensor = tensor.detach().resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def aligned(memory: Tensor) -> int:
    """The first address of ALIGNMENT in ``memory``, which has so many bytes more than are needed."""
    start = memory.data_ptr()
    return start + -start % ALIGNMENT


def factors(name: str, value: float | Sequence[float], count: int) -> Tensor:
    """``count`` numbers, from one or as many. Raises ValueError for others, and for what float32 cannot hold."""
    values = value if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise refuse(name, f"{len(values)} numbers", f"a number, or {count}")
    for each in values:
        if abs(number(name, each)) > torch.finfo(torch.float32).max:
            raise refuse(name, each, "a number that float32 can hold")
    return torch.tensor(values, dtype=torch.float32)
