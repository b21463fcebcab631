"""Everything by autograd: all rows at once by ``torch.func.vmap``, or one after another."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from fobmaml.engine.base import Engine
from fobmaml.engine.losses import hvp
from fobmaml.engine.modules import batched, differentiable
from fobmaml.engine.network import Network


def rows_batched(network: Network, phi: Tensor, x: Tensor) -> Tensor:
    """The network with parameters phi[r] on the examples x[r], all rows at once: [R, P], [R, N, ...] -> [R, N, ...]."""
    with batched(network.device):
        return vmap(network.module)(network.unflatten(phi), x)


class Autograd(Engine):
    """All rows at once. Memory: the activations of all of them."""

    def outputs(self, phi: Tensor) -> Tensor:
        with differentiable():
            found = [rows_batched(self.network, phi, self.x[:, part]) for part in self.apart]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def gradient(self, phi: Tensor) -> Tensor:
        return self._gradient(phi, twice=False)[0].detach()

    def linearize(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        gradient, leaf = self._gradient(phi.clone(), twice=True)  # phi may change before the products are asked for
        return gradient.detach(), lambda v: hvp(gradient, leaf, v)

    def _gradient(self, phi: Tensor, twice: bool) -> tuple[Tensor, Tensor]:
        """With its graph if ``twice``, and what it is taken with respect to."""
        with torch.enable_grad(), differentiable(twice):
            leaf = phi.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.row_loss(self.outputs(leaf)).sum(), leaf, create_graph=twice)
        return gradient, leaf
