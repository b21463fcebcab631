"""The tangent of the solver's steps, against forward-mode autodiff of the same steps written out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PlainMLP, plain_losses, relative_error, tasks_of
from torch import Tensor

from fobmaml import Learner, TaskBatch
from fobmaml.estimators import Symmetric, Tangent, estimate
from fobmaml.measure import peak_bytes
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import Adam, BarzilaiBorwein, GradientDescent
from fobmaml.tasks import MNIST1D
from fobmaml.tasks.draws import drawn

LAM = 0.7


def _learner(make: Callable[[], torch.nn.Module], engine: str = "auto") -> Learner:
    torch.manual_seed(0)
    return Learner(make().double(), F.cross_entropy, engine)


def _tasks(source: MNIST1D, count: int = 2) -> TaskBatch:
    return source.sample("train", count, torch.Generator().manual_seed(0)).keyed(torch.Generator().manual_seed(1))


def _written_out(learner: Learner, tasks: TaskBatch, solver: GradientDescent) -> Tensor:
    """−λ dφ_K/dν at ν = 0 by torch.func.jvp of a plain loop, task by task, [T, P]."""
    theta, rows = learner.theta(), []
    sizes = (tasks.support_x.shape[1], solver.batch or 99), (tasks.query_x.shape[1], solver.query_batch or 99)
    for task in range(len(tasks)):
        draws = [
            drawn(tasks.keys[task : task + 1], count, size, solver.steps, stream)[0]
            for stream, (count, size) in enumerate(sizes)
        ]

        def adapted(nu: Tensor, task: int = task, draws: list[Tensor] = draws) -> Tensor:
            phi, velocity = theta, torch.zeros_like(theta)
            for step, rate in enumerate(solver.rates):
                s, q = (each[step] for each in draws)
                one = TaskBatch(
                    tasks.support_x[task : task + 1, s],
                    tasks.support_y[task : task + 1, s],
                    tasks.query_x[task : task + 1, q],
                    tasks.query_y[task : task + 1, q],
                )
                support, query = plain_losses(learner, one, 0)
                gradient = torch.func.grad(lambda p, f=support, g=query: f(p) + nu * g(p))(phi)
                velocity = solver.momentum * velocity + gradient + LAM * (phi - theta)
                phi = phi - rate * velocity
            return phi

        at, along = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        rows.append(-LAM * torch.func.jvp(adapted, (at,), (along,))[1])
    return torch.stack(rows)


MODELS = {
    "cnn": lambda: CNN1d((40,), 5, width=4),
    "mlp": lambda: MLP((40,), 5, 6, 1),
    "linear": lambda: MLP((40,), 5, depth=0),
    "plain module": PlainMLP,
}
WAYS = {"products": 1e-10, "differences": 1e-8}
"""And what they may be wrong by."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("model", MODELS)
def test_tangent_is_forward_mode_autodiff(mnist1d, model, momentum, way):
    learner, tasks = _learner(MODELS[model]), _tasks(mnist1d)
    solver = GradientDescent(5, 0.1, momentum)
    found = Tangent(solver, LAM, way)(learner, learner.theta(), tasks)
    assert relative_error(found.gradients, _written_out(learner, tasks, solver)) < WAYS[way]
    assert torch.allclose(found.adapted().phi, Symmetric(solver, LAM).adapt(learner, learner.theta(), tasks).phi)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make",
    [
        lambda size: GradientDescent(4, 0.1, batch=7, query_batch=9),
        lambda size: GradientDescent(4, 0.1, 0.5, batch=7),
        lambda size: GradientDescent(4, 0.1, query_batch=9),
        lambda size: GradientDescent(3, [0.2, 0.1, 0.05], 0.3),
        lambda size: GradientDescent(4, torch.linspace(0.01, 0.2, size).expand(4, -1)),
    ],
    ids=["both batches", "support batches", "query batches", "a rate each step", "a rate each parameter"],
)
def test_tangent_of_batches_and_rates(mnist1d, make, way):
    learner, tasks = _learner(MODELS["cnn"]), _tasks(mnist1d)
    solver = make(learner.parameter_count)
    found = Tangent(solver, LAM, way)(learner, learner.theta(), tasks).gradients
    assert relative_error(found, _written_out(learner, tasks, solver)) < WAYS[way]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["autograd", "loop", "stacked"])
def test_tangent_in_every_engine(mnist1d, engine, way):
    learner, tasks = _learner(MODELS["cnn"], engine), _tasks(mnist1d)
    solver = GradientDescent(3, 0.1)
    found = Tangent(solver, LAM, way)(learner, learner.theta(), tasks).gradients
    assert relative_error(found, _written_out(learner, tasks, solver)) < WAYS[way]
    assert learner.used == engine


@pytest.mark.parametrize(("way", "error"), [("products", 1e-5), ("differences", 1e-3)])
def test_tangent_in_single_precision(mnist1d, way, error):
    double, tasks = _learner(MODELS["cnn"]), _tasks(mnist1d, 4)
    solver, theta = GradientDescent(10, 0.1), double.theta()
    single = Learner(CNN1d((40,), 5, width=4), F.cross_entropy)
    wanted = Tangent(solver, LAM, "products")(double, theta, tasks).gradients
    found = Tangent(solver, LAM, way)(single, theta.float(), tasks.to(dtype=torch.float32)).gradients
    assert relative_error(found.double(), wanted) < error


@pytest.mark.parametrize("kind", ["logistic", "least_squares"])
def test_symmetric_tends_to_the_tangent(kind):
    learner, tasks = tasks_of(kind)
    solver, theta = GradientDescent(10, 0.1), learner.theta()
    limit = estimate(Tangent(solver, LAM, "products"), learner, theta, tasks).gradient
    nus = np.geomspace(3e-3, 3e-2, 5)
    errors = [relative_error(estimate(Symmetric(solver, LAM, nu), learner, theta, tasks).gradient, limit) for nu in nus]
    assert np.polyfit(np.log(nus), np.log(errors), 1)[0] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("way", WAYS)
def test_tangents_memory_is_flat_in_the_steps(mnist1d, way):
    learner, tasks = _learner(lambda: CNN1d((40,), 5, width=8)), _tasks(mnist1d, 4)
    peaks = [
        peak_bytes(
            lambda k=k: estimate(Tangent(GradientDescent(k), LAM, way), learner, learner.theta(), tasks, diagnose=False)
        )
        for k in (2, 20)
    ]
    assert peaks[1] <= 1.01 * peaks[0]


def test_half_precision_takes_products(mnist1d):
    learner = Learner(MLP((40,), 5, 6, 1).to(torch.bfloat16), F.cross_entropy)
    tasks = _tasks(mnist1d).to(dtype=torch.bfloat16)
    solver, theta = GradientDescent(2, 0.1), learner.theta()
    assert torch.equal(*(Tangent(solver, way=way)(learner, theta, tasks).gradients for way in ("auto", "products")))
    with pytest.raises(ValueError, match=r"^model=torch.bfloat16: takes float32 or float64 parameters where way="):
        Tangent(solver, way="differences")(learner, theta, tasks)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda s: Tangent(s, lam=0.0), "lam=0.0: takes a finite number above 0"),
        (lambda s: Tangent(s, way="exact"), "way=exact: takes one of auto, differences, products"),
        (lambda s: Tangent(BarzilaiBorwein()), "solver=BarzilaiBorwein: takes one whose steps are linear in gradients"),
        (lambda s: Tangent(Adam()), "solver=Adam: takes one whose steps are linear in gradients"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        make(GradientDescent())
