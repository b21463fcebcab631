"""Tasks with unequal numbers of examples, and a loss of the support set's own, are what plain loops over tasks make of
them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import PlainMLP
from torch import nn

from fobmaml import Learner, TaskBatch, meta_gradient
from fobmaml.engine.losses import CrossEntropy
from fobmaml.estimators import FOMAML, IMAML, MAML, Exact, Reptile, Symmetric, Tangent
from fobmaml.models import MLP
from fobmaml.solvers import GradientDescent, NewtonCG

SIZES = ((3, 7), (5, 4), (2, 6))
STEPS, LR, LAM, NU = 3, 0.1, 0.5, 0.05
SOLVER = GradientDescent(STEPS, LR)


def _soft(outputs, targets):
    """A mean over examples that is no sum of parts: no weights of examples give it."""
    return torch.log1p((outputs - targets).square().sum(-1)).mean().sqrt()


def _labels_smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.2)


KINDS = {
    "cross-entropy": (F.cross_entropy, True),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), True),
    "smoothed": (_labels_smoothed, True),
    "mse": (F.mse_loss, False),
    "sum": (partial(F.mse_loss, reduction="sum"), False),
    "own": (_soft, False),
}
MODELS = {
    "mlp": lambda: MLP((40,), 3, width=6, depth=1),
    "plain": lambda: nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)),
}


def _tasks(classes: bool) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(4)

    def part(n):
        x = torch.randn(n, 40, generator=generator, dtype=torch.float64)
        if classes:
            return x, torch.randint(3, (n,), generator=generator)
        return x, torch.randn(n, 3, generator=generator, dtype=torch.float64)

    return [(*part(s), *part(q)) for s, q in SIZES]


def _model(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().double()


def _adapted(model, loss, task, theta, nu=0.0, query_loss=None, lam=LAM, create_graph=False):
    """K plain steps on one task's own examples, as one flat vector."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def outputs(flat, x):
        parts = flat.split([shape.numel() for shape in shapes])
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, parameters, (x,))

    s_x, s_y, q_x, q_y = task
    phi = theta.clone().requires_grad_() if not create_graph else theta
    for _ in range(STEPS):
        value = loss(outputs(phi, s_x), s_y) + 0.5 * lam * (phi - theta).square().sum()
        if nu:
            value = value + nu * query_loss(outputs(phi, q_x), q_y)
        (g,) = torch.autograd.grad(value, phi, create_graph=create_graph)
        phi = phi - LR * g if create_graph else (phi - LR * g).detach().requires_grad_()
    return phi, outputs


def _wanted(method, model, support_loss, query_loss, tasks):
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = []
    for task in tasks:
        if method == "symmetric":
            ends = [_adapted(model, support_loss, task, theta, nu, query_loss)[0] for nu in (NU, -NU)]
            found.append(-LAM * (ends[0] - ends[1]) / (2 * NU))
            continue
        lam = 0.0 if method in ("maml", "reptile") else LAM
        if method == "reptile":
            s_x, s_y, q_x, q_y = task
            both = (torch.cat([s_x, q_x]), torch.cat([s_y, q_y]), q_x, q_y)
            found.append(theta - _adapted(model, support_loss, both, theta, lam=0.0)[0])
            continue
        start = theta.clone().requires_grad_()
        phi, outputs = _adapted(model, support_loss, task, start, lam=lam, create_graph=True)
        found.append(torch.autograd.grad(query_loss(outputs(phi, task[2]), task[3]), start)[0])
    return torch.stack(found).mean(0).detach()


ESTIMATORS = {"symmetric": Symmetric(SOLVER, LAM, NU), "maml": MAML(SOLVER), "reptile": Reptile(SOLVER)}


def _flat(result) -> torch.Tensor:
    return torch.cat([g.flatten() for g in result.gradient.values()])


@pytest.mark.parametrize(("model", "engine"), [("mlp", "auto"), ("plain", "auto"), ("plain", "loop")])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tasks_are_tasks_of_their_own_size(kind, model, engine):
    loss, classes = KINDS[kind]
    tasks, net = _tasks(classes), _model(model)
    batch = TaskBatch.padded(tasks)
    assert (batch.support_mask.sum(1).tolist(), batch.query_mask.sum(1).tolist()) == ([3, 5, 2], [7, 4, 6])
    batch = replace(batch, support_x=batch.support_x.masked_fill(~batch.support_mask.unsqueeze(-1), 9.0))
    for method, estimator in ESTIMATORS.items():
        result = meta_gradient(estimator, net, loss, batch, engine=engine)
        torch.testing.assert_close(_flat(result), _wanted(method, net, loss, loss, tasks), rtol=1e-8, atol=1e-11)
        for task, value in zip(tasks, result.query_loss, strict=True):
            phi, outputs = _adapted(net, loss, task, Learner(net, loss).theta(), lam=estimator.lam)
            torch.testing.assert_close(value, loss(outputs(phi, task[2]), task[3]).detach())


@pytest.mark.parametrize(
    "estimator",
    [
        FOMAML(SOLVER),
        Tangent(SOLVER, LAM),
        Tangent(SOLVER, LAM, "products"),
        IMAML(SOLVER, LAM),
        Exact(NewtonCG(tol=1e-9), 2.0),
        MAML(SOLVER, checkpoint=True),
        MAML(SOLVER, multi_step=0.5),
        Symmetric(SOLVER, LAM, "auto"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_other_estimators_on_masked_tasks_are_means_of_single_tasks(estimator):
    tasks, net = _tasks(classes=False), _model("mlp")
    if estimator.nu == "auto":
        found = meta_gradient(estimator, net, F.mse_loss, TaskBatch.padded(tasks), task_chunk=1)
        estimator = Symmetric(SOLVER, LAM, found.nu)
    else:
        found = meta_gradient(estimator, net, F.mse_loss, TaskBatch.padded(tasks))
    alone = [meta_gradient(estimator, net, F.mse_loss, TaskBatch.padded([task])) for task in tasks]
    assert all(batch.support_mask is None for batch in map(TaskBatch.padded, ([task] for task in tasks)))
    torch.testing.assert_close(_flat(found), torch.stack([_flat(each) for each in alone]).mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_is_the_label_that_cross_entropy_ignores(dtype):
    tasks, net = _tasks(classes=True), _model("mlp").to(dtype)
    batch = TaskBatch.padded(tasks).to(dtype=dtype)
    ignored = TaskBatch(
        batch.support_x,
        batch.support_y.masked_fill(~batch.support_mask, -100),
        batch.query_x,
        batch.query_y.masked_fill(~batch.query_mask, -100),
    )
    first, second = (meta_gradient(ESTIMATORS["symmetric"], net, F.cross_entropy, b) for b in (batch, ignored))
    assert torch.equal(_flat(first), _flat(second))
    assert first.engine == second.engine  # the compiled kernel, too
    learner = Learner(net, F.cross_entropy)
    assert isinstance(learner.row_loss(batch.query_y, mask=batch.query_mask), CrossEntropy)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("losses", [("mse", "own"), ("own", "mse"), ("cross-entropy", "smoothed")])
def test_the_support_set_has_a_loss_of_its_own(losses, masked):
    (support_loss, classes), (query_loss, _) = (KINDS[name] for name in losses)
    tasks, net = _tasks(classes), _model("mlp")
    if not masked:
        tasks = [(task[0][:2], task[1][:2], task[2][:4], task[3][:4]) for task in tasks]
    for method, estimator in ESTIMATORS.items():
        result = meta_gradient(estimator, net, query_loss, TaskBatch.padded(tasks), support_loss=support_loss)
        wanted = _wanted(method, net, support_loss, query_loss, tasks)
        torch.testing.assert_close(_flat(result), wanted, rtol=1e-8, atol=1e-11)
        other = meta_gradient(estimator, net, query_loss, TaskBatch.padded(tasks))
        assert not torch.allclose(_flat(result), _flat(other))


def test_masks_are_checked():
    x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    there = torch.ones(2, 5, dtype=torch.bool)
    for bad, text in (
        (there[:, :4], r"support_mask=torch.bool \(2, 4\) on cpu: takes torch.bool \(2, 5\)"),
        (there.float(), r"support_mask=torch.float32 \(2, 5\) on cpu: takes torch.bool"),
        (there & torch.tensor([[True], [False]]), "support_mask=a task without examples: takes at least one"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            TaskBatch(x, y, x, y, support_mask=bad)
    batch = TaskBatch(x, y, x, y, query_mask=there)
    assert batch[1:].query_mask.shape == (1, 5)
    assert batch.pooled().support_mask.shape == (2, 10)
    assert batch.to(dtype=torch.float64).query_mask.dtype == torch.bool


def test_what_masks_do_not_go_with_is_refused():
    batch = TaskBatch.padded(_tasks(classes=True))
    with pytest.raises(ValueError, match=r"^tasks=masks: takes tasks of equal numbers .*, for a solver that draws"):
        meta_gradient(Reptile(GradientDescent(2, LR, batch=2)), _model("mlp"), F.cross_entropy, batch)

    class Joint(PlainMLP):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(ValueError, match=r"^tasks=masks: takes tasks .*, for a model whose examples interact"):
        meta_gradient(ESTIMATORS["symmetric"], Joint().double(), F.cross_entropy, batch)


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        (
            1,
            torch.zeros(3, dtype=torch.long),
            r"support_y=\[2, 3\] examples a task: takes as many as support_x: \[2, 4\]",
        ),
        (3, torch.zeros(2, dtype=torch.long), r"query_y=\[5, 2\] examples a task: takes as many as query_x: \[5, 1\]"),
        (0, torch.zeros(4, 7), r"support_x=.*\[2, \*\[3\]\], .*\[4, \*\[7\]\]: takes the same type and shape"),
        (2, torch.zeros(1, 3).double(), r"query_x=.*float32.*float64.*: takes the same type and shape"),
        (3, torch.zeros(1), r"query_y=.*: takes the same type and shape of an example in every task"),
    ],
)
def test_tasks_that_do_not_belong_together_are_refused(part, wrong, message):
    """Lengths, too, where the longest labels are as many as the longest inputs."""

    def task(support, query):
        labels = [torch.zeros(count, dtype=torch.long) for count in (support, query)]
        return [torch.zeros(support, 3), labels[0], torch.zeros(query, 3), labels[1]]

    tasks = [task(2, 5), task(4, 1)]
    assert TaskBatch.padded(tasks).support_mask.tolist() == [[True, True, False, False], [True] * 4]
    tasks[1][part] = wrong
    with pytest.raises(ValueError, match=message):
        TaskBatch.padded(tasks)
    with pytest.raises(ValueError, match=r"^support_x=a task without examples: takes at least one"):
        TaskBatch.padded([task(0, 5), task(4, 1)])
