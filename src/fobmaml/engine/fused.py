"""Gradients and Hessian products by the compiled kernel ``fused.c``: checking what it is told, calling it.

It takes all passes of all rows in one call. Where it does not fit the processor, ``Stacked`` does the same with torch's
operators.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine import library
from fobmaml.engine.base import Engine, Steps
from fobmaml.engine.chain import Chain
from fobmaml.engine.layers import Convolution, Dense, check_chain
from fobmaml.engine.losses import CrossEntropy, Part, rows_taken
from fobmaml.engine.memory import ALIGNMENT, aligned, check, check_in_order, check_written, factors, in_order
from fobmaml.engine.network import Network
from fobmaml.engine.stacked import Stacked

EXAMPLES_AT_ONCE, OF_LARGE_LAYERS, LARGE = 25, 50, 2**17
"""Their activations stay in a processor's cache, and are enough to read the weights for. Of a layer of more than LARGE
weights they do not, and twice the examples are faster (measured at 25, 64, 128 and 250 channels)."""
STEPS_A_CALL = 10
"""Within a call no thread waits for another, and nobody can interrupt."""
ROWS_A_THREAD, KEPT_ROWS_A_THREAD = 8, 2
"""At least so many: a row is one thread's, and all threads wait for the last. Of Hessian products fewer: for them each
row keeps its signals at each step, and a call is of one step anyway."""
MOST_TIMES = 2**20  # in a call: a step has numbers of its own
MOST_NUMBERS = 2**40  # in one buffer: sums of a few of them, in bytes, do not overflow


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
        found = library.kernel()
        if found is None:
            raise refuse("engine", "fused", f"a compiled kernel: {library.missing()}")
        if not library.fits(layers, torch.float32, torch.device("cpu")):
            raise refuse(
                "model",
                f"{len(layers)} layers",
                f"at most {library.MOST_LAYERS}, with SiLU after all but the last, for the compiled kernel",
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
                library.Layer(
                    kernel_size,
                    getattr(layer, "stride", 1),
                    channels,
                    outputs,
                    length,
                    after,
                    dense,
                    getattr(layer, "turned", False),
                    starts[layer.weight],
                    starts[str(layer.bias)],
                )
            )
            if max(self.parameters, self.at_once * max((length + 2) * channels, after * outputs)) > MOST_NUMBERS:
                raise refuse("inputs", tuple(x.shape), f"signals that fit into memory, {layer.weight}'s too")
            channels = outputs
        self.layers = (library.Layer * len(layers))(*described)
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
        kept: Tensor | None = None,
    ) -> None:
        """into ← scale · into + step · the gradient at φ = start + displacement, ``times`` times.

        ``into`` may be the displacement, which makes it gradient descent. ``start`` [1, P] or [R, P], which may be
        expanded; the others contiguous [R, P]. ``scale`` and ``step``: a number, or one for each time.

        Mini-batches: at time t row r takes the n examples ``order[r, t]`` only (int64 [R, times, n], some may be the
        with ``weights[r, t]`` ([R, times, n]). Nothing of ``x`` is copied for it.

        ``kept``: memory of ``linearize``.
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
        if displacement is not None:
            read["displacement"] = check_in_order("displacement", displacement, own)
        check_written(into, own, read, besides="displacement")
        if not self.rows:
            return
        if not chosen:  # nothing is added
            for factor in scales.tolist():
                into.mul_(factor) if factor else into.zero_()
            return
        if start.stride(1) != 1 or start.is_neg() or start.data_ptr() % 4:
            start = in_order(start)
        scratch = self.scratch(chosen)
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
            *(part.data_ptr() for part in data.values()),
            None if order is None else order.data_ptr(),
            times,
            scales.data_ptr(),
            steps.data_ptr(),
            into.data_ptr(),
            None if kept is None else aligned(kept),
            scratch,
            self.threads,
        )

    def linearize(self, start: Tensor, into: Tensor) -> "Hessian":
        """into ← the gradient at ``start``, and the Hessian there. See ``add`` for what these are."""
        bytes_kept = 0
        if self.rows and self.examples:
            self.scratch(self.examples)  # says how large the blocks are
            blocks = self.rows * math.ceil(self.examples / self.block)
            bytes_kept = blocks * self.kernel.fused_kept(self.layers, len(self.layers), self.block)
        kept = torch.empty(bytes_kept + ALIGNMENT, dtype=torch.uint8)
        self.add(start, None, into, 0.0, 1.0, kept=kept)
        return Hessian(self, torch.empty_like(into).copy_(start.detach()), kept)

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

    def scratch(self, chosen: int, parts: int = 1) -> int:
        """The address of ``parts`` times the memory for blocks of equal size, as many as so many examples take."""
        block = math.ceil(chosen / math.ceil(chosen / self.at_once))
        if block != self.block or parts > self.parts:
            described = self.layers, len(self.layers), block
            bytes_a_part = self.threads * self.kernel.fused_scratch(*described)
            self.memory = torch.zeros(parts * bytes_a_part + ALIGNMENT, dtype=torch.uint8)
            self.block, self.parts = block, parts
            self.kernel.fused_prepare(*described, aligned(self.memory), parts * self.threads)
        return aligned(self.memory)


class Hessian:
    """Of what ``gradient`` takes the gradient of, at ``phi`` [R, P], where it has ``kept`` its signals.

    Memory: ``phi`` and four numbers for each activation of each row.
    """

    def __init__(self, gradient: FusedGradient, phi: Tensor, kept: Tensor):
        self.gradient, self.phi, self.kept = gradient, phi, kept

    def add(self, along: Tensor, into: Tensor, scale: float, step: float) -> None:
        """into ← scale · into + step · the Hessian at φᵣ times ``along[r]``, both contiguous [R, P].

        Cost: 6 products of a layer's weights and signals, where a gradient takes 3.
        """
        of, own = self.gradient, tuple(self.phi.shape)
        read = {name: check(name, part) for name, part in of.data.items()}
        read["along"] = check_in_order("along", along, own)
        check_written(into, own, read)
        scale, step = (factors(name, each, 1).item() for name, each in (("scale", scale), ("step", step)))
        if not of.rows or not of.examples:
            into.mul_(scale) if scale else into.zero_()
            return
        scratch = of.scratch(of.examples, 2)  # and with it the size of the blocks
        of.kernel.fused_product(
            of.layers,
            len(of.layers),
            of.rows,
            of.examples,
            of.block,
            of.parameters,
            self.phi.data_ptr(),
            self.phi.stride(0),
            along.data_ptr(),
            of.data["weights"].data_ptr(),
            scale,
            step,
            into.data_ptr(),
            aligned(self.kept),
            scratch,
            of.threads,
        )


class Fused(Stacked):
    """The passes of a gradient or Hessian product in one call of the kernel; outputs are computed as in ``Stacked``."""

    def __init__(self, network: Network, x: Tensor, loss: CrossEntropy, chain: Chain):
        super().__init__(network, x, loss, chain)
        self.cross_entropy = loss
        loss.prepare(x.new_empty(*x.shape[:2], chain.shapes[chain.layers[-1].weight][0]))
        self.kernel = FusedGradient(chain.layers, chain.shapes, chain.signals(x), loss.one_hot, loss.weights)

    def gradient(self, phi: Tensor) -> Tensor:
        into = torch.empty(phi.shape, dtype=phi.dtype)
        self.kernel.add(phi.detach(), None, into, 0.0, 1.0)
        return into

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        gradient = torch.empty(phi.shape, dtype=phi.dtype)
        hessian = self.kernel.linearize(phi.detach(), gradient)

        def product(v: Tensor) -> Tensor:
            into = torch.empty_like(hessian.phi)  # not phi, which may be kept for nothing else
            hessian.add(in_order(v), into, 0.0, 1.0)
            return into

        return gradient, product

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
        loss = self.cross_entropy.of_examples(examples, parts)
        return Fused(self.network, rows_taken(self.x, examples), loss, self.chain)

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        self.kernel.add(phi, None, into, scale, step)
