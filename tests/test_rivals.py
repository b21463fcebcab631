"""The rivals as their authors wrote them, against the same written plainly: dense Hessians, torch's autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from test_batches import LAM, SOLVERS, K, Plain
from test_batches import _model as model_of
from test_batches import _tasks as tasks_of
from test_training import meta_training
from torch import Tensor

import fobmaml
from fobmaml import Learner
from fobmaml.estimators import FOMAML, IMAML, MAML
from fobmaml.estimators.multi_step import step_weights
from fobmaml.measure import bias
from fobmaml.optim import SNGDM
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


def test_weights_fade_to_the_last_step():
    """As the authors' code has them: a list of equal ones, changed step by step."""
    for steps, epochs in ((1, 10), (4, 10), (5, 3), (10, 15)):
        for epoch in range(epochs + 2):
            weights = [1 / steps] * steps
            for i in range(steps - 1):
                weights[i] = max(weights[i] - epoch / steps / epochs, 0.03 / steps)
            weights[-1] = min(weights[-1] + epoch * (steps - 1) / steps / epochs, 1 - (steps - 1) * 0.03 / steps)
            if epoch >= epochs:
                weights = [0.0] * (steps - 1) + [1.0]
            found = step_weights(steps, epoch / epochs)
            assert found == pytest.approx(weights)
            assert sum(found) == pytest.approx(1.0)


class Path(Plain):
    """All of a task's φ₁, ..., φ_K, by rates [K, parameters], and what MAML's additions differentiate."""

    def path(self, theta: Tensor, rates: Tensor, lam: float, first_order: bool) -> list[Tensor]:
        t, i, s = self.tasks, self.task, self.solver
        seen = fobmaml.tasks.draws.drawn(t.keys, t.support_x.shape[1], s.batch or 99, s.steps)[i]
        phi, path = theta, []
        m, v = torch.zeros_like(theta), torch.zeros_like(theta)
        for k in range(s.steps):
            value = self.loss(phi, t.support_x[i, seen[k]], t.support_y[i, seen[k]])
            value = value + lam / 2 * (phi - theta).square().sum()
            (g,) = torch.autograd.grad(value, phi, create_graph=True)
            if isinstance(s, Adam):
                m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
                d = (m / (1 - s.beta1 ** (k + 1))) / ((v / (1 - s.beta2 ** (k + 1))).sqrt() + s.eps)
            else:
                m = s.momentum * m + g
                d = m
            phi = phi - rates[k] * (d.detach() if first_order else d)
            path.append(phi)
        return path

    def loss_along(self, theta, rates, weights, lam, first_order):
        return sum(
            w * self.query(phi) for w, phi in zip(weights, self.path(theta, rates, lam, first_order), strict=True)
        )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("solver", ["gd", "momentum", "steps", "moments"])
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4])
def test_maml_with_all_its_settings_is_plain_autograd(solver, progress, first_order, checkpoint):
    """By θ and by each rate, of the weighted losses of all steps, on batches."""
    model, tasks, solver = model_of(), tasks_of(2), SOLVERS[solver]
    learner = Learner(model, F.cross_entropy)
    theta = learner.theta()
    estimator = MAML(solver, LAM, checkpoint, multi_step=0.4, learn_lr=1.0, second_order_from=float(first_order))
    estimator.progress = progress
    (rates,) = estimator.variables(learner).values()
    assert rates.shape == (K, len(learner.shapes))
    assert torch.equal(rates, torch.tensor(list(solver.rates), dtype=torch.float64)[:, None].expand_as(rates))
    with torch.no_grad():
        rates += 0.02 * torch.randn(rates.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimator(learner, theta, tasks)
    solution = estimator.adapt(learner, theta, tasks)
    torch.testing.assert_close(found.adapted().displacement, solution.displacement, rtol=1e-12, atol=1e-13)
    sizes = torch.tensor([p.numel() for p in model.parameters()])
    for task in range(2):
        t, r = theta.clone().requires_grad_(), rates.detach().clone().requires_grad_()
        plain, expanded = Path(model, tasks, task, solver), r.repeat_interleave(sizes, dim=1)
        value = plain.loss_along(t, expanded, step_weights(K, progress / 0.4), LAM, first_order)
        by_theta, by_rate = torch.autograd.grad(value, (t, r))
        assert relative_error(found.gradients[task], by_theta) < 1e-9
        assert relative_error(found.variables["solver.lr"][task], by_rate) < 1e-9
        wanted = plain.path(t, expanded, LAM, first_order)[-1].detach()
        assert relative_error(solution.phi[task], wanted) < 1e-12


@pytest.mark.parametrize("lam", [0.0, LAM])
@pytest.mark.parametrize("solver", ["gd", "momentum", "moments"])
def test_fomaml_sums_query_gradients(solver, lam):
    model, tasks, solver = model_of(), tasks_of(2), SOLVERS[solver]
    learner = Learner(model, F.cross_entropy)
    theta = learner.theta()
    estimator = FOMAML(solver, lam, multi_step=0.5)
    rates = torch.tensor(list(solver.rates), dtype=torch.float64)[:, None]
    for progress in (0.0, 0.3, 0.5, 1.0):
        estimator.progress = progress
        found = estimator(learner, theta, tasks).gradients
        for task in range(2):
            plain = Path(model, tasks, task, solver)
            wanted = torch.zeros_like(theta)
            path = plain.path(theta.clone().requires_grad_(), rates, lam, True)
            for weight, phi in zip(step_weights(K, progress / 0.5), path, strict=True):
                leaf = phi.detach().requires_grad_()
                wanted += weight * torch.autograd.grad(plain.query(leaf), leaf)[0]
            assert relative_error(found[task], wanted) < 1e-9


def test_progress_decides_what_is_returned():
    model, tasks = model_of(), tasks_of(2)
    learner = Learner(model, F.cross_entropy)
    theta = learner.theta()
    plain, first = (kind(GD)(learner, theta, tasks).gradients for kind in (MAML, FOMAML))
    estimator = MAML(GD, second_order_from=0.5)
    for progress, wanted in ((0.0, first), (0.49, first), (0.5, plain), (1.0, plain)):
        estimator.progress = progress
        torch.testing.assert_close(estimator(learner, theta, tasks).gradients, wanted)
    estimator = MAML(GD, multi_step=0.5)
    estimator.progress = 0.5
    torch.testing.assert_close(estimator(learner, theta, tasks).gradients, plain)


def test_rates_are_in_the_meta_gradient_a_mean_over_tasks():
    model, tasks = model_of(), tasks_of(3)
    learner = Learner(model, F.cross_entropy)
    estimator = MAML(GD, learn_lr=1.0)
    found = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks, task_chunk=2)
    each = estimator(learner, learner.theta(), tasks)
    torch.testing.assert_close(found.gradient["solver.lr"], each.variables["solver.lr"].mean(0))
    assert found.gradient.keys() == {*learner.shapes, "solver.lr"}
    assert fobmaml.meta_gradient(MAML(GD), model, F.cross_entropy, tasks).gradient.keys() == learner.shapes.keys()
    deeper = fobmaml.models.MLP((12,), 3, 6, 3).double()
    with pytest.raises(ValueError, match=r"^model=8 parameter tensors: takes 6, for which"):
        fobmaml.meta_gradient(estimator, deeper, F.cross_entropy, tasks)


def test_bias_of_learned_rates_is_against_the_steps_taken():
    model, tasks = model_of(), tasks_of(2)
    learner = Learner(model, F.cross_entropy)
    estimator = MAML(GD, learn_lr=1.0)
    (rates,) = estimator.variables(learner).values()
    with torch.no_grad():
        rates *= 0.5
    assert bias(estimator, learner, tasks).relative_error < 1e-10
    assert bias(MAML(GD, multi_step=1.0), learner, tasks).relative_error > 1e-2


def _training(mnist1d, steps=8, optimizer=torch.optim.Adam, **settings):
    settings = {"multi_step": 0.75, "learn_lr": 0.5, "second_order_from": 0.25} | settings
    torch.manual_seed(0)
    model = fobmaml.models.CNN1d((40,), 5, 4)
    estimator = MAML(GradientDescent(3, 0.1), **settings)
    return meta_training(model, mnist1d, estimator, optimizer, steps=steps, meta_batch=4, log_every=1)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, SNGDM])
def test_rates_are_trained_and_a_run_goes_on_with_them(mnist1d, optimizer):
    whole = _training(mnist1d, optimizer=optimizer)
    events = list(whole.train())
    (rates,) = whole.outer.variables.values()
    assert ((rates - 0.1).abs() > 1e-6).all()
    groups = whole.optimizer.param_groups
    assert groups[1]["params"] == [rates]
    assert groups[1]["initial_lr"] == 0.5 * groups[0]["initial_lr"]
    assert groups[1]["lr"] == pytest.approx(0.5 * groups[0]["lr"])

    first = _training(mnist1d, optimizer=optimizer)
    for _ in range(5):
        next(first.train())
    state = copy.deepcopy(first.state_dict())
    again = _training(mnist1d, optimizer=optimizer)
    again.load_state_dict(state)
    rest = list(again.train())
    assert torch.equal(again.outer.vector(), whole.outer.vector())
    for found, wanted in zip(rest, events[5:], strict=True):
        assert found["train/loss"] == wanted["train/loss"]

    still = _training(mnist1d, learn_lr=0.0, optimizer=optimizer)
    list(still.train())
    assert not still.outer.variables
    assert len(still.optimizer.param_groups) == 1
    assert still.state_dict()["variables"] == {}


def test_evaluation_uses_the_learned_rates(mnist1d):
    training = _training(mnist1d)
    tasks = training.placed(training.fixed("validation", 3))
    theta = training.learner.theta()
    before = training.estimator.adapt(training.learner, theta, tasks).displacement
    with torch.no_grad():
        training.outer.variables["solver.lr"].zero_()
        assert not training.estimator.adapt(training.learner, theta, tasks).displacement.any()
        training.outer.variables["solver.lr"].fill_(0.1)
    torch.testing.assert_close(training.estimator.adapt(training.learner, theta, tasks).displacement, before)
    assert before.any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MAML(GD, multi_step=-0.1), "multi_step=-0.1: takes a finite number of at least 0"),
        (lambda: MAML(GD, second_order_from="x"), "second_order_from=x: takes a finite number"),
        (
            lambda: MAML(GradientDescent(2, torch.ones(1, 3)), learn_lr=1.0),
            r"learn_lr=1.0: takes a solver.lr that is a",
        ),
        (lambda: FOMAML(NewtonCG(), multi_step=0.5), r"multi_step=0.5: takes a solver of a number of steps"),
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
