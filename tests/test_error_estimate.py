"""The estimate of bias against bias itself."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, tasks_of

from fobmaml import Learner
from fobmaml.estimators import FOMAML, Central, Forward, Symmetric, Tangent, estimate
from fobmaml.measure import bias, error_estimate
from fobmaml.models import CNN1d
from fobmaml.solvers import BarzilaiBorwein, GradientDescent, NewtonCG

SOLVERS = {
    "10 steps": GradientDescent(10, 0.1),
    "10 steps, momentum": GradientDescent(10, 0.1, 0.5),
    "60 steps": GradientDescent(60, 0.1),
    "newton": NewtonCG(),
    "bb": BarzilaiBorwein(tol=1e-5),
}
KINDS = {"forward": Forward, "symmetric": Symmetric, "central4": Central, "tangent": Tangent}


def _near(estimator, learner, tasks):
    found, wanted = error_estimate(estimator, learner, tasks), bias(estimator, learner, tasks)
    assert wanted.relative_error is not None
    assert wanted.relative_error / 3 < found.relative < 3 * wanted.relative_error
    return found


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_estimate_is_near_the_bias_of_logistic_regressions(kind, solver):
    if kind == "tangent" and solver in ("newton", "bb"):
        pytest.skip("tangent takes gradient descent")
    learner, tasks = tasks_of("logistic")
    found = _near(KINDS[kind](SOLVERS[solver], 2.0), learner, tasks)
    assert max(found.nu, found.solver) > 0.3 * found.relative
    assert error_estimate(KINDS[kind](SOLVERS[solver], 2.0), learner, tasks[:1]).relative is not None


@pytest.mark.parametrize("solver", ["10 steps", "newton"])
def test_estimate_is_near_the_bias_of_a_cnn(mnist1d, solver):
    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 5, width=4).double(), F.cross_entropy)
    tasks = mnist1d.sample("train", 2, torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    _near(Symmetric(SOLVERS[solver], 2.0), learner, tasks)


def test_shares_are_told_apart():
    """ν's share with a solver of ten steps is the distance to the tangent, the solver's that of the tangent to F."""
    learner, tasks = tasks_of("logistic")
    solver, theta = GradientDescent(10, 0.1), learner.theta()
    found = error_estimate(Symmetric(solver, 0.5, 0.3), learner, tasks)
    limit = estimate(Tangent(solver, 0.5, "products"), learner, theta, tasks).gradient
    returned = estimate(Symmetric(solver, 0.5, 0.3), learner, theta, tasks).gradient
    exact_norm = bias(Symmetric(solver, 0.5), learner, tasks).exact_norm
    assert found.nu == pytest.approx(relative_error(returned, limit) * float(limit.norm()) / exact_norm, rel=0.2)
    assert found.solver == pytest.approx(bias(Tangent(solver, 0.5), learner, tasks).relative_error, rel=0.2)


def test_no_limit_in_sight_is_said():
    """A step so long that gradient descent moves away from the solution."""
    learner, tasks = tasks_of("least_squares")
    found = error_estimate(Symmetric(GradientDescent(5, 1.2), 1.0), learner, tasks)
    assert found.relative is None
    assert found.reason == "more steps do not settle"


def test_others_are_refused():
    learner, tasks = tasks_of("logistic")
    with pytest.raises(ValueError, match=r"^estimator=FOMAML: takes forward, symmetric, central4 or tangent"):
        error_estimate(FOMAML(GradientDescent()), learner, tasks)


def test_estimate_on_the_command_line(run_train, tmp_path):
    settings = ("steps=1", "width=4", "meta_batch=1", "eval.tasks=0", "eval.validation_tasks=0", "bias.every=0")
    done = run_train(*settings, "error_estimate.every=1", "estimator=tangent", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.01 < summary["bias/estimate"] < 1
    assert summary["bias/estimate_nu"] < 1e-3 < summary["bias/estimate_solver"]
    assert "estimated without an exact solve" in done.stdout
    refused = run_train(*settings, "error_estimate.every=1", "estimator=fomaml")
    assert refused.returncode != 0
    assert "takes forward, symmetric, central4 or tangent" in refused.stderr
