"""How much was computed: a measure of cost that depends neither on the machine nor on how tasks are grouped."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from fobmaml.engine.base import Engine, Steps
from fobmaml.engine.losses import Part

GRADIENT, HESSIAN_PRODUCT = 3, 8
"""Passes of multiply-adds, as many as a forward pass has, of one example. A gradient: the forward pass, the way back
through the activations, the sums for the parameters. A Hessian product: the first two, and the derivative of all three,
which for the last two has two terms each and for the forward pass, too: 2 + 6."""
FIRST = 256
"""Numbers of a row, among which there is almost always one that is not zero."""


@dataclass(frozen=True)
class Work:
    """What was computed, each counted in single examples: ``forward`` passes alone, ``gradients`` (a forward and a
    backward pass) and ``hessian_products``."""

    forward: int = 0
    gradients: int = 0
    hessian_products: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.gradients + other.gradients,
            self.hessian_products + other.hessian_products,
        )

    def __sub__(self, other: "Work") -> "Work":
        return Work(
            self.forward - other.forward,
            self.gradients - other.gradients,
            self.hessian_products - other.hessian_products,
        )

    @property
    def example_gradients(self) -> float:
        """Gradients, and each forward pass alone as a third of one; without the Hessian products."""
        return (GRADIENT * self.gradients + self.forward) / GRADIENT

    @property
    def total(self) -> float:
        """All as example-gradients: a Hessian product counts as 8/3."""
        return (GRADIENT * self.gradients + self.forward + HESSIAN_PRODUCT * self.hessian_products) / GRADIENT


class Counter:
    """Adds up the work of engines. Rows that only wait for others do not count: see ``only``."""

    def __init__(self) -> None:
        self._forward = self._gradients = 0
        self._products: int | Tensor = 0  # on a GPU a tensor: nothing waits for it
        self._rows: int | None = None

    def read(self) -> Work:
        """All so far."""
        return Work(self._forward, self._gradients, int(self._products))

    @contextmanager
    def only(self, rows: int) -> Iterator[None]:
        """Inside, of all rows of a forward pass or gradient only so many count; 0: what is done is no part of the
        work, such as a check."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def forward(self, rows: int, examples: int) -> None:
        self._forward += examples * (rows if self._rows is None else self._rows)

    def gradient(self, rows: int, examples: int) -> None:
        self._gradients += examples * (rows if self._rows is None else self._rows)

    def products(self, v: Tensor, examples: int) -> None:
        """Of Hessians with the rows of ``v`` [R, P]; one with zero is none."""
        if self._rows == 0:
            return
        if v.device.type != "cpu":  # nothing waits for it
            self._products += examples * v.any(dim=1).sum()
        elif v[:, :FIRST].any(dim=1).all():  # the usual case, without reading all of it
            self._products += examples * len(v)
        else:
            self._products += examples * int(v.any(dim=1).sum())


class Counted(Engine):
    """Another engine, whose work a counter adds up."""

    def __init__(self, engine: Engine, counter: Counter):
        super().__init__(engine.network, engine.x, engine.row_loss, engine.apart)
        self.engine, self.counter, self.size = engine, counter, (engine.x.shape[0], engine.x.shape[1])

    def outputs(self, phi: Tensor) -> Tensor:
        self.counter.forward(*self.size)
        return self.engine.outputs(phi)

    def loss(self, phi: Tensor) -> Tensor:
        self.counter.forward(*self.size)
        return self.engine.loss(phi)

    def gradient(self, phi: Tensor) -> Tensor:
        self.counter.gradient(*self.size)
        return self.engine.gradient(phi)

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.counter.gradient(*self.size)
        gradient, product = self.engine.linearize(phi)

        def counted(v: Tensor) -> Tensor:
            self.counter.products(v, self.size[1])
            return product(v)

        return gradient, counted

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "Counted":
        return Counted(self.engine.of_examples(examples, parts), self.counter)

    def gradient_descent(self, theta: Tensor, steps: Steps) -> Tensor:
        rows, examples = self.size
        if steps.draws is not None:
            examples = steps.draws.examples.shape[2]
        self.counter.gradient(rows, len(steps.rates) * examples)
        return self.engine.gradient_descent(theta, steps)
