"""Gradients by the compiled kernel ``fused.c``: finding it, checking what it is told, calling it.

The kernel takes all passes of all rows in one call. It was compiled when the package was installed, once for AVX2 and
once for AVX-512; where neither fits the processor, ``Stacked`` does the same with torch's operators.
"""

import ctypes
import math
import platform
import shutil
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.engine.activations import SiLU
from fobmaml.engine.base import Draws, Engine
from fobmaml.engine.layers import Convolution, Dense, check_chain
from fobmaml.engine.losses import CrossEntropy, Part, rows_taken
from fobmaml.engine.network import Network
from fobmaml.engine.stacked import Stacked

EXAMPLES_AT_ONCE, OF_LARGE_LAYERS, LARGE = 25, 50, 2**17
"""Their activations stay in a processor's cache, and are enough to read the weights for. Of a layer of more than LARGE
weights they do not, and twice the examples are faster (measured at 25, 64, 128 and 250 channels)."""
STEPS_A_CALL = 10
"""Within a call no thread waits for another, and nobody can interrupt."""
ROWS_A_THREAD = 8
"""At least so many: a row is one thread's, and all threads wait for the last."""
ALIGNMENT = 64
MOST_LAYERS = 512  # a thread describes them on its stack
MOST_NUMBERS = 2**40  # in one buffer: sums of a few of them, in bytes, do not overflow


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("kernel_size", "stride", "inputs", "outputs", "length_in", "length_out", "dense", "weight", "bias")
    )


def instructions() -> str:
    """The set of vector instructions that torch uses and the kernel is chosen for: avx512, avx2 or another."""
    return torch.backends.cpu.get_cpu_capability().lower()


@cache
def kernel() -> ctypes.CDLL | None:
    """The library for the vector instructions that torch uses, too; None if there is none, see ``missing``.

    ATEN_CPU_CAPABILITY=default, an environment variable of torch, turns it off.
    """
    try:
        return load(path) if (path := _compiled()) else None
    except (OSError, AttributeError):  # it, or a library that it takes, is another system's or another version's
        return None


def _compiled() -> str | None:
    """The library's file."""
    found = find_spec(f"fobmaml.engine.fused_{instructions()}")
    return None if found is None else found.origin


def load(path: str) -> ctypes.CDLL:
    """The kernel compiled into the library ``path``."""
    library = ctypes.CDLL(path)
    layers, whole, real, memory = ctypes.POINTER(_Layer), ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    library.fused_scratch.argtypes, library.fused_scratch.restype = [layers, whole, whole], whole
    library.fused_prepare.argtypes, library.fused_prepare.restype = [layers, whole, whole, memory, ctypes.c_int], None
    library.fused_gradient.argtypes = [
        layers,
        *[whole] * 5,
        memory,
        whole,
        *[memory] * 4,
        whole,
        real,
        real,
        memory,
        memory,
        ctypes.c_int,
    ]
    library.fused_gradient.restype = None
    return library


def missing() -> str:
    """Why there is no kernel, in a few words; nothing where there is one."""
    if kernel() is not None:
        return ""
    machine, compiler = platform.machine(), (sysconfig.get_config_var("CC") or "cc").split()[0]
    if machine not in ("x86_64", "AMD64"):
        return f"it is for x86-64 processors with AVX2, and this one is {machine}"
    if instructions() not in ("avx2", "avx512"):
        return "it is for processors with AVX2, which torch does not use here (ATEN_CPU_CAPABILITY, or none)"
    if path := _compiled():
        return f"{path} cannot be loaded"
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler})"
    return f"the C compiler ({compiler}) does not compile it: it takes gcc with OpenMP"


def fits(layers: Sequence[Convolution | Dense], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel knows such a network: float32 on a CPU, SiLU after all layers but the last, which is dense."""
    if not 0 < len(layers) <= MOST_LAYERS:
        return False
    *hidden, last = layers
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and isinstance(last, Dense)
        and last.activation is None
        and all(isinstance(layer.activation, SiLU) for layer in hidden)
        and kernel() is not None
    )


class FusedGradient:
    """Of the cross-entropies Σₙ weights[r, n] · L(network(φᵣ, x[r, n]), targets[r, n]), for all rows r.

    ``shapes``: of the parameters by name, in the order of a row. ``x`` [R, N, length, channels], ``targets``
    [R, N, classes], each summing to one, ``weights`` [R, N] or [R, N, 1]. Rows are shared out among torch's threads,
    and the result does not depend on their number. Memory, a thread: the weights twice and the activations of the
    examples taken at once. One caller at a time.

    The kernel believes what it is told, so everything that it is told is checked here. Raises ValueError naming the
    argument (``x`` is called inputs).
    """

    def __init__(
        self,
        layers: Sequence[Convolution | Dense],
        shapes: Mapping[str, torch.Size],
        x: Tensor,
        targets: Tensor,
        weights: Tensor,
    ):
        _check("inputs", x)
        lengths = check_chain(layers, shapes, x)
        found = kernel()
        if found is None:
            raise refuse("engine", "fused", f"a compiled kernel: {missing()}")
        if not fits(layers, torch.float32, torch.device("cpu")):
            raise refuse(
                "model",
                f"{len(layers)} layers",
                f"at most {MOST_LAYERS}, with SiLU after all but the last, for the compiled kernel",
            )
        rows, examples = x.shape[:2]
        classes = shapes[layers[-1].weight][0]
        _check("targets", targets, (rows, examples, classes))
        _check("weights", weights, (rows, examples), (rows, examples, 1))
        self.data = {"inputs": _plain(x), "targets": _plain(targets), "weights": _plain(weights)}
        self.kernel, self.rows, self.examples = found, rows, examples
        sizes = [math.prod(shape) for shape in shapes.values()]
        *begins, self.parameters = accumulate(sizes, initial=0)
        starts = dict(zip(shapes, begins, strict=True))
        at_once = EXAMPLES_AT_ONCE if max(sizes) <= LARGE else OF_LARGE_LAYERS
        self.block = math.ceil(examples / max(math.ceil(examples / at_once), 1))  # blocks of equal size
        channels, described = x.shape[3], []
        for layer, (length, after) in zip(layers, pairwise(lengths), strict=True):
            dense, outputs = isinstance(layer, Dense), shapes[layer.weight][0]
            kernel_size = length if dense else shapes[layer.weight][1]
            described.append(
                _Layer(
                    kernel_size,
                    getattr(layer, "stride", 1),
                    channels,
                    outputs,
                    length,
                    after,
                    dense,
                    starts[layer.weight],
                    starts[layer.bias],
                )
            )
            if max(self.parameters, self.block * max((length + 2) * channels, after * outputs)) > MOST_NUMBERS:
                raise refuse("inputs", tuple(x.shape), f"signals that fit into memory, {layer.weight}'s too")
            channels = outputs
        self.layers = (_Layer * len(layers))(*described)
        self.threads = min(torch.get_num_threads(), rows)
        if not rows or not examples:
            return
        bytes_a_thread = self.kernel.fused_scratch(self.layers, len(layers), self.block)
        self.memory = torch.zeros(self.threads * bytes_a_thread + ALIGNMENT, dtype=torch.uint8)
        start = self.memory.data_ptr()
        self.scratch = start + -start % ALIGNMENT
        self.kernel.fused_prepare(self.layers, len(layers), self.block, self.scratch, self.threads)

    def add(
        self, start: Tensor, displacement: Tensor | None, into: Tensor, scale: float, step: float, times: int = 1
    ) -> None:
        """into ← scale · into + step · the gradient at φ = start + displacement, ``times`` times.

        ``into`` may be the displacement, which makes it gradient descent. ``start`` [1, P] or [R, P], which may be
        expanded; the others contiguous [R, P].
        """
        times = whole_number("times", times, at_most=2**31)
        scale, step = _factor("scale", scale), _factor("step", step)
        own = self.rows, self.parameters
        read = {"start": _check("start", start, (1, self.parameters), own)}
        for name, data in self.data.items():
            read[name] = _check(name, data)  # its memory may have been taken away since
        written = _check_in_order("into", into, own)
        if displacement is not None:
            read["displacement"] = _check_in_order("displacement", displacement, own)
        for name, there in read.items():
            descent = name == "displacement" and there == written
            if there.start < written.stop and written.start < there.stop and not descent:
                raise refuse("into", f"memory of {name}", "memory of its own, or all of the displacement's")
        if not self.rows:
            return
        if not self.examples:  # nothing is added
            for _ in range(times):
                into.mul_(scale) if scale else into.zero_()
            return
        if start.stride(1) != 1 or start.is_neg() or start.data_ptr() % 4:
            start = _plain(start)
        self.kernel.fused_gradient(
            self.layers,
            len(self.layers),
            self.rows,
            self.examples,
            self.block,
            self.parameters,
            start.data_ptr(),
            start.stride(0) if len(start) > 1 else 0,
            None if displacement is None else displacement.data_ptr(),
            *(data.data_ptr() for data in self.data.values()),
            times,
            scale,
            step,
            into.data_ptr(),
            self.scratch,
            self.threads,
        )


def _check(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> range:
    """Its addresses. Raises ValueError for anything but float32 numbers in this machine's memory, of one of ``shapes``
    if given."""
    if not isinstance(tensor, Tensor):
        raise refuse(name, type(tensor).__name__, "a tensor")
    if (
        tensor.dtype != torch.float32
        or tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or (shapes and tensor.shape not in shapes)
    ):
        wanted = f" of shape {' or '.join(map(str, shapes))}" if shapes else ""
        raise refuse(
            name,
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, {tensor.layout}",
            f"torch.float32{wanted} on the CPU, {torch.strided}",
        )
    if not tensor.numel():
        return range(0)
    try:
        first, memory = tensor.data_ptr(), tensor.untyped_storage()
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        addresses = range(first, first + 4 * (steps + 1))
        if first and addresses.stop <= memory.data_ptr() + memory.nbytes():
            return addresses
    except RuntimeError:  # tensors of torch.func have none
        pass
    raise refuse(name, f"a {type(tensor).__name__} without memory", "numbers in memory")


def _check_in_order(name: str, tensor: Tensor, shape: tuple[int, ...]) -> range:
    """The same, for numbers that are written or read as they lie there."""
    addresses = _check(name, tensor, shape)
    if not tensor.is_contiguous() or tensor.is_neg() or addresses.start % 4:
        raise refuse(name, f"strides {tensor.stride()}", "a contiguous tensor")
    return addresses


def _factor(name: str, value: float) -> float:
    if abs(factor := number(name, value)) > torch.finfo(torch.float32).max:
        raise refuse(name, value, "a number that float32 can hold")
    return factor


def _plain(tensor: Tensor) -> Tensor:
    """The same numbers one after another, at addresses that float32 has; no later ``resize_`` of it is seen."""
    tensor = tensor.detach().resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % 4 else tensor


class Fused(Stacked):
    """A gradient's passes in one call of the kernel; what it does not know is done as in ``Stacked``."""

    def __init__(self, network: Network, x: Tensor, loss: CrossEntropy):
        super().__init__(network, x, loss)
        self.cross_entropy = loss
        layers = network.model.stacked_layers()
        loss.prepare(x.new_empty(*x.shape[:2], network.shapes[layers[-1].weight][0]))
        self.kernel = FusedGradient(layers, network.shapes, network.model.stacked_inputs(x), loss.one_hot, loss.weights)

    def gradient(self, phi: Tensor) -> Tensor:
        into = torch.empty(phi.shape, dtype=phi.dtype)
        self.kernel.add(phi.detach(), None, into, 0.0, 1.0)
        return into

    def gradient_descent(
        self,
        theta: Tensor,
        rates: Sequence[float],
        lam: float = 0.0,
        momentum: float = 0.0,
        draws: Draws | None = None,
    ) -> Tensor:
        if momentum or draws is not None:
            return Engine.gradient_descent(self, theta, rates, lam, momentum, draws)
        displacement = torch.zeros(theta.shape, dtype=theta.dtype)
        for _, count, rate in _alike(rates):
            self.kernel.add(theta, displacement, displacement, 1.0 - rate * lam, -rate, count)
        return displacement

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "Fused":
        return Fused(self.network, rows_taken(self.x, examples), self.cross_entropy.of_examples(examples, parts))

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        self.kernel.add(phi, None, into, scale, step)


def _alike(rates: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """Runs of steps of one length that a call of the kernel may take: the first, how many, and their length."""
    first = 0
    for rate, steps in groupby(rates):
        last = first + len(list(steps))
        for begin in range(first, last, STEPS_A_CALL):
            yield begin, min(STEPS_A_CALL, last - begin), rate
        first = last
