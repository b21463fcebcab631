"""What an engine offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fobmaml.engine.losses import RowLoss
from fobmaml.engine.network import Network

WHOLE = (slice(None),)


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

    def gradient_descent(self, theta: Tensor, steps: int, lr: float, lam: float = 0.0, momentum: float = 0.0) -> Tensor:
        """Displacements φ − θ [R, P] after ``steps`` of v ← momentum · v + ∇h(φ), φ ← φ − lr · v.

        h is the loss with (lam/2)‖φ − θ‖²; ``theta`` [R, P] may be expanded. The displacement is what moves: it is
        small, so that little of it is lost to rounding.
        """
        displacement = torch.zeros_like(theta, memory_format=torch.contiguous_format)
        velocity = torch.zeros_like(displacement) if momentum else displacement
        phi = torch.empty_like(displacement)
        for _ in range(steps):
            torch.add(theta, displacement, out=phi)
            if momentum:
                self._add_gradient(phi, velocity, momentum, 1.0)
                displacement.sub_(velocity.add_(displacement, alpha=lam), alpha=lr)
            else:
                self._add_gradient(phi, displacement, 1.0 - lr * lam, -lr)
        return displacement

    def _add_gradient(self, phi: Tensor, into: Tensor, scale: float, step: float) -> None:
        """into ← scale · into + step · gradient(phi)."""
        into.mul_(scale).add_(self.gradient(phi), alpha=step)
