"""The rivals as their authors wrote them, against the same written plainly: dense Hessians, torch's autograd."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from test_batches import K, Plain
from test_batches import _model as model_of
from test_batches import _tasks as tasks_of
from torch import Tensor

from fobmaml import Learner
from fobmaml.estimators import IMAML
from fobmaml.solvers import Adam, GradientDescent, NewtonCG

GD = GradientDescent(K, 0.1)


def _hessian_and_slope(plain: Plain, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Of the support loss, dense, and of the query loss."""
    t, i = plain.tasks, plain.task
    hessian = torch.autograd.functional.hessian(lambda p: plain.loss(p, t.support_x[i], t.support_y[i]), phi)
    leaf = phi.clone().requires_grad_()
    return hessian, torch.autograd.grad(plain.query(leaf), leaf)[0]


@pytest.mark.parametrize("linear", ["cg", "minres"])
@pytest.mark.parametrize(("damping", "lam_damping"), [(0.0, 0.0), (1.0, 10.0), (0.5, 0.0)])
def test_imaml_solves_the_damped_system(linear, damping, lam_damping):
    model, tasks = model_of(), tasks_of(2)
    learner = Learner(model, F.cross_entropy)
    theta = learner.theta()
    found = IMAML(GD, 2.0, 300, 1e-13, damping, lam_damping, linear)(learner, theta, tasks).gradients
    for task in range(2):
        plain = Plain(model, tasks, task, GD)
        hessian, slope = _hessian_and_slope(plain, plain.solve(theta.requires_grad_(), lam=2.0).detach())
        matrix = (1 + damping) * torch.eye(len(theta)) + hessian / (2.0 + lam_damping)
        assert relative_error(found[task], torch.linalg.solve(matrix, slope)) < 1e-9


def test_minres_is_the_inverse_where_the_hessian_is_indefinite():
    model, tasks = model_of(), tasks_of(2)
    learner = Learner(model, F.cross_entropy)
    theta = 3 * learner.theta()
    lam = 1e-2
    estimate = IMAML(GD, lam, 2000, 1e-12, linear="minres")(learner, theta, tasks)
    assert estimate.linear.negative_curvature.all()
    assert (estimate.linear.relative_residual <= 1e-12).all()
    for task in range(2):
        plain = Plain(model, tasks, task, GD)
        hessian, slope = _hessian_and_slope(plain, plain.solve(theta.requires_grad_(), lam=lam).detach())
        assert torch.linalg.eigvalsh(hessian)[0] < -lam
        wanted = lam * torch.linalg.solve(hessian + lam * torch.eye(len(theta)), slope)
        assert relative_error(estimate.gradients[task], wanted) < 1e-6


def test_the_pull_back_is_one_step_on_the_proximal_term():
    model, tasks = model_of(), tasks_of(2)
    learner = Learner(model, F.cross_entropy)
    theta = learner.theta().requires_grad_()
    estimator = IMAML(GD, 2.0, damping=1.0, lam_damping=10.0, pull_back=True)
    solution = estimator.adapt(learner, theta, tasks)
    for task in range(2):
        free = Plain(model, tasks, task, GD).solve(theta, lam=0.0).detach()
        wanted = free - 0.1 * 2.0 * (free - theta.detach())
        assert relative_error(solution.phi[task], wanted) < 1e-12
    assert solution.problem.lam == 2.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IMAML(GD, damping=-1.0), "damping=-1.0: takes"),
        (lambda: IMAML(GD, lam_damping=float("nan")), "lam_damping=nan: takes"),
        (lambda: IMAML(GD, linear="lu"), "linear=lu: takes one of cg, minres"),
        (lambda: IMAML(GD, pull_back=1), "pull_back=1: takes true or false"),
        (lambda: IMAML(NewtonCG(), pull_back=True), "pull_back=True: takes a solver with one lr"),
        (lambda: IMAML(Adam(2, [0.1, 0.2]), pull_back=True), "pull_back=True: takes a solver with one lr"),
    ],
)
def test_bad_settings_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
