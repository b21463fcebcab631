"""Inner steps on batches: what is drawn, and that meta-gradients are plain autograd's with the same draws."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor, nn
from torch.func import functional_call

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.estimators import FOMAML, MAML, Central, Forward, Reptile, Symmetric, estimate
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import Adam, GradientDescent, InnerProblem
from fobmaml.tasks.draws import drawn

LAM, NU, K = 0.5, 1e-2, 5


def _tasks(count: int = 3, dtype: torch.dtype = torch.float64) -> TaskBatch:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 17, 12, generator=g, dtype=dtype)
    y = torch.randint(3, (count, 17), generator=g)
    return TaskBatch(x[:, :7], y[:, :7], x[:, 7:], y[:, 7:]).keyed(g)


def _model(kind: type[nn.Module] = MLP, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind((12,), 3, 6, 2).to(dtype)


def test_every_example_is_drawn_once_before_any_is_drawn_again():
    keys = torch.arange(50)
    found = drawn(keys, 7, 3, 14)
    assert found.shape == (50, 14, 3)
    for epoch in found.flatten(1).split(7, dim=1):
        assert (epoch.sort(dim=1).values == torch.arange(7)).all()
    assert (drawn(keys, 4, 9, 2).sort(dim=2).values == torch.arange(4)).all()  # more than there are: all of them


def test_a_draw_depends_on_its_key_and_stream_alone():
    keys = torch.randint(2**62, (40,), generator=torch.Generator().manual_seed(0))
    whole = drawn(keys, 25, 10, 8)
    assert torch.equal(drawn(keys[7:9], 25, 10, 8), whole[7:9])
    assert torch.equal(drawn(keys, 25, 10, 3), whole[:, :3])
    assert len(whole[:, 0].unique(dim=0)) == 40
    assert (drawn(keys, 25, 10, 8, stream=1) != whole).any(dim=2).all()


def test_draws_are_uniform():
    """Each example first, and each pair in a batch, as often as chance has it: within five standard deviations."""
    count = 20000
    found = drawn(torch.arange(count), 6, 2, 6)
    for step in range(6):
        often = torch.bincount(found[:, step, 0], minlength=6) / count
        assert (often - 1 / 6).abs().max() < 5 * (1 / 6 * 5 / 6 / count) ** 0.5
    pairs = torch.bincount((found[:, 4] * torch.tensor([6, 1])).sum(1), minlength=36).view(6, 6) / count
    off_diagonal = pairs[~torch.eye(6, dtype=torch.bool)]
    assert (off_diagonal - 1 / 30).abs().max() < 5 * (1 / 30 / count) ** 0.5
    after, before = found[:, 3, 0], found[:, 0, 0]  # one order says nothing of the next
    assert ((after == before).double().mean() - 1 / 6).abs() < 5 * (1 / 6 * 5 / 6 / count) ** 0.5


def test_all_offsets_and_the_unperturbed_problem_see_the_same_examples():
    tasks, learner = _tasks(), Learner(_model(), F.cross_entropy)
    plain = InnerProblem(learner, learner.theta(), tasks, LAM).drawn(K, 3, 2)
    perturbed = InnerProblem(learner, learner.theta(), tasks, LAM, torch.tensor([NU, -NU])).drawn(K, 3, 2)
    support, both = plain.draws.examples, perturbed.draws.examples.view(3, 2, K, 5)
    assert torch.equal(both[:, 0], both[:, 1])
    assert torch.equal(both[:, 0, :, :3], support)
    assert (both[..., 3:] >= 7).all()
    only = InnerProblem(learner, learner.theta(), tasks, LAM, torch.tensor([NU])).drawn(K, None, 2)
    assert torch.equal(only.draws.examples[..., :7], torch.arange(7).expand(3, K, 7))
    assert plain.drawn(K) is plain


def test_tasks_without_keys_are_refused_but_by_meta_gradient():
    tasks = TaskBatch(*(getattr(_tasks(), n) for n in ("support_x", "support_y", "query_x", "query_y")))
    estimator, model = Symmetric(GradientDescent(K, batch=3)), _model()
    learner = Learner(model, F.cross_entropy)
    with pytest.raises(ValueError, match=r"^tasks=no keys: takes tasks with keys"):
        estimate(estimator, learner, learner.theta(), tasks)
    torch.manual_seed(3)
    found = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks)
    torch.manual_seed(3)
    again = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks.keyed(), task_chunk=2)
    other = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks)
    for name, gradient in found.gradient.items():
        torch.testing.assert_close(gradient, again.gradient[name])
    assert any((g - other.gradient[n]).norm() > 1e-3 * g.norm() for n, g in found.gradient.items())
    state = torch.get_rng_state()
    fobmaml.meta_gradient(Symmetric(GradientDescent(K)), model, F.cross_entropy, tasks)
    assert torch.equal(torch.get_rng_state(), state)  # without batches nothing is drawn


class Plain:
    """The same written plainly: one task, one step after another, torch's autograd."""

    def __init__(self, model: nn.Module, tasks: TaskBatch, task: int, solver: GradientDescent | Adam):
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.model, self.solver = model, solver
        self.tasks, self.task = tasks, task

    def loss(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = phi.split([s.numel() for s in self.shapes.values()])
        named = {name: part.view(s) for (name, s), part in zip(self.shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(self.model, named, (x,)), y)

    def query(self, phi: Tensor) -> Tensor:
        return self.loss(phi, self.tasks.query_x[self.task], self.tasks.query_y[self.task])

    def solve(self, theta: Tensor, nu: float | Tensor = 0.0, lam: float = LAM, pooled: bool = False) -> Tensor:
        t, i, s = self.tasks.pooled() if pooled else self.tasks, self.task, self.solver
        support = drawn(t.keys, t.support_x.shape[1], s.batch or 99, s.steps)[i]
        query = drawn(t.keys, t.query_x.shape[1], s.query_batch or 99, s.steps, 1)[i]
        phi, m, v = theta, torch.zeros_like(theta), torch.zeros_like(theta)
        for k in range(s.steps):
            a, b = support[k], query[k]
            value = self.loss(phi, t.support_x[i, a], t.support_y[i, a]) + lam / 2 * (phi - theta).square().sum()
            if isinstance(nu, Tensor) or nu:
                value = value + nu * self.loss(phi, t.query_x[i, b], t.query_y[i, b])
            (g,) = torch.autograd.grad(value, phi, create_graph=True)
            rate = s.lr if isinstance(s.lr, float) else s.lr[k % len(s.lr)]
            if isinstance(s, Adam):
                m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
                phi = phi - rate * (m / (1 - s.beta1 ** (k + 1))) / ((v / (1 - s.beta2 ** (k + 1))).sqrt() + s.eps)
            else:
                m = s.momentum * m + g
                phi = phi - rate * m
        return phi


def _expected(name: str, plain: Plain, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    at = {j: (plain.solve(theta, j * NU) - theta).detach() for j in (-2, -1, 0, 1, 2)}
    if name == "maml":
        return torch.autograd.grad(plain.query(plain.solve(theta)), theta)[0]
    if name == "reptile":
        return -(plain.solve(theta, pooled=True) - theta).detach()
    if name == "fomaml":
        phi = (theta + at[0]).detach().requires_grad_()
        return torch.autograd.grad(plain.query(phi), phi)[0]
    weights = {
        "forward": {0: -1.0, 1: 1.0},
        "symmetric": {-1: -0.5, 1: 0.5},
        "central4": {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12},
    }[name]
    return -LAM / NU * sum(w * at[j] for j, w in weights.items())


ESTIMATORS = {
    "forward": lambda s: Forward(s, LAM, NU),
    "symmetric": lambda s: Symmetric(s, LAM, NU),
    "central4": lambda s: Central(s, LAM, NU),
    "maml": lambda s: MAML(s, LAM),
    "fomaml": lambda s: FOMAML(s, LAM),
    "reptile": lambda s: Reptile(s, LAM),
}
SOLVERS = {
    "gd": GradientDescent(K, 0.1, batch=3, query_batch=4),
    "momentum": GradientDescent(K, 0.1, 0.5, batch=3),
    "query": GradientDescent(K, 0.1, query_batch=4),
    "steps": GradientDescent(K, [0.1, 0.2, 0.1, 0.1, 0.05], batch=3, query_batch=4),
    "parameters": GradientDescent(K, torch.linspace(0.05, 0.2, 141).expand(1, -1), 0.5, batch=3),
    "adam": Adam(K, 0.01, batch=3, query_batch=4),
    "moments": Adam(K, [0.01, 0.02, 0.01, 0.01, 0.01], beta1=0.9, beta2=0.9, eps=1e-2, batch=3),
}


@pytest.mark.parametrize("engine", ["stacked", "autograd", "loop"])
@pytest.mark.parametrize(("name", "solver"), [*itertools.product(ESTIMATORS, SOLVERS)])
def test_meta_gradients_on_batches_are_plain_autograds(name, solver, engine):
    model, tasks = _model(), _tasks()
    learner, theta = Learner(model, F.cross_entropy, engine), Learner(model, F.cross_entropy).theta()
    assert len(theta) == 141
    estimator = ESTIMATORS[name](SOLVERS[solver])
    found = estimator(learner, theta, tasks).gradients
    bound = 1e-9 if solver not in ("adam", "moments") or name in ("fomaml", "reptile") else 1e-7
    for task in range(len(tasks)):
        wanted = _expected(name, Plain(model, tasks, task, SOLVERS[solver]), theta)
        assert relative_error(found[task], wanted) < bound
    assert learner.used == engine


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("solver", ["gd", "momentum", "moments"])
def test_unrolled_steps_have_every_derivative(solver, checkpoint):
    """By θ of a loss of all φ_k, and by each step's rate."""
    model, tasks = _model(), _tasks(2)
    learner, solver = Learner(model, F.cross_entropy), SOLVERS[solver]
    theta, rates = learner.theta(), torch.linspace(0.05, 0.1, K, dtype=torch.float64)
    v = torch.randn(K, 2, len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visited, slopes = [], {}
    _, pull_back = solver.unroll(
        InnerProblem(learner, theta, tasks, LAM),
        checkpoint,
        rates=rates,
        visit=lambda k, phi: visited.append(phi),
        slope=lambda k, each: slopes.update({k: each.sum(1)}),
    )
    found = pull_back(v[-1], [None, *v[1:-1]])
    for task in range(2):
        t, r = theta.clone().requires_grad_(), rates.clone().requires_grad_()
        value, path = 0.0, []
        for steps in range(1, K + 1):
            part = type(solver)(**{**_arguments(solver), "steps": K, "lr": 0.1})
            part.lr, part.steps = r, steps
            # What is drawn of the first steps does not depend on how many follow.
            path.append(Plain(model, tasks, task, part).solve(t))
            value = value + (v[steps - 1, task] @ path[-1] if steps > 1 else 0.0)
            path[-1] = path[-1].detach()
        wanted, by_rate = torch.autograd.grad(value, (t, r))
        assert relative_error(found[task], wanted) < 1e-9
        assert relative_error(torch.stack([slopes[k][task] for k in range(K)]), by_rate) < 1e-9
        assert max(relative_error(a[task], b) for a, b in zip(visited, path, strict=True)) < 1e-12


def _arguments(solver: GradientDescent | Adam) -> dict[str, object]:
    names = ("beta1", "beta2", "eps") if isinstance(solver, Adam) else ("momentum",)
    return {name: getattr(solver, name) for name in ("batch", "query_batch", *names)}


@pytest.mark.parametrize("kind", [CNN1d, MLP])
@pytest.mark.parametrize("solver", ["gd", "momentum", "query", "steps", "moments"])
def test_the_kernel_on_batches_is_within_its_rounding(kind, solver):
    tasks, model = _tasks(), _model(kind)
    precise = Learner(model, F.cross_entropy, "autograd")
    learner = Learner(_model(kind, torch.float32), F.cross_entropy)
    theta = precise.theta()
    for estimator in (FOMAML(SOLVERS[solver], LAM), Reptile(SOLVERS[solver], LAM), MAML(SOLVERS[solver], LAM)):
        found = estimator(learner, theta.float(), tasks.to(dtype=torch.float32)).gradients
        assert relative_error(found.double(), estimator(precise, theta, tasks).gradients) < 1e-5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GradientDescent(3, [0.1, 0.1]), r"lr=2 numbers: takes a number, or one for each of steps=3"),
        (
            lambda: GradientDescent(3, torch.ones(2, 4)),
            r"lr=a tensor \[2, 4\]: takes finite numbers \[3, P\] or \[1, P\]",
        ),
        (lambda: GradientDescent(3, "x"), r"lr=x: takes a finite number above 0"),
        (lambda: GradientDescent(3, [0.1, 0.1, float("nan")]), r"lr=nan: takes a finite number above 0"),
        (lambda: GradientDescent(batch=0), r"batch=0: takes a whole number of at least 1"),
        (lambda: Adam(query_batch=1.5), r"query_batch=1.5: takes a whole number"),
        (lambda: Adam(beta1=1.0), r"beta1=1.0: takes"),
        (lambda: Reptile(GradientDescent(), data="query"), r"data=query: takes one of all, support"),
    ],
)
def test_bad_settings_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_rates_have_to_fit_the_network():
    learner = Learner(_model(), F.cross_entropy)
    with pytest.raises(ValueError, match=r"lr=a tensor \[5, 7\]: takes \[\.\.\., 141\]"):
        FOMAML(GradientDescent(K, torch.ones(K, 7)))(learner, learner.theta(), _tasks())
