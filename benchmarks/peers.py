"""Meta-gradients by other libraries and by hand, on the same network and tasks, as a user of each would write them.

JAX, which runs in processes of its own, is in jax_peer.py.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fobmaml.models import CNN1d
from fobmaml.tasks import TaskBatch


def plain_network(model: CNN1d) -> nn.Sequential:
    """``model`` (with SiLU) as an ordinary module, with the same numbers in it."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, -1))]
    for convolution in model.convolutions:
        layers += [copy.deepcopy(convolution), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), copy.deepcopy(model.head))


def in_our_layout(gradient: Sequence[Tensor]) -> Tensor:
    """A gradient with respect to ``plain_network(model)``, as a row of ``fobmaml.engine.Network``."""
    return torch.cat([(part.mT if part.dim() == 3 else part).flatten() for part in gradient])


def higher_maml(network: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> list[Tensor]:
    """The mean meta-gradient, by parameter, task after task."""
    import higher

    inner = torch.optim.SGD(network.parameters(), lr=lr)
    for x, y, query_x, query_y in _each(tasks):
        with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (adapted, differentiable):
            for _ in range(steps):
                differentiable.step(F.cross_entropy(adapted(x), y))
            (F.cross_entropy(adapted(query_x), query_y) / len(tasks)).backward()
    return _gradients(network)


def torchopt_maml(network: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> list[Tensor]:
    """The mean meta-gradient, by parameter, task after task."""
    import torchopt

    inner = torchopt.MetaSGD(network, lr=lr)
    start = [torchopt.extract_state_dict(part, by="reference") for part in (network, inner)]
    for x, y, query_x, query_y in _each(tasks):
        for _ in range(steps):
            inner.step(F.cross_entropy(network(x), y))
        (F.cross_entropy(network(query_x), query_y) / len(tasks)).backward()
        for part, state in zip((network, inner), start, strict=True):
            torchopt.recover_state_dict(part, state)
    return _gradients(network)


def loop_maml(network: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> list[Tensor]:
    """The mean meta-gradient, by parameter: torch's own autograd through the inner steps, task after task."""
    theta: dict[str, Tensor] = dict(network.named_parameters())
    for x, y, query_x, query_y in _each(tasks):
        phi = theta
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(network, phi, (x,)), y)
            slopes = torch.autograd.grad(loss, [*phi.values()], create_graph=True)
            phi = {name: p - lr * slope for (name, p), slope in zip(phi.items(), slopes, strict=True)}
        (F.cross_entropy(functional_call(network, phi, (query_x,)), query_y) / len(tasks)).backward()
    return _gradients(network)


def loop_symmetric(network: nn.Module, tasks: TaskBatch, steps: int, lr: float, lam: float, nu: float) -> list[Tensor]:
    """The mean of −λ (φ_ν − φ_−ν) / (2ν), by parameter: plain gradient descent, task after task, support and query
    examples in one pass."""
    theta = {name: p.detach() for name, p in network.named_parameters()}
    total = [torch.zeros_like(start) for start in theta.values()]
    for x, y, query_x, query_y in _each(tasks):
        every_x, every_y = torch.cat([x, query_x]), torch.cat([y, query_y])
        for sign in (1, -1):
            weights = total[0].new_tensor([1 / len(x)] * len(x) + [sign * nu / len(query_x)] * len(query_x))
            phi = {name: start.clone().requires_grad_() for name, start in theta.items()}
            for _ in range(steps):
                losses = F.cross_entropy(functional_call(network, phi, (every_x,)), every_y, reduction="none")
                slopes = torch.autograd.grad(weights @ losses, [*phi.values()])
                with torch.no_grad():
                    for p, slope, start in zip(phi.values(), slopes, theta.values(), strict=True):
                        p -= lr * (slope + lam * (p - start))
            for part, p in zip(total, phi.values(), strict=True):
                part -= sign * lam / (2 * nu * len(tasks)) * p.detach()
    return total


@dataclass(frozen=True)
class Peer:
    """``gradient(network, tasks, steps, lr[, lam, nu])``: the mean meta-gradient by the estimator ``method``. It takes
    ``package``, if any."""

    method: str
    gradient: Callable[..., Any]
    package: str | None = None

    def missing(self) -> bool:
        return self.package is not None and find_spec(self.package) is None


PEERS = {
    "higher": Peer("maml", higher_maml, "higher"),
    "torchopt": Peer("maml", torchopt_maml, "torchopt"),
    "loop_maml": Peer("maml", loop_maml),
    "loop_symmetric": Peer("symmetric", loop_symmetric),
}


def _each(tasks: TaskBatch) -> Iterable[tuple[Tensor, ...]]:
    return zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True)


def _gradients(network: nn.Module) -> list[Tensor]:
    """What backward has gathered, taken from the parameters."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return gradients
