"""The gradient of stacked networks by the compiled kernel ``fused.c``, where there is one for this processor."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from fobmaml.models.activations import SiLU
from fobmaml.models.stacked import Convolution, Dense, length_after

EXAMPLES_AT_ONCE, OF_LARGE_LAYERS, LARGE = 25, 50, 2**17
"""Their activations stay in a processor's cache, and are enough to read the weights for. Of a layer of more than LARGE
weights they do not, and twice the examples are faster (measured at 25, 64, 128 and 250 channels)."""
ALIGNMENT = 64


class _Layer(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "taps", "stride", "inputs", "outputs", "length_in", "length_out", "dense", "weight", "bias"))


def instructions() -> str:
    """The set of vector instructions that torch uses and the kernel is chosen for: avx512, avx2 or another."""
    return torch.backends.cpu.get_cpu_capability().lower()


@cache
def kernel() -> ctypes.CDLL | None:
    """The library for the vector instructions that torch uses, too; None if there is none or it was not compiled.

    ATEN_CPU_CAPABILITY=default, an environment variable of torch, turns it off.
    """
    found = find_spec(f"fobmaml.models.fused_{instructions()}")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    layers, whole, real, memory = ctypes.POINTER(_Layer), ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    library.fused_scratch.argtypes, library.fused_scratch.restype = [layers, whole, whole], whole
    library.fused_prepare.argtypes, library.fused_prepare.restype = [layers, whole, whole, memory, ctypes.c_int], None
    library.fused_gradient.argtypes = [layers, *[whole] * 5, memory, whole, *[memory] * 4, whole, real, real, memory,
                                       memory, ctypes.c_int]
    library.fused_gradient.restype = None
    return library


def fits(layers: Sequence[Convolution | Dense], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel knows such a network: float32 on a CPU, SiLU after all layers but the last, which is dense."""
    *hidden, last = layers
    return (dtype == torch.float32 and device.type == "cpu" and isinstance(last, Dense) and last.activation is None
            and all(isinstance(layer.activation, SiLU) for layer in hidden) and kernel() is not None)


class FusedGradient:
    """Of the cross-entropies Σₙ weights[r, n] · L(network(φᵣ, x[r, n]), targets[r, n]), for all rows r.

    ``shapes``: of the parameters by name, in the order of a row. ``x`` [R, N, length, channels], ``targets``
    [R, N, classes], one-hot, ``weights`` [R, N]. Rows are shared out among torch's threads, and the result does not
    depend on their number. Memory, a thread: the weights twice and the activations of the examples taken at once.
    Raises TypeError for anything but float32.
    """

    def __init__(self, layers: Sequence[Convolution | Dense], shapes: Mapping[str, torch.Size], x: Tensor,
                 targets: Tensor, weights: Tensor):
        starts = dict(zip(shapes, accumulate((shape.numel() for shape in shapes.values()), initial=0), strict=False))
        self.parameters = sum(shape.numel() for shape in shapes.values())
        length, channels = x.shape[2:]
        described = []
        for layer in layers:
            dense, outputs = isinstance(layer, Dense), shapes[layer.weight][0]
            taps, after = length if dense else shapes[layer.weight][1], length_after(layer, shapes, length)
            described.append(_Layer(taps, getattr(layer, "stride", 1), channels, outputs, length, after, dense,
                                    starts[layer.weight], starts[layer.bias]))
            length, channels = after, outputs
        self.layers = (_Layer * len(layers))(*described)
        self.data = x.contiguous(), targets.contiguous(), weights.contiguous()
        for tensor in self.data:  # the kernel reads memory, and would not notice
            assert tensor.shape[:2] == x.shape[:2]
            if tensor.dtype != torch.float32:
                raise TypeError(f"the compiled kernel takes float32, got {tensor.dtype}")
        found = kernel()
        assert found is not None
        self.kernel, self.threads = found, min(torch.get_num_threads(), len(x))
        at_once = EXAMPLES_AT_ONCE if max(map(torch.Size.numel, shapes.values())) <= LARGE else OF_LARGE_LAYERS
        self.block = math.ceil(x.shape[1] / math.ceil(x.shape[1] / at_once))  # blocks of equal size
        bytes_a_thread = self.kernel.fused_scratch(self.layers, len(layers), self.block)
        self.memory = torch.zeros(self.threads * bytes_a_thread + ALIGNMENT, dtype=torch.uint8)
        start = self.memory.data_ptr()
        self.scratch = start + -start % ALIGNMENT
        self.kernel.fused_prepare(self.layers, len(layers), self.block, self.scratch, self.threads)

    def add(self, start: Tensor, displacement: Tensor | None, into: Tensor, scale: float, step: float,
            times: int = 1) -> None:
        """into ← scale · into + step · the gradient at φ = start + displacement, ``times`` times.

        ``into`` may be the displacement, which makes it gradient descent. ``start`` [1, P] or [R, P], which may be
        expanded; the others contiguous [R, P].
        """
        x, targets, weights = self.data
        start = start.expand(len(x), -1)
        assert start.shape[1] == self.parameters
        if start.stride(1) != 1:
            start = start.contiguous()
        for rows in (into, into if displacement is None else displacement):
            assert rows.shape == start.shape
            assert rows.is_contiguous()
        assert start.dtype == into.dtype == torch.float32
        self.kernel.fused_gradient(
            self.layers, len(self.layers), *x.shape[:2], self.block, self.parameters, start.data_ptr(), start.stride(0),
            None if displacement is None else displacement.data_ptr(), x.data_ptr(), targets.data_ptr(),
            weights.data_ptr(), times, scale, step, into.data_ptr(), self.scratch, self.threads)
