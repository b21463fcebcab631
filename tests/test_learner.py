"""Stacked networks equal the plain module, row by row, in value and in first and second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from conftest import PlainMLP, plain_losses
from torch import nn

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.models import MLP, CNN1d
from fobmaml.models.cnn import Windows


def _batch(rows: int = 3, examples: int = 6, length: int = 40) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, examples, length, generator=g, dtype=torch.float64)
    y = torch.randint(5, (rows, examples), generator=g)
    return TaskBatch(x, y, x, y)


MODELS = [
    (lambda: CNN1d((40,), 5, width=4), 40), (lambda: CNN1d((40,), 5, width=3, depth=1), 40),
    (lambda: CNN1d((17,), 5, 4, depth=6), 17), (lambda: CNN1d((3,), 5, 4, depth=4, activation="tanh"), 3),
    (lambda: MLP((40,), 5, width=6, depth=2), 40), (lambda: MLP((40,), 5, depth=0), 40), (PlainMLP, 40),
]


@pytest.mark.parametrize(("make", "length"), MODELS)
def test_rows_equal_the_module(make, length):
    torch.manual_seed(0)
    learner = Learner(make().double(), F.cross_entropy)
    tasks = _batch(length=length)
    rows = learner.theta() + 0.1 * torch.randn(3, learner.parameter_count, dtype=torch.float64)
    rows.requires_grad_()
    losses = learner.query_loss(rows, tasks)  # support and query are the same here
    (gradient,) = torch.autograd.grad(losses.sum(), rows, create_graph=True)
    v = torch.randn_like(rows)
    (product,) = torch.autograd.grad((gradient * v).sum(), rows)
    for r in range(3):
        support, _ = plain_losses(learner, tasks, r)
        torch.testing.assert_close(losses[r], support(rows[r]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[r], torch.func.grad(support)(rows[r]), rtol=1e-10, atol=1e-11)
        wanted = torch.func.jvp(torch.func.grad(support), (rows[r].detach(),), (v[r],))[1]
        torch.testing.assert_close(product[r], wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("length", "taps", "stride"), [(40, 5, 2), (19, 3, 2), (10, 3, 2), (3, 5, 2), (1, 3, 1),
                                                        (2, 3, 2), (7, 3, 1)])
def test_windows_are_differentiable_twice(length, taps, stride):
    x = torch.randn(2, 2, length, 3, dtype=torch.float64, requires_grad=True)
    unfolded = F.unfold(x.detach().flatten(0, 1).transpose(1, 2).unsqueeze(2), (1, taps), padding=(0, 1),
                        stride=(1, stride))  # [R·N, C·taps, out]
    wanted = unfolded.view(2, 2, 3, taps, -1).permute(0, 1, 4, 3, 2).reshape(2, -1, taps * 3)
    torch.testing.assert_close(Windows.apply(x, taps, stride), wanted, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda t: Windows.apply(t, taps, stride), (x,))
    assert torch.autograd.gradgradcheck(lambda t: Windows.apply(t, taps, stride).square(), (x,))


def test_theta_round_trip():
    model = CNN1d((40,), 5, width=4)
    learner = Learner(model, F.cross_entropy)
    for name, value in learner.fold(learner.theta()).items():
        assert torch.equal(value, dict(model.named_parameters())[name])
    assert learner.parameter_count == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_not_part_of_theta():
    learner = Learner(PlainMLP(), F.cross_entropy)
    assert not any("frozen" in name for name in learner.names)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.BatchNorm1d(8, track_running_stats=False),
                                   nn.InstanceNorm1d(8, track_running_stats=True), nn.Dropout(0.1)])
def test_impure_layers_are_refused(layer):
    model = nn.Sequential(nn.Linear(40, 8), layer, nn.Linear(8, 5))
    with pytest.raises(ValueError, match=r"model: \w+ '1' .*takes"):
        Learner(model, F.cross_entropy)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.1)])
def test_in_eval_mode_they_are_pure(layer):
    model = nn.Sequential(nn.Linear(40, 8), layer, nn.Linear(8, 5)).double().eval()
    solver = fobmaml.solvers.GradientDescent(steps=2)
    fobmaml.meta_gradient(fobmaml.estimators.Symmetric(solver), model, F.cross_entropy, _batch())


def test_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="trainable parameters"):
        Learner(nn.Flatten(), F.cross_entropy)
