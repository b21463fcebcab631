"""What an engine offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fobmaml.engine.losses import Part, RowLoss, rows_taken
from fobmaml.engine.network import Network

WHOLE = (slice(None),)


class Draws(NamedTuple):
    """``examples`` [R, K, n]: which of its examples each row takes at each of K steps, and the ``parts`` of the n."""

    examples: Tensor
    parts: Sequence[Part]


class Steps(NamedTuple):
    """Of gradient descent: one for each of ``rates``, v ← momentum · v + ∇h(φ), φ ← φ − rate · v.

    h is the loss with (lam/2)‖φ − θ‖², of all examples or, step by step, of ``draws``.
    """

    rates: Sequence[float]
    lam: float = 0.0
    momentum: float = 0.0
    draws: Draws | None = None


class Engine(ABC):
    """The losses Lᵣ(network(φᵣ, xᵣ)) of a network with its own parameters in every row r, at fixed inputs.

    ``x`` [R, N, ...]; ``loss``: of their outputs. ``apart``: sets of examples that may not see each other. Parameters
    and gradients are rows [R, P]. No call depends on an earlier one. One caller at a time.
    """

    def __init__(self, network: Network, x: Tensor, loss: RowLoss, apart: Sequence[slice] = WHOLE):
        self.network, self.x, self.row_loss, self.apart = network, x, loss, apart

    @abstractmethod
    def outputs(self, phi: Tensor) -> Tensor:
        """[R, N, ...]."""

    def loss(self, phi: Tensor) -> Tensor:
        """Of each row, [R]."""
        with torch.no_grad():
            return self.row_loss(self.outputs(phi))

    @abstractmethod
    def gradient(self, phi: Tensor) -> Tensor:
        """Of each row's loss with respect to its parameters, [R, P]."""

    @abstractmethod
    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The gradient [R, P], and v ↦ each row's Hessian times v[r], [R, P] -> [R, P]."""

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "Engine":
        """The same of the rows' ``examples`` [R, n] only, of which each of ``parts`` takes some."""
        apart = WHOLE if self.apart is WHOLE else tuple(part.examples for part in parts)
        loss = self.row_loss.of_examples(examples, parts)
        return type(self)(self.network, rows_taken(self.x, examples), loss, apart)

    def gradient_descent(self, theta: Tensor, steps: Steps) -> Tensor:
        """Displacements φ − θ [R, P] after ``steps``; ``theta`` [R, P] may be expanded. The displacement is what
        moves: it is small, so that little of it is lost to rounding."""
        rates, lam, momentum, draws = steps
        displacement = torch.zeros_like(theta, memory_format=torch.contiguous_format)
        velocity = torch.zeros_like(displacement) if momentum else displacement
        phi = torch.empty_like(displacement)
        for step, rate in enumerate(rates):
            engine = self if draws is None else self.of_examples(draws.examples[:, step], draws.parts)
            torch.add(theta, displacement, out=phi)
            if momentum:
                engine._add_gradient(phi, velocity, momentum, 1.0)
                displacement.sub_(velocity.add_(displacement, alpha=lam), alpha=rate)
            else:
                engine._add_gradient(phi, displacement, 1.0 - rate * lam, -rate)
        return displacement

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        """into ← scale · into + step · gradient(phi)."""
        into.mul_(scale).add_(self.gradient(phi), alpha=step)
