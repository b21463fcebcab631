"""ν by measurement: against known errors, and against the best of a grid."""

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, tasks_of

import fobmaml
from fobmaml import Learner
from fobmaml.estimators import Central, Exact, Forward, Symmetric, Tangent, estimate
from fobmaml.estimators.nu import balanced_nu
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import GradientDescent, Inexact, NewtonCG
from fobmaml.tasks import Sinusoid

KINDS = {"forward": Forward, "symmetric": Symmetric, "central4": Central}
GRID = [10.0**exponent for exponent in range(-7, 1)]


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize("largest", [5.0, 0.3, 1e-3])
@pytest.mark.parametrize("eps", [1e-7, 1e-16])
def test_known_errors_are_balanced(order, largest, eps):
    """g = (1, (ν/largest)^p, r/ν): the least of the last two is at ν = (r largest^p / p)^{1/(p+1)}."""
    rounding = 3 * eps

    def measured(nus):
        return [torch.tensor([[1.0, (nu / largest) ** order, rounding / nu]], dtype=torch.float64) for nu in nus]

    for tasks in (1, 100):
        wanted = (rounding / math.sqrt(tasks) * largest**order / order) ** (1 / (order + 1))
        found = balanced_nu(measured, order, eps, tasks)
        if wanted < 0.02:  # else rounding is part of what halving ν shows
            assert found == pytest.approx(wanted, rel=0.1)
        assert 0.05 < found < 2 * wanted if wanted > 0.1 else wanted / 2 < found < 2 * wanted


def test_the_hardest_task_and_the_typical_noise_count():
    """Of two tasks, one has all of the truncation, and one a noise 10,000 times the other's."""

    def measured(nus):
        return [torch.tensor([[1.0, 0.0, 1e-14 / nu], [1.0, nu**2, 1e-10 / nu]], dtype=torch.float64) for nu in nus]

    wanted = (1e-12 / math.sqrt(2) / (2 * 0.5)) ** (1 / 3)
    assert balanced_nu(measured, 2, 1e-16, 2) == pytest.approx(wanted, rel=1e-3)


def test_no_error_at_all_is_the_largest_nu():
    assert balanced_nu(lambda nus: [torch.ones(1, 2) for _ in nus], 2, 1e-7, 1) == 1.0


def _case(name, mnist1d):
    torch.manual_seed(0)
    if name == "logistic":
        learner, tasks = tasks_of("logistic")
        return learner.model.float(), F.cross_entropy, tasks, 0.1
    source = Sinusoid() if name == "sinusoid" else mnist1d
    model = MLP((1,), 1, 16, 2) if name == "sinusoid" else CNN1d((40,), 5, width=8)
    tasks = source.sample("train", 4, torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    return model, source.loss_fn, tasks, 0.01 if name == "sinusoid" else 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["logistic", "sinusoid", "mnist1d"])
def test_auto_is_near_the_best_of_a_grid(mnist1d, name, dtype, kind):
    """Of the error that ν makes, against the limit at small ν. Three times the best, and rounding is random."""
    model, loss_fn, tasks, lr = _case(name, mnist1d)
    single = Learner(model, loss_fn)
    double = single.in_double()
    solver = GradientDescent(10, lr)
    limit = estimate(Tangent(solver, way="products"), double, double.theta(), tasks, diagnose=False).gradient
    learner, tasks = (single, tasks.to(dtype=dtype)) if dtype == torch.float32 else (double, tasks)

    def error(nu):
        found = estimate(KINDS[kind](solver, nu=nu), learner, learner.theta(), tasks, diagnose=False)
        return relative_error(found.gradient.double(), limit)

    assert error("auto") < 3 * min(map(error, GRID))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [1e-10, 1e-6])
def test_auto_takes_of_a_solver_s_error_what_differences_keep(kind, tol):
    """Most of what is left where NewtonCG stops is the same at every ν. Against the exact meta-gradient."""
    learner, tasks = tasks_of("logistic")
    theta, solver = learner.theta(), NewtonCG(tol=tol)
    exact = estimate(Exact(NewtonCG(tol=1e-12), 2.0, 1e-11), learner, theta, tasks).gradient

    def error(nu):
        return relative_error(estimate(KINDS[kind](solver, 2.0, nu), learner, theta, tasks).gradient, exact)

    assert error("auto") < 3 * min(map(error, GRID))


def test_nu_is_a_function_of_parameters_and_tasks_and_can_be_read(mnist1d):
    torch.manual_seed(0)
    model = CNN1d((40,), 5, width=4)
    tasks = mnist1d.sample("train", 4, torch.Generator().manual_seed(0))
    estimator = Symmetric(GradientDescent(), nu="auto")
    first, again, chunked = (
        fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks, task_chunk=chunk) for chunk in (None, None, 1)
    )
    assert first.nu == again.nu == chunked.nu
    assert 1e-4 < first.nu < 0.3
    assert estimator.nu == "auto"
    assert all(torch.equal(first.gradient[name], again.gradient[name]) for name in first.gradient)
    fixed = fobmaml.meta_gradient(Symmetric(GradientDescent(), nu=first.nu), model, F.cross_entropy, tasks, None)
    assert all(torch.equal(first.gradient[name], fixed.gradient[name]) for name in first.gradient)
    assert fobmaml.meta_gradient(Tangent(GradientDescent()), model, F.cross_entropy, tasks).nu is None


@pytest.mark.parametrize("kind", KINDS)
def test_orders(kind):
    assert KINDS[kind](GradientDescent()).order == {"forward": 1, "symmetric": 2, "central4": 4}[kind]


def test_bad_nu():
    with pytest.raises(ValueError, match=r"^nu=best: takes a finite number above 0, or auto$"):
        Symmetric(GradientDescent(), nu="best")


def test_nu_auto_on_the_command_line(run_train, tmp_path):
    done = run_train("estimator.nu=auto", "steps=2", "width=4", "meta_batch=2", "eval.tasks=2", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < event["estimator/nu"] <= 1 for event in events if "train/loss" in event)
    assert any("train/loss" in event for event in events)


@pytest.mark.parametrize("kind", [Forward, Symmetric, Central])
@pytest.mark.parametrize("delta", [1e-6, 1e-4, 1e-2])
def test_auto_sees_truncation_through_a_solver_s_own_error(kind, delta):
    """Errors that offsets have not in common hide it at small ν."""
    learner, tasks = tasks_of("logistic", 8)
    theta = learner.theta()
    wanted = estimate(Exact(NewtonCG(tol=1e-12), 1.0), learner, theta, tasks).gradient

    def error(nu):
        found = [
            estimate(kind(Inexact(delta, seed), 1.0, nu), learner, theta, tasks, diagnose=False).gradient - wanted
            for seed in range(8)
        ]
        return math.sqrt(statistics.fmean(float(each.square().sum()) for each in found))

    assert error("auto") < 2 * min(error(10.0 ** (place / 2)) for place in range(-10, 1))
