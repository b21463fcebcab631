"""MAML's meta-gradient by other libraries, on the same network and tasks, as a user of each would write it."""

from collections.abc import Iterable

import higher
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

from fobmaml.models import CNN1d
from fobmaml.tasks import TaskBatch


def plain_network(model: CNN1d) -> nn.Sequential:
    """``model`` (with SiLU) as an ordinary module, with the same numbers in it."""
    *convolutions, last = model.weights
    layers: list[nn.Module] = [nn.Unflatten(1, (1, -1))]
    for weight, stride in zip(convolutions, model.strides, strict=True):
        channels_out, kernel_size, channels_in = weight.shape
        layers += [nn.Conv1d(channels_in, channels_out, kernel_size, stride, padding=1), nn.SiLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last[0].numel(), len(last))).to(last.dtype)
    ours = [part for pair in zip((w.mT for w in model.weights), model.biases, strict=True) for part in pair]
    with torch.no_grad():
        for parameter, values in zip(network.parameters(), ours, strict=True):
            parameter.copy_(values.reshape(parameter.shape))
    return network


def in_our_layout(model: CNN1d, gradient: list[Tensor]) -> Tensor:
    """A gradient with respect to ``plain_network(model)``, as one with respect to the flat parameters of ``model``."""
    weights = [g.view(w.mT.shape).mT for g, w in zip(gradient[0::2], model.weights, strict=True)]
    return torch.cat([part.flatten() for part in (*weights, *gradient[1::2])])


def higher_maml(network: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> list[Tensor]:
    """The mean meta-gradient, by parameter, task after task."""
    inner = torch.optim.SGD(network.parameters(), lr=lr)
    for x, y, query_x, query_y in _each(tasks):
        with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (adapted, differentiable):
            for _ in range(steps):
                differentiable.step(F.cross_entropy(adapted(x), y))
            (F.cross_entropy(adapted(query_x), query_y) / len(tasks)).backward()
    return _gradients(network)


def torchopt_maml(network: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> list[Tensor]:
    """The mean meta-gradient, by parameter, task after task."""
    inner = torchopt.MetaSGD(network, lr=lr)
    start = [torchopt.extract_state_dict(part, by="reference") for part in (network, inner)]
    for x, y, query_x, query_y in _each(tasks):
        for _ in range(steps):
            inner.step(F.cross_entropy(network(x), y))
        (F.cross_entropy(network(query_x), query_y) / len(tasks)).backward()
        for part, state in zip((network, inner), start, strict=True):
            torchopt.recover_state_dict(part, state)
    return _gradients(network)


PEERS = {"higher": higher_maml, "torchopt": torchopt_maml}


def _each(tasks: TaskBatch) -> Iterable[tuple[Tensor, ...]]:
    return zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True)


def _gradients(network: nn.Module) -> list[Tensor]:
    """What backward has gathered, taken from the parameters."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return gradients
