"""Stacked networks equal the plain module, row by row, in value and in first and second derivatives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PlainMLP, plain_losses
from torch import nn

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.engine.activations import ACTIVATIONS
from fobmaml.engine.losses import CrossEntropy, Loss, Part, SquaredError
from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Forward, Reptile, Symmetric, estimate
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import GradientDescent, InnerProblem


def _batch(rows: int = 3, examples: int = 6, length: int = 40) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, examples, length, generator=g, dtype=torch.float64)
    y = torch.randint(5, (rows, examples), generator=g)
    return TaskBatch(x, y, x, y)


MODELS = [
    (lambda: CNN1d((40,), 5, width=4), 40),
    (lambda: CNN1d((40,), 5, width=3, depth=1), 40),
    (lambda: CNN1d((17,), 5, 4, depth=6), 17),
    (lambda: CNN1d((3,), 5, 4, depth=4, activation="tanh"), 3),
    (lambda: MLP((40,), 5, width=6, depth=2), 40),
    (lambda: MLP((40,), 5, depth=0), 40),
    (PlainMLP, 40),
]


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize(("make", "length"), MODELS)
def test_rows_equal_the_module(make, length, engine):
    torch.manual_seed(0)
    learner = Learner(make().double(), F.cross_entropy, engine)
    tasks = _batch(length=length)
    rows = learner.theta() + 0.1 * torch.randn(3, learner.parameter_count, dtype=torch.float64)
    problem = InnerProblem(learner, rows, tasks, 0.0)
    gradient, product = problem.linearize(rows)
    v = torch.randn_like(rows)
    for r in range(3):
        support, _ = plain_losses(learner, tasks, r)
        torch.testing.assert_close(problem.objective(rows)[r], support(rows[r]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[r], torch.func.grad(support)(rows[r]), rtol=1e-10, atol=1e-11)
        wanted = torch.func.jvp(torch.func.grad(support), (rows[r],), (v[r],))[1]
        for _ in range(2):  # nothing of the first is left in the second
            torch.testing.assert_close(product(v)[r], wanted, rtol=1e-10, atol=1e-11)


SQUARES = (F.mse_loss, nn.MSELoss(), nn.MSELoss(reduction="sum"))


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, *SQUARES, F.l1_loss, lambda o, y: F.cross_entropy(o, y)])
def test_row_losses_are_the_loss_function(loss_fn):
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 7, 5, generator=g, dtype=torch.float64)
    targets = torch.randint(5, (3, 7), generator=g)
    if loss_fn in (*SQUARES, F.l1_loss):
        targets = torch.randn(3, 7, 5, generator=g, dtype=torch.float64)
    factor = torch.tensor([0.5, -0.5, 2.0], dtype=torch.float64)
    loss = Loss(loss_fn).rows(targets, [Part(slice(2), 1.0), Part(slice(2, None), factor)])
    assert isinstance(loss, CrossEntropy) == (loss_fn is F.cross_entropy)
    assert isinstance(loss, SquaredError) == (loss_fn in SQUARES)

    def wanted(o):
        return torch.stack(
            [loss_fn(o[r, :2], targets[r, :2]) + factor[r] * loss_fn(o[r, 2:], targets[r, 2:]) for r in range(3)]
        )

    torch.testing.assert_close(loss(outputs), wanted(outputs), rtol=1e-14, atol=1e-14)
    gradient = torch.func.grad(lambda o: wanted(o).sum())
    found, along = loss.linearize(outputs, second_order=True)
    torch.testing.assert_close(found, gradient(outputs), rtol=1e-13, atol=1e-14)
    tangent = torch.randn(outputs.shape, generator=g, dtype=torch.float64)
    hessian_product = torch.func.grad(lambda o: (gradient(o) * tangent).sum())(outputs)  # a Hessian is symmetric
    torch.testing.assert_close(along(tangent), hessian_product, rtol=1e-13, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_squared_errors_of_other_shapes_and_dtypes_are_torchs():
    targets, part = torch.randn(2, 4, dtype=torch.float64), [Part(slice(None), 1.0)]
    loss = Loss(F.mse_loss)
    for outputs in (torch.randn(2, 4, 1, dtype=torch.float64), torch.randn(2, 4)):
        wanted = torch.stack([F.mse_loss(o, y) for o, y in zip(outputs, targets, strict=True)])
        rows = loss.rows(targets, part)
        torch.testing.assert_close(rows(outputs), wanted.to(outputs.dtype), check_dtype=False)
        leaf = outputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sum(F.mse_loss(o, y) for o, y in zip(leaf, targets, strict=True)), leaf)
        torch.testing.assert_close(rows.linearize(outputs)[0], gradient)


def test_ignored_targets_stay_ignored():
    targets = torch.tensor([[0, -100, 1]])
    outputs = torch.randn(1, 3, 2)
    torch.testing.assert_close(
        Loss(F.cross_entropy).rows(targets, [Part(slice(None), 1.0)])(outputs),
        F.cross_entropy(outputs[0], targets[0]).unsqueeze(0),
    )


@pytest.mark.parametrize("seed", range(8))
def test_estimators_by_hand_equal_those_by_autograd(seed):
    """Networks, tasks and settings of random sizes; every estimator."""
    choose = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:
        return int(choose.integers(low, high + 1))

    length, outputs, width, depth = size(3, 50), size(2, 6), size(1, 9), size(0, 5)
    activation = list(ACTIVATIONS)[size(0, len(ACTIVATIONS) - 1)]
    torch.manual_seed(seed)
    model = (
        CNN1d((length,), outputs, width, depth, activation)
        if depth and seed % 4
        else MLP((length,), outputs, width, depth, activation)
    )
    count, support, query = size(1, 4), size(1, 6), size(1, 9)
    batch = TaskBatch(
        torch.randn(count, support, length),
        torch.randint(outputs, (count, support)),
        torch.randn(count, query, length),
        torch.randint(outputs, (count, query)),
    )
    solver = GradientDescent(size(1, 6), float(choose.uniform(0.01, 0.2)), momentum=(0.0, 0.5)[seed % 2])
    lam = float(choose.uniform(0.1, 2.0))
    estimators = [
        Forward(solver, lam),
        Symmetric(solver, lam),
        Central(solver, lam),
        MAML(solver, lam),
        MAML(solver, checkpoint=True),
        FOMAML(solver, lam),
        Reptile(solver),
        IMAML(solver, lam),
    ]
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        model, tasks = model.to(dtype), batch.to(dtype=dtype)
        for estimator in estimators:
            fast, plain = (
                estimate(estimator, learner, learner.theta(), tasks, chunk)
                for learner, chunk in (
                    (Learner(model, F.cross_entropy), size(1, count)),
                    (Learner(model, F.cross_entropy, engine="autograd"), None),
                )
            )
            kind = f"{type(estimator).__name__}, {dtype}, {model}"
            assert (fast.gradient - plain.gradient).norm() <= tol * plain.gradient.norm(), kind
            torch.testing.assert_close(fast.query_loss, plain.query_loss, rtol=tol, atol=tol, msg=kind)
            torch.testing.assert_close(fast.residual, plain.residual, rtol=tol, atol=tol, msg=kind)


def test_theta_round_trip():
    model = CNN1d((40,), 5, width=4)
    learner = Learner(model, F.cross_entropy)
    for name, value in learner.unflatten(learner.theta()).items():
        assert torch.equal(value, dict(model.named_parameters())[name])
    assert learner.parameter_count == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_not_part_of_theta():
    learner = Learner(PlainMLP(), F.cross_entropy)
    assert not any("frozen" in name for name in learner.shapes)


class Doubled(CNN1d):
    def forward(self, x):
        return 2.0 * super().forward(x)


@pytest.mark.parametrize(
    ("kind", "why"), [(CNN1d, "Conv1d 'convolutions.1'"), (Doubled, "Doubled '' (aten.mul.Tensor)")]
)
def test_passes_by_hand_are_for_the_whole_network_only(kind, why):
    model = kind((40,), 5, width=4).double()
    if kind is CNN1d:
        model.convolutions[1].bias.requires_grad_(False)
    learner, tasks = Learner(model, F.cross_entropy), _batch()
    rows = learner.theta().expand(3, -1)
    gradient = InnerProblem(learner, rows, tasks, 0.0).gradient(rows)
    assert learner.used == "autograd"
    assert learner.untraced.startswith(why)
    support, _ = plain_losses(learner, tasks, 0)
    torch.testing.assert_close(gradient[0], torch.func.grad(support)(rows[0]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.InstanceNorm1d(8, track_running_stats=True), nn.Dropout(0.1)]
)
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
