"""Gradients and Hessian products by the compiled kernel ``fused.c``: finding it, checking what it is told, calling it.

The kernel takes all passes of all rows in one call. It was compiled when the package was installed, once for AVX2 and
once for AVX-512; where neither fits the processor, ``Stacked`` does the same with torch's operators.
"""

import ctypes
import math
import platform
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.activations import SiLU
from fobmaml.engine.base import Engine, Steps
from fobmaml.engine.layers import Convolution, Dense, check_chain
from fobmaml.engine.losses import CrossEntropy, Part, rows_taken
from fobmaml.engine.memory import check, check_in_order, factors, in_order
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
MOST_TIMES = 2**20  # in a call: a step has numbers of its own
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
    layers, whole, memory = ctypes.POINTER(_Layer), ctypes.c_int64, ctypes.c_void_p
    library.fused_scratch.argtypes, library.fused_scratch.restype = [layers, whole, whole], whole
    library.fused_prepare.argtypes, library.fused_prepare.restype = [layers, whole, whole, memory, ctypes.c_int], None
    library.fused_gradient.argtypes = [
        layers,
        *[whole] * 6,
        memory,
        whole,
        *[memory] * 6,
        whole,
        *[memory] * 4,
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
    examples taken at once, for Hessian products twice as much. One caller at a time.

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
        check("inputs", x)
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
        check("targets", targets, (rows, examples, classes))
        check("weights", weights, (rows, examples), (rows, examples, 1))
        self.data = {"inputs": in_order(x), "targets": in_order(targets), "weights": in_order(weights)}
        self.kernel, self.rows, self.examples = found, rows, examples
        sizes = [math.prod(shape) for shape in shapes.values()]
        *begins, self.parameters = accumulate(sizes, initial=0)
        starts = dict(zip(shapes, begins, strict=True))
        self.at_once = EXAMPLES_AT_ONCE if max(sizes) <= LARGE else OF_LARGE_LAYERS
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
            if max(self.parameters, self.at_once * max((length + 2) * channels, after * outputs)) > MOST_NUMBERS:
                raise refuse("inputs", tuple(x.shape), f"signals that fit into memory, {layer.weight}'s too")
            channels = outputs
        self.layers = (_Layer * len(layers))(*described)
        self.threads = min(torch.get_num_threads(), rows)
        self.block, self.parts, self.memory = 0, 0, torch.empty(0, dtype=torch.uint8)

    def add(
        self,
        start: Tensor,
        displacement: Tensor | None,
        into: Tensor,
        scale: float | Sequence[float],
        step: float | Sequence[float],
        times: int = 1,
        order: Tensor | None = None,
        weights: Tensor | None = None,
        along: Tensor | None = None,
    ) -> None:
        """into ← scale · into + step · the gradient at φ = start + displacement, ``times`` times.

        ``into`` may be the displacement, which makes it gradient descent. ``start`` [1, P] or [R, P], which may be
        expanded; the others contiguous [R, P]. ``scale`` and ``step``: a number, or one for each time.

        Mini-batches: at time t row r takes the n examples ``order[r, t]`` only (int64 [R, times, n], some may be the
        with ``weights[r, t]`` ([R, times, n]). Nothing of ``x`` is copied for it.

        With ``along`` the Hessian at φᵣ times ``along[r]`` takes the gradient's place. Cost: 8 products of a layer's
        weights and signals, where a gradient takes 3.
        """
        times = whole_number("times", times, at_most=MOST_TIMES)
        scales, steps = factors("scale", scale, times), factors("step", step, times)
        own = self.rows, self.parameters
        read = {"start": check("start", start, (1, self.parameters), own)}
        data = dict(self.data)
        if order is not None or weights is not None:
            order, data["weights"] = self._chosen(order, weights, times)
            read["order"] = check("order", order, dtype=torch.int64)
        for name, part in data.items():
            read[name] = check(name, part)  # its memory may have been taken away since
        chosen = self.examples if order is None else order.shape[2]
        written = check_in_order("into", into, own)
        for name, rows in (("displacement", displacement), ("along", along)):
            if rows is not None:
                read[name] = check_in_order(name, rows, own)
        for name, there in read.items():
            descent = name == "displacement" and there == written
            if there.start < written.stop and written.start < there.stop and not descent:
                raise refuse("into", f"memory of {name}", "memory of its own, or all of the displacement's")
        if not self.rows:
            return
        if not chosen:  # nothing is added
            for factor in scales.tolist():
                into.mul_(factor) if factor else into.zero_()
            return
        if start.stride(1) != 1 or start.is_neg() or start.data_ptr() % 4:
            start = in_order(start)
        scratch = self._scratch(chosen, 1 if along is None else 2)
        self.kernel.fused_gradient(
            self.layers,
            len(self.layers),
            self.rows,
            self.examples,
            chosen,
            self.block,
            self.parameters,
            start.data_ptr(),
            start.stride(0) if len(start) > 1 else 0,
            None if displacement is None else displacement.data_ptr(),
            None if along is None else along.data_ptr(),
            *(part.data_ptr() for part in data.values()),
            None if order is None else order.data_ptr(),
            times,
            scales.data_ptr(),
            steps.data_ptr(),
            into.data_ptr(),
            scratch,
            self.threads,
        )

    def _chosen(self, order: Tensor | None, weights: Tensor | None, times: int) -> tuple[Tensor, Tensor]:
        """Which examples to take, and their weights, as the kernel reads them."""
        if not isinstance(order, Tensor) or order.dim() != 3:
            got = tuple(order.shape) if isinstance(order, Tensor) else type(order).__name__
            raise refuse("order", got, "a tensor [rows, times, examples at a time], and weights like it")
        shape = self.rows, times, order.shape[2]
        check("order", order, shape, dtype=torch.int64)
        check("weights", cast(Tensor, weights), shape)
        if order.numel():
            least, most = (int(index) for index in order.aminmax())
            if least < 0 or most >= self.examples:
                raise refuse("order", least if least < 0 else most, f"indices of {self.examples} examples, from 0 on")
        return in_order(order), in_order(cast(Tensor, weights))

    def _scratch(self, chosen: int, parts: int) -> int:
        """The address of ``parts`` times the memory for blocks of equal size, as many as so many examples take."""
        block = math.ceil(chosen / math.ceil(chosen / self.at_once))
        if block != self.block or parts > self.parts:
            described = self.layers, len(self.layers), block
            bytes_a_part = self.threads * self.kernel.fused_scratch(*described)
            self.memory = torch.zeros(parts * bytes_a_part + ALIGNMENT, dtype=torch.uint8)
            self.block, self.parts, start = block, parts, self.memory.data_ptr()
            self.kernel.fused_prepare(*described, start + -start % ALIGNMENT, parts * self.threads)
        start = self.memory.data_ptr()
        return start + -start % ALIGNMENT


class Fused(Stacked):
    """The passes of a gradient or Hessian product in one call of the kernel; outputs are computed as in ``Stacked``.

    A Hessian product takes its forward passes anew: between calls nothing is kept but parameters.
    """

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

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        phi = phi.detach().clone()  # the caller's may change

        def product(v: Tensor) -> Tensor:
            into = torch.empty(phi.shape, dtype=phi.dtype)
            self.kernel.add(phi, None, into, 0.0, 1.0, along=in_order(v))
            return into

        return self.gradient(phi), product

    def gradient_descent(self, theta: Tensor, steps: Steps) -> Tensor:
        rates, lam, momentum, draws = steps
        if momentum:
            return Engine.gradient_descent(self, theta, steps)
        displacement = torch.zeros(theta.shape, dtype=theta.dtype)
        for first in range(0, len(rates), STEPS_A_CALL):
            these = rates[first : first + STEPS_A_CALL]
            chosen: dict[str, Tensor] = {}
            if draws is not None:
                chosen["order"] = draws.examples[:, first : first + len(these)].contiguous()
                chosen["weights"] = self.cross_entropy.weights_of(chosen["order"], draws.parts)
            scale, step = [1.0 - rate * lam for rate in these], [-rate for rate in these]
            self.kernel.add(theta, displacement, displacement, scale, step, len(these), **chosen)
        return displacement

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "Fused":
        return Fused(self.network, rows_taken(self.x, examples), self.cross_entropy.of_examples(examples, parts))

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        self.kernel.add(phi, None, into, scale, step)
