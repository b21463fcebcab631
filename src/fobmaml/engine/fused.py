"""Gradients and Hessian products by the compiled kernel ``fused.c``: checking what it is told, calling it.

It takes all passes of all rows in one call. Where it does not fit the processor, ``Stacked`` does the same with torch's
operators.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine import library
from fobmaml.engine.base import Engine, Steps
from fobmaml.engine.chain import Chain
from fobmaml.engine.layers import Convolution, Dense, check_chain
from fobmaml.engine.losses import CrossEntropy, Part, rows_taken
from fobmaml.engine.memory import ALIGNMENT, aligned, check, check_in_order, check_written, factors, in_order
from fobmaml.engine.network import Network
from fobmaml.engine.rows import MOST_NUMBERS, RowGradient
from fobmaml.engine.stacked import Stacked

EXAMPLES_AT_ONCE, OF_AVX512, LARGE = 12, (25, 50), 2**17
"""Their activations stay in a processor's cache, and are enough to read the weights for. Processors with AVX-512 have
larger ones; there, with a layer of more than LARGE weights, the second number (measured at 25, 64, 128 and 250 channels
on one of either kind)."""
ROWS_A_THREAD, KEPT_ROWS_A_THREAD = 8, 2
"""At least so many: a row is one thread's, and all threads wait for the last. Of Hessian products fewer: for them each
row keeps its signals at each step, and a call is of one step anyway."""


class FusedGradient(RowGradient):
    """Of the cross-entropies Σₙ weights[r, n] · L(network(φᵣ, x[r, n]), targets[r, n]), for all rows r.

    ``shapes``: of the parameters by name, in the order of a row. ``x`` [R, N, length, channels], ``targets``
    [R, N, classes], each summing to one, ``weights`` [R, N] or [R, N, 1]. Memory, a thread: the weights twice and the
    activations of the examples taken at once, for Hessian products twice as much.

    Raises ValueError naming the argument (``x`` is called inputs).
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
        data = {"inputs": in_order(x), "targets": in_order(targets), "weights": in_order(weights)}
        sizes = [math.prod(shape) for shape in shapes.values()]
        *begins, parameters = accumulate(sizes, initial=0)
        starts = dict(zip(shapes, begins, strict=True))
        wide = library.instructions() == "avx512"
        at_once = OF_AVX512[max(sizes) > LARGE] if wide else EXAMPLES_AT_ONCE
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
            if max(parameters, at_once * max((length + 2) * channels, after * outputs)) > MOST_NUMBERS:
                raise refuse("inputs", tuple(x.shape), f"signals that fit into memory, {layer.weight}'s too")
            channels = outputs
        super().__init__(found, "fused", (library.Layer * len(layers))(*described), data, parameters, at_once)
        self.also = (None,)  # nothing is kept

    def linearize(self, start: Tensor, into: Tensor) -> "Hessian":
        """into ← the gradient at ``start``, and the Hessian there. See ``add`` for what these are."""
        bytes_kept = 0
        if self.rows and self.examples:
            self.scratch(self.examples)  # says how large the blocks are
            blocks = self.rows * math.ceil(self.examples / self.block)
            bytes_kept = blocks * self.kernel.fused_kept(self.layers, len(self.layers), self.block)
        kept = torch.empty(bytes_kept + ALIGNMENT, dtype=torch.uint8)
        self.add(start, None, into, 0.0, 1.0, also=(aligned(kept),))
        return Hessian(self, torch.empty_like(into).copy_(start.detach()), kept)


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
        if steps.momentum:
            return Engine.gradient_descent(self, theta, steps)
        return self.kernel.descend(theta, steps, self.cross_entropy)

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "Fused":
        loss = self.cross_entropy.of_examples(examples, parts)
        return Fused(self.network, rows_taken(self.x, examples), loss, self.chain)

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        self.kernel.add(phi, None, into, scale, step)
