"""Gradients of many rows of parameters by compiled code: what it is told, checked, and its memory."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine.base import Steps
from fobmaml.engine.losses import CrossEntropy
from fobmaml.engine.memory import ALIGNMENT, aligned, check, check_in_order, check_written, factors, in_order

STEPS_A_CALL = 10
"""Within a call no thread waits for another, and nobody can interrupt."""
MOST_TIMES = 2**20  # in a call: a step has numbers of its own
MOST_NUMBERS = 2**40  # in one buffer: sums of a few of them, in bytes, do not overflow


def lines(rows: Tensor) -> Tensor:
    """``rows`` [R, P], which may be expanded, with each row's numbers one after another."""
    return in_order(rows) if rows.stride(1) != 1 or rows.is_neg() or rows.data_ptr() % 4 else rows


class RowGradient:
    """Of the cross-entropies Σₙ weights[r, n] · L(network(φᵣ, x[r, n]), targets[r, n]), for all rows r.

    ``kernel`` has the functions ``name``_gradient, _scratch and _prepare. ``layers``: the network, as they take it.
    ``data``: inputs [R, N, ...], targets [R, N, classes] and weights [R, N], in order. ``parameters``: of a row.
    ``at_once``: examples that a thread takes together. Rows are shared out among torch's threads, and the result does
    not depend on their number. One caller at a time.

    Compiled code believes what it is told, so everything that it is told is checked: here, and where the network is
    described. Raises ValueError naming the argument.
    """

    def __init__(
        self,
        kernel: ctypes.CDLL,
        name: str,
        layers: "ctypes.Array[Any]",
        data: Mapping[str, Tensor],
        parameters: int,
        at_once: int,
    ):
        self.kernel, self.name, self.layers, self.data = kernel, name, layers, dict(data)
        self.rows, self.examples = self.data["inputs"].shape[:2]
        self.parameters, self.at_once = parameters, at_once
        self.threads = min(torch.get_num_threads(), self.rows)
        self.also: tuple[int | None, ...] = ()
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
        also: tuple[int, ...] = (),
    ) -> None:
        """into ← scale · into + step · the gradient at φ = start + displacement, ``times`` times.

        ``into`` may be the displacement, which makes it gradient descent. ``start`` [1, P] or [R, P], which may be
        expanded; the others contiguous [R, P]. ``scale`` and ``step``: a number, or one for each time.

        Mini-batches: at time t row r takes the n examples ``order[r, t]`` only (int64 [R, times, n]; some may be taken
        twice), with ``weights[r, t]`` ([R, times, n]). Nothing of ``x`` is copied for it.

        ``also``: what else the function takes, before its own memory, in place of ``self.also``.
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
        start = lines(start)
        scratch = self.scratch(chosen)
        gradient = getattr(self.kernel, f"{self.name}_gradient")
        gradient(
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
            *(also or self.also),
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

    def block_of(self, chosen: int) -> int:
        """How many of so many examples are taken together: blocks are of equal size, but the last."""
        return math.ceil(chosen / math.ceil(chosen / self.at_once))

    def scratch(self, chosen: int, parts: int = 1) -> int:
        """The address of ``parts`` times the memory for blocks of equal size, as many as so many examples take."""
        block = self.block_of(chosen)
        if block != self.block or parts > self.parts:
            described = self.layers, len(self.layers), block
            bytes_a_part = self.threads * getattr(self.kernel, f"{self.name}_scratch")(*described)
            self.memory = torch.empty(parts * bytes_a_part + ALIGNMENT, dtype=torch.uint8)
            self.block, self.parts = block, parts
            getattr(self.kernel, f"{self.name}_prepare")(*described, aligned(self.memory), parts * self.threads)
        return aligned(self.memory)

    def descend(self, theta: Tensor, steps: Steps, loss: CrossEntropy) -> Tensor:
        """Displacements [R, P] by gradient descent without momentum, see ``Engine.gradient_descent``; ``loss``: whose
        weights and targets these are."""
        rates, lam, _, draws = steps
        displacement = torch.zeros(theta.shape, dtype=theta.dtype)
        for first in range(0, len(rates), STEPS_A_CALL):
            these = rates[first : first + STEPS_A_CALL]
            order = None if draws is None else draws.examples[:, first : first + len(these)].contiguous()
            weights = None if draws is None or order is None else loss.weights_of(order, draws.parts)
            scale, step = [1.0 - rate * lam for rate in these], [-rate for rate in these]
            self.add(theta, displacement, displacement, scale, step, len(these), order, weights)
        return displacement
