"""Everything by autograd on the module itself, row by row."""

from collections.abc import Callable

import torch
from torch import Tensor

from fobmaml.engine.base import Engine
from fobmaml.engine.losses import hvp
from fobmaml.engine.modules import differentiable
from fobmaml.engine.network import Network


def rows_one_by_one(network: Network, phi: Tensor, x: Tensor) -> Tensor:
    """The network with parameters phi[r] on the examples x[r]: [R, P], [R, N, ...] -> [R, N, ...]."""
    return torch.stack([network.one_row(p, inputs) for p, inputs in zip(phi, x, strict=True)])


class Loop(Engine):
    """Takes any module. Memory of a gradient: the activations of one row."""

    def outputs(self, phi: Tensor) -> Tensor:
        with differentiable():
            return torch.stack([self._outputs(p, x) for p, x in zip(phi, self.x, strict=True)])

    def _outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        found = [self.network.one_row(phi, x[part]) for part in self.apart]
        return torch.cat(found) if len(found) > 1 else found[0]

    def gradient(self, phi: Tensor) -> Tensor:
        return torch.stack([self._gradient(r, row, twice=False)[0].detach() for r, row in enumerate(phi)])

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rows = [self._gradient(r, row.clone(), twice=True) for r, row in enumerate(phi)]
        return (
            torch.stack([gradient.detach() for gradient, _ in rows]),
            lambda v: torch.stack([hvp(*row, along) for row, along in zip(rows, v, strict=True)]),
        )

    def _gradient(self, r: int, phi: Tensor, twice: bool) -> tuple[Tensor, Tensor]:
        """Of row r, with its graph if ``twice``, and what it is taken with respect to."""
        with torch.enable_grad(), differentiable(twice):
            leaf = phi.detach().requires_grad_()
            loss = self.row_loss.of_row(r, self._outputs(leaf, self.x[r]))
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=twice)
        return gradient, leaf
