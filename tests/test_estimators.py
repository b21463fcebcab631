"""Each estimator against something computed another way, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NewtonSolver, PlainMLP, dense_meta_gradient, newton, plain_losses, relative_error, tasks_of

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.estimators import (
    FOMAML,
    IMAML,
    MAML,
    Central,
    Exact,
    FiniteDifference,
    Forward,
    NotConverged,
    Reptile,
    Symmetric,
    estimate,
)
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import BarzilaiBorwein, GradientDescent, NewtonCG
from fobmaml.tasks import MNIST1D

LAM = 0.7
FINITE_DIFFERENCES = {"forward": Forward, "symmetric": Symmetric, "central4": Central}
ORDER = {"forward": 1, "symmetric": 2, "central4": 4}


def _cnn(tasks: int = 3, width: int = 4, seed: int = 0, source: MNIST1D | None = None) -> tuple[Learner, TaskBatch]:
    torch.manual_seed(seed)
    learner = Learner(CNN1d((40,), 5, width=width).double(), F.cross_entropy)
    batch = (source or MNIST1D()).sample("train", tasks, torch.Generator().manual_seed(seed))
    return learner, batch


@pytest.mark.parametrize("kind", ["logistic", "least_squares"])
def test_exact_and_imaml_are_the_dense_formula(kind):
    learner, tasks = tasks_of(kind)
    wanted = dense_meta_gradient(learner, tasks, LAM)
    converged = BarzilaiBorwein(steps=2000, tol=1e-12)
    for estimator in (Exact(converged, LAM, tol=1e-10), IMAML(converged, LAM, cg_steps=100, cg_tol=1e-12)):
        found = estimator(learner, learner.theta(), tasks).gradients
        for task in range(len(tasks)):
            assert relative_error(found[task], wanted[task]) < 1e-6


def test_imaml_is_the_dense_formula_where_the_solver_stopped(mnist1d):
    """On the CNN, at a φ that is no minimiser: the linear algebra alone."""
    learner, tasks = _cnn(source=mnist1d)
    estimator = IMAML(GradientDescent(steps=3, lr=0.1), lam=5.0, cg_steps=500, cg_tol=1e-12)
    phi = estimator.adapt(learner, learner.theta(), tasks).phi
    wanted = dense_meta_gradient(learner, tasks, 5.0, at=phi)
    assert relative_error(estimator(learner, learner.theta(), tasks).gradients, wanted) < 1e-9


def test_exact_on_the_cnn_is_the_dense_formula(mnist1d):
    learner, tasks = _cnn(tasks=2, source=mnist1d)
    estimator = Exact(NewtonCG(tol=1e-9), 2.0, tol=1e-9)
    result = estimator(learner, learner.theta(), tasks)
    phi = result.adapted().phi
    for task in range(2):  # φ is stationary by the plain module's own gradient
        support, _ = plain_losses(learner, tasks, task)
        gradient = torch.func.grad(support)(phi[task]) + 2.0 * (phi[task] - learner.theta())
        assert gradient.norm() < 1e-8
    assert relative_error(result.gradients, dense_meta_gradient(learner, tasks, 2.0, at=phi)) < 1e-6


@pytest.mark.parametrize(("lam", "momentum"), [(0.0, 0.0), (0.0, 0.5), (0.4, 0.0), (0.4, 0.5)])
def test_maml_is_plain_autograd(mnist1d, lam, momentum):
    learner, tasks = _cnn(source=mnist1d)
    steps, lr = 5, 0.1
    found = MAML(GradientDescent(steps, lr, momentum), lam)(learner, learner.theta(), tasks)
    for task in range(len(tasks)):
        support, query = plain_losses(learner, tasks, task)
        theta = learner.theta().requires_grad_()
        phi, velocity = theta, torch.zeros_like(theta)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(support(phi), phi, create_graph=True)
            velocity = momentum * velocity + gradient + lam * (phi - theta)
            phi = phi - lr * velocity
        (wanted,) = torch.autograd.grad(query(phi), theta)
        assert relative_error(found.gradients[task], wanted) < 1e-9
        assert relative_error(found.adapted().phi[task], phi.detach()) < 1e-12


def test_fomaml_and_reptile_are_their_formulas(mnist1d):
    learner, tasks = _cnn(source=mnist1d)
    solver = GradientDescent(steps=4, lr=0.1)
    for task in range(len(tasks)):
        support, query = plain_losses(learner, tasks, task)
        phi = learner.theta()
        for _ in range(4):
            phi = phi - 0.1 * torch.func.grad(support)(phi)
        fomaml = FOMAML(solver)(learner, learner.theta(), tasks).gradients[task]
        reptile = Reptile(solver, data="support")(learner, learner.theta(), tasks).gradients[task]
        assert relative_error(fomaml, torch.func.grad(query)(phi)) < 1e-10
        assert relative_error(reptile, learner.theta() - phi) < 1e-10


def test_perturbed_problems_are_solved_with_the_query_loss():
    """Forward's two solutions against Newton's on the perturbed losses, written out."""
    learner, tasks = tasks_of("logistic")
    nu, theta = 0.3, learner.theta()
    found = Forward(NewtonSolver(), LAM, nu)(learner, theta, tasks).gradients
    for task in range(len(tasks)):
        support, query = plain_losses(learner, tasks, task)

        def objective(p, weight, support=support, query=query):
            return support(p) + weight * query(p) + 0.5 * LAM * (p - theta).square().sum()

        phi_nu, phi_0 = (newton(lambda p, w=w: objective(p, w), theta) for w in (nu, 0.0))
        assert relative_error(found[task], -LAM * (phi_nu - phi_0) / nu) < 1e-9


@pytest.mark.parametrize("kind", FINITE_DIFFERENCES)
def test_an_envelope_adds_the_gradient_of_the_inner_problems_minimum(kind):
    """α λ(θ − φ*), φ* by Newton's method on the plain losses: exactly where zero is an offset, else interpolated."""
    learner, tasks = tasks_of("logistic")
    theta, alpha = learner.theta(), 3.0

    def added(nu: float) -> torch.Tensor:
        one, other = (
            FINITE_DIFFERENCES[kind](NewtonSolver(), LAM, nu, envelope=a)(learner, theta, tasks).gradients
            for a in (alpha, 0.0)
        )
        return one - other

    wanted = []
    for task in range(len(tasks)):
        support, _ = plain_losses(learner, tasks, task)
        phi = newton(lambda p, support=support: support(p) + 0.5 * LAM * (p - theta).square().sum(), theta)
        wanted.append(alpha * LAM * (theta - phi))
    coarse, fine = (relative_error(added(nu), torch.stack(wanted)) for nu in (0.1, 0.05))
    if kind == "forward":
        assert max(coarse, fine) < 1e-9
    else:
        assert coarse / fine == pytest.approx(2 ** ORDER[kind], rel=0.15)
        assert fine < 1e-2


def test_central_weights():
    assert Central(GradientDescent(), order=4).stencil == pytest.approx({1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12})
    assert Symmetric(GradientDescent()).stencil == {1: 0.5, -1: -0.5}
    for order in (2, 4, 6, 8):  # exact on polynomials up to the order: Σ w o = 1, Σ w oᵏ = 0 for the others
        stencil = Central(GradientDescent(), order=order).stencil
        for power in range(order + 1):
            assert sum(w * o**power for o, w in stencil.items()) == pytest.approx(float(power == 1), abs=1e-9)


def _slope(x, y) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@pytest.mark.parametrize("kind", ["logistic", "least_squares"])
@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_error_falls_with_nu_at_the_estimators_order(kind, name):
    learner, tasks = tasks_of(kind)
    wanted = dense_meta_gradient(learner, tasks, LAM)
    nus = {
        "forward": np.geomspace(1e-5, 1e-2, 6),
        "symmetric": np.geomspace(1e-3, 3e-2, 6),
        "central4": np.geomspace(1e-2, 6e-2, 6),
    }[name]
    errors = [
        relative_error(
            FINITE_DIFFERENCES[name](NewtonSolver(), LAM, nu)(learner, learner.theta(), tasks).gradients, wanted
        )
        for nu in nus
    ]
    assert _slope(nus, errors) == pytest.approx(ORDER[name], abs=0.1)


@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_error_falls_with_the_solvers_precision_at_the_theorys_rate(name):
    """With ν ∝ δ^{1/(p+1)}, the bias is O(δ^{p/(p+1)}): 1/2, 2/3, 4/5, over six decades of δ."""
    learner, tasks = tasks_of("logistic", count=8)
    wanted = dense_meta_gradient(learner, tasks, LAM)
    p = ORDER[name]
    deltas = np.geomspace(1e-11, 1e-5, 7)
    errors = []
    for delta in deltas:
        estimator = FINITE_DIFFERENCES[name](NewtonSolver(delta), LAM, float(delta ** (1 / (p + 1))))
        errors.append(relative_error(estimator(learner, learner.theta(), tasks).gradients, wanted))
    assert _slope(deltas, errors) == pytest.approx(p / (p + 1), abs=0.05)


def test_fomaml_and_reptile_keep_their_bias():
    """However exact the inner solve, the first-order methods stay away from the meta-gradient."""
    learner, tasks = tasks_of("logistic")
    wanted = dense_meta_gradient(learner, tasks, LAM).mean(0)
    for kind in (FOMAML, Reptile):
        found = kind(NewtonSolver(), LAM)(learner, learner.theta(), tasks).gradients.mean(0)
        assert torch.cosine_similarity(found, wanted, dim=0) < 0.995


@pytest.mark.parametrize("trained", [False, True])
def test_symmetric_points_along_the_exact_gradient_on_mnist1d(mnist1d, trained):
    learner, tasks = _cnn(tasks=4, width=16, source=mnist1d)
    theta = learner.theta()
    if trained:  # some way along a training path, where the losses are curved
        for step in range(60):
            batch = mnist1d.sample("train", 8, torch.Generator().manual_seed(step))
            theta = theta - 0.2 * torch.nn.functional.normalize(
                estimate(FOMAML(GradientDescent(5, 0.1)), learner, theta, batch, diagnose=False).gradient, dim=0
            )
    exact = estimate(Exact(NewtonCG(), 2.0), learner, theta, tasks, diagnose=False).gradient
    solver = BarzilaiBorwein(steps=3000, tol=1e-9)
    found = estimate(Symmetric(solver, 2.0, 1e-2), learner, theta, tasks)
    assert found.residual.max() < 1e-8
    assert torch.cosine_similarity(found.gradient, exact, dim=0) > 0.999


ALL = [Forward, Symmetric, Central, MAML, FOMAML, Reptile, IMAML]


def test_exact_through_meta_gradient(mnist1d):
    learner, tasks = _cnn(source=mnist1d)
    estimator = Exact(NewtonCG(), 2.0)
    found = fobmaml.meta_gradient(estimator, learner.model, F.cross_entropy, tasks)
    phi = estimator.adapt(learner, learner.theta(), tasks).phi
    wanted = learner.unflatten(dense_meta_gradient(learner, tasks, 2.0, at=phi).mean(0))
    for name, value in found.gradient.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-9)
    assert found.residual.max() <= 1e-8


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("make", [lambda: CNN1d((40,), 5, width=4), PlainMLP, lambda: MLP((40,), 5, 6, 1)])
def test_meta_gradient_of_any_module(mnist1d, kind, make):
    torch.manual_seed(0)
    model = make().double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tasks = mnist1d.sample("train", 5, torch.Generator().manual_seed(1))
    estimator = kind(GradientDescent(steps=3, lr=0.1))
    result = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks)
    chunked = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks, task_chunk=2)
    singles = [fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks[i : i + 1]) for i in range(5)]
    assert list(result.gradient) == [name for name, p in model.named_parameters() if p.requires_grad]
    for name, value in result.gradient.items():
        assert value.shape == before[name].shape
        torch.testing.assert_close(value, chunked.gradient[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(value, sum(s.gradient[name] for s in singles) / 5, rtol=1e-9, atol=1e-11)
        assert torch.equal(before[name], dict(model.named_parameters())[name])
    # what it reports, by hand: the first task's adapted parameters, loss and residual
    phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    theta = {name: p.detach() for name, p in phi.items()}
    lam = estimator.lam

    def inner_gradient():
        loss = F.cross_entropy(torch.func.functional_call(model, phi, (tasks.support_x[0],)), tasks.support_y[0])
        gradients = torch.autograd.grad(loss, list(phi.values()))
        return {n: g + lam * (phi[n] - theta[n]).detach() for (n, g) in zip(phi, gradients, strict=True)}

    for _ in range(3):
        phi = {n: (phi[n] - 0.1 * g).detach().requires_grad_() for n, g in inner_gradient().items()}
    query = F.cross_entropy(torch.func.functional_call(model, phi, (tasks.query_x[0],)), tasks.query_y[0])
    assert float(result.query_loss[0]) == pytest.approx(query.item(), rel=1e-10)
    residual = torch.cat([g.flatten() for g in inner_gradient().values()]).norm()
    assert float(result.residual[0]) == pytest.approx(float(residual), rel=1e-8)


def test_float32_agrees_with_float64(mnist1d):
    """The default setting of the finite differences does not drown in rounding."""
    learner, tasks = _cnn(tasks=8, width=16, source=mnist1d)
    single = Learner(CNN1d((40,), 5, width=16), F.cross_entropy)
    theta = learner.theta()
    for kind in ALL:
        estimator = kind(GradientDescent())
        precise = estimate(estimator, learner, theta, tasks, diagnose=False).gradient
        rough = estimate(estimator, single, theta.float(), tasks.to(dtype=torch.float32), diagnose=False).gradient
        assert relative_error(rough.double(), precise) < 2e-3


def test_exact_says_why_it_is_not_available(mnist1d):
    learner, tasks = _cnn(source=mnist1d)
    with pytest.raises(NotConverged, match=r"inner solve: 3 of 3 tasks stopped at a residual of up to .* above 1e-08"):
        Exact(NewtonCG(steps=1), 0.5)(learner, learner.theta(), tasks)


def test_exact_refuses_a_saddle_point():
    """A support loss cos(output) is stationary at output 0, and curved downwards: no minimiser, no meta-gradient."""
    model = MLP((1,), 1, depth=0).double()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    learner = Learner(model, lambda output, is_support: (is_support * output.cos() + (1 - is_support) * output).mean())
    tasks = TaskBatch(x, torch.ones_like(x), x, torch.zeros_like(x))
    with pytest.raises(NotConverged, match="1 of 1 tasks have negative curvature"):
        Exact(BarzilaiBorwein(), 0.1)(learner, learner.theta(), tasks)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda s: Symmetric(s, lam=0.0), "lam=0.0: takes a finite number above 0"),
        (lambda s: Symmetric(s, lam=-1), "lam=-1: takes a finite number above 0"),
        (lambda s: Symmetric(s, nu=0), "nu=0: takes a finite number above 0"),
        (lambda s: Symmetric(s, nu=float("nan")), "nu=nan: takes a finite number above 0"),
        (lambda s: Symmetric(s, nu="x"), "nu=x: takes a finite number above 0"),
        (lambda s: Central(s, order=3), "order=3: takes an even number"),
        (lambda s: FiniteDifference(s, 1.0, 0.1, (0, 1), (1.0, 1.0)), "weights="),
        (lambda s: MAML(s, lam=-1), "lam=-1: takes a finite number of at least 0"),
        (lambda s: IMAML(s, cg_steps=0), "cg_steps=0: takes a whole number of at least 1"),
        (lambda s: MAML(BarzilaiBorwein()), "solver=BarzilaiBorwein: takes a solver with differentiable steps"),
        (lambda s: FOMAML("gd"), "solver=str: takes"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        make(GradientDescent())
