"""SNGDM and clipped gradient descent are their formulas over the whole vector, and proper torch optimizers."""

import copy

import pytest
import torch
from torch import nn

from fobmaml.optim import SNGDM, ClippedSGD


def _parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 2), (4,), ())]


def _flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _descend(optimizer, parameters, steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    path = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
        optimizer.step()
        path.append(_flat(parameters).clone())
    return path


def _gradients(steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [
        scale
        * torch.cat([torch.randn(shape, generator=g, dtype=torch.float64).flatten() for shape in ((3, 2), (4,), ())])
        for g in (torch.Generator().manual_seed(step) for step in range(steps))
    ]


@pytest.mark.parametrize("groups", [False, True])
def test_sngdm_is_its_formula(groups):
    parameters = _parameters()
    given = [{"params": parameters[:1]}, {"params": parameters[1:]}] if groups else parameters
    theta, m = _flat(parameters), torch.zeros(11, dtype=torch.float64)
    path = _descend(SNGDM(given, lr=0.3, beta=0.8), parameters, 6)
    for g, found in zip(_gradients(6), path, strict=True):
        m = 0.8 * m + 0.2 * g
        theta = theta - 0.3 * m / m.norm()
        torch.testing.assert_close(found, theta, rtol=1e-12, atol=1e-14)


def test_sngdm_steps_have_length_lr_whatever_the_gradients_scale():
    for scale in (1e-12, 1.0, 1e12):
        parameters = _parameters()
        before = _flat(parameters)
        (after,) = _descend(SNGDM(parameters, lr=0.25), parameters, 1, scale)
        assert float((after - before).norm()) == pytest.approx(0.25, rel=1e-12)


def test_sngdm_stands_still_without_a_gradient():
    parameters = _parameters()
    before = _flat(parameters).clone()
    optimizer = SNGDM(parameters, lr=0.25)
    optimizer.step()  # no gradients at all
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(_flat(parameters), before)


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clipped_sgd_is_its_formula(scale):
    parameters = _parameters()
    theta, v = _flat(parameters), torch.zeros(11, dtype=torch.float64)
    path = _descend(ClippedSGD(parameters, lr=0.1, max_norm=0.5, momentum=0.7), parameters, 6, scale)
    for g, found in zip(_gradients(6, scale), path, strict=True):
        v = 0.7 * v + g * min(1.0, 0.5 / float(g.norm()))
        theta = theta - 0.1 * v
        torch.testing.assert_close(found, theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [lambda p: SNGDM(p, 0.1), lambda p: ClippedSGD(p, 0.1)])
def test_state_dict_continues_the_path(make):
    whole = _parameters()
    path = _descend(make(whole), whole, 6)
    first = _parameters()
    optimizer = make(first)
    _descend(optimizer, first, 3)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    continued = make(second)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        g = torch.Generator().manual_seed(step)
        for p in second:
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
        continued.step()
    assert torch.equal(_flat(second), path[-1])


@pytest.mark.parametrize("make", [lambda p: SNGDM(p, 0.05), lambda p: ClippedSGD(p, 0.05, 1.0)])
def test_closure_and_scheduler_and_groups(make):
    (p,) = [nn.Parameter(torch.full((3,), 2.0))]
    optimizer = make([p])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return float(loss)

    losses = []
    for _ in range(200):
        losses.append(optimizer.step(closure))
        schedule.step()
    assert losses[0] == pytest.approx(12.0)
    assert losses[-1] < 1e-3
    assert optimizer.param_groups[0]["lr"] < 1e-5


def test_a_groups_own_learning_rate_counts():
    parameters = _parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = SNGDM([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}], lr=0.1, beta=0.0)
    _descend(optimizer, parameters, 1)
    g = _gradients(1)[0]
    torch.testing.assert_close(before[0] - parameters[0], 0.2 * g[:6].view(3, 2) / g.norm())
    torch.testing.assert_close(before[1] - parameters[1], 0.1 * g[6:10] / g.norm())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: SNGDM(p, lr=0), "lr=0: takes a finite number above 0"),
        (lambda p: SNGDM(p, beta=1.0), "beta=1.0: takes"),
        (lambda p: ClippedSGD(p, max_norm=0), "max_norm=0: takes"),
        (lambda p: ClippedSGD(p, momentum=-1), "momentum=-1"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        make(_parameters())
