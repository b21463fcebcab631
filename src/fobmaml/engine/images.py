"""Gradients of networks of images and of sequences by the compiled kernel ``images.c``.

It takes all passes of all rows, and many steps, in one call. Networks are given as nodes; parameters keep the module's
own layout.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine import library
from fobmaml.engine.base import WHOLE, Engine, Steps
from fobmaml.engine.described import MOST, Described
from fobmaml.engine.loop import Loop
from fobmaml.engine.losses import CrossEntropy, Part, rows_taken
from fobmaml.engine.memory import check, in_order
from fobmaml.engine.network import Network
from fobmaml.engine.nodes import Node
from fobmaml.engine.rows import MOST_NUMBERS, RowGradient, lines


def outputs(described: Described, phi: Tensor, x: Tensor) -> Tensor:
    """The network with parameters phi[r] on x[r]: [R, P], [R, N, ...] -> [R, N, classes]."""
    nothing = torch.zeros(*x.shape[:2], described.classes)
    return ImageGradient(described, x, nothing, nothing[..., :1]).outputs(phi)


class ImageGradient(RowGradient):
    """See ``RowGradient``, for a network as ``described``.

    ``x`` [R, N, channels, height, width], [R, N, channels, length] or [R, N, values], ``targets`` [R, N, classes], each
    summing to one, ``weights`` [R, N] or [R, N, 1]. Memory, a thread: the parameters three times and the signals of the
    examples taken at once, twice.

    Raises ValueError naming the argument (``x`` is called inputs).
    """

    def __init__(self, described: Described, x: Tensor, targets: Tensor, weights: Tensor):
        check("inputs", x, dtype=torch.int64 if described.words else torch.float32)
        found = library.kernel()
        if found is None:
            raise refuse("engine", "images", f"a compiled kernel: {library.missing()}")
        if x.shape[2:] != described.shape:
            raise refuse(
                "inputs", tuple(x.shape), f"[rows, examples, *{described.shape}], as the network was described for"
            )
        entered, rows_and_examples = described.entered(x), x.shape[:2]
        if MOST * described.largest() > MOST_NUMBERS:
            raise refuse("inputs", tuple(x.shape), "signals that fit into memory")
        check("targets", targets, (*rows_and_examples, described.classes))
        check("weights", weights, tuple(rows_and_examples), (*rows_and_examples, 1))
        data = {"inputs": in_order(entered), "targets": in_order(targets), "weights": in_order(weights)}
        super().__init__(found, "images", described.layers, data, described.parameters, described.at_once())

    @classmethod
    def of(
        cls, nodes: Sequence[Node], shapes: Mapping[str, torch.Size], x: Tensor, targets: Tensor, weights: Tensor
    ) -> "ImageGradient":
        """For a chain of ``nodes``; raises ValueError as ``Described``, too."""
        if not isinstance(x, Tensor):
            raise refuse("inputs", type(x).__name__, "a tensor")
        return cls(Described(nodes, shapes, x.shape[2:]), x, targets, weights)

    def outputs(self, start: Tensor) -> Tensor:
        """The network's, [R, N, classes], with the parameters ``start`` [1, P] or [R, P]."""
        check("start", start, (1, self.parameters), (self.rows, self.parameters))
        check("inputs", x := self.data["inputs"])  # its memory may have been taken away since
        found = torch.empty(self.data["targets"].shape)
        if found.numel():
            start = lines(start)
            self.kernel.images_outputs(
                self.layers,
                len(self.layers),
                self.rows,
                self.examples,
                self.block_of(self.examples),
                start.data_ptr(),
                start.stride(0) if len(start) > 1 else 0,
                x.data_ptr(),
                found.data_ptr(),
                self.scratch(self.examples),
                self.threads,
            )
        return found


class FusedImages(Loop):
    """Outputs, gradients and descent in calls of the kernel, for a network as ``described``; Hessian products are
    ``Loop``'s, and descent with momentum calls for one gradient after another. Memory of the descent: the
    displacements, and a few examples' signals a thread."""

    def __init__(self, described: Described, network: Network, x: Tensor, loss: CrossEntropy):
        super().__init__(network, x, loss, WHOLE)
        self.described, self.cross_entropy = described, loss
        loss.prepare(torch.empty(*x.shape[:2], described.classes, dtype=torch.float32))
        self.kernel = ImageGradient(described, x, loss.one_hot, loss.weights)

    def outputs(self, phi: Tensor) -> Tensor:
        return self.kernel.outputs(phi.detach())

    def gradient(self, phi: Tensor) -> Tensor:
        into = torch.empty(phi.shape, dtype=phi.dtype)
        self.kernel.add(phi.detach(), None, into, 0.0, 1.0)
        return into

    def gradient_descent(self, theta: Tensor, steps: Steps) -> Tensor:
        if steps.momentum:
            return Engine.gradient_descent(self, theta, steps)
        return self.kernel.descend(theta, steps, self.cross_entropy)

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "FusedImages":
        loss = self.cross_entropy.of_examples(examples, parts)
        return FusedImages(self.described, self.network, rows_taken(self.x, examples), loss)

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        self.kernel.add(phi, None, into, scale, step)
