"""Any module and any loss: what the estimators return is what plain autograd returns, task by task, in float64."""

import pytest
import torch
import torch.nn.functional as F
from module_cases import ESTIMATORS, LOSSES, TOKENS, VECTORS, Plain, made, tasks, tokens, vectors
from torch import nn

import fobmaml

CASES = {**{name: (make, vectors) for name, make in VECTORS.items()},
         **{name: (make, tokens) for name, make in TOKENS.items()}}


def _check(model, loss_fn, batch, names=ESTIMATORS):
    plain = Plain(model, loss_fn, batch)
    for name in names:
        wanted = torch.stack([plain.estimate(name, task) for task in range(len(batch))]).mean(0)
        for chunk in (None, 1):
            found = fobmaml.meta_gradient(ESTIMATORS[name], model, loss_fn, batch, chunk)
            flat = torch.cat([g.flatten() for g in found.gradient.values()])
            assert list(found.gradient) == plain.names
            error = float((flat - wanted).norm() / wanted.norm())
            assert error < 1e-9, f"{name}, task_chunk={chunk}, {found.engine}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_modules(case):
    torch.manual_seed(0)
    make, x = CASES[case]
    batch = tasks(x, LOSSES["cross_entropy"][1])
    _check(made(make, batch.support_x[0]), F.cross_entropy, batch)


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("network", ["our mlp", "mlp", "lstm"])
def test_losses(case, network):
    """By the engines for listed networks, for batched ones and for rows one by one."""
    torch.manual_seed(0)
    loss_fn, y = LOSSES[case]
    batch = tasks(vectors, y)
    _check(made(VECTORS[network], batch.support_x[0]), loss_fn, batch)
