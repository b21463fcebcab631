"""Where the inner problem moves some parameters only: every estimator against plain loops and dense matrices."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_losses, relative_error
from module_cases import IMAML_LAM, LAM, LR, NU, STEPS, Of
from torch import Tensor, nn

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.engine.selection import adapted_names
from fobmaml.estimators import (
    FOMAML,
    IMAML,
    MAML,
    Central,
    Exact,
    Forward,
    Reptile,
    Symmetric,
    Tangent,
    estimate,
)
from fobmaml.measure import bias, curvature
from fobmaml.models import MLP, Conv4, Transformer
from fobmaml.solvers import Adam, BarzilaiBorwein, GradientDescent, InnerProblem, NewtonCG


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 3))


def _middle() -> nn.Module:
    return Of(lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()), a=nn.Linear(4, 3), b=nn.Linear(3, 2), c=nn.Linear(2, 3))


def _twice(m: Of, x: Tensor) -> Tensor:
    return m.b(m.b(m.a(x)).tanh())


def _read_before(m: Of, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh() * m.b.weight.sum())


CASES = {
    "listed, head": (lambda: MLP((4,), 3, 3, 1), "head", {"layers.1.weight", "layers.1.bias"}),
    "listed, body": (lambda: MLP((4,), 3, 3, 1), ["layers.0.*"], {"layers.0.weight", "layers.0.bias"}),
    "head": (_normed, "head", {"3.weight", "3.bias"}),
    "norm and head": (_normed, "norm-and-head", {"1.weight", "1.bias", "3.weight", "3.bias"}),
    "a head called twice": (lambda: Of(_twice, a=nn.Linear(4, 3), b=nn.Linear(3, 3)), "head", {"b.weight", "b.bias"}),
    "a head read before": (
        lambda: Of(_read_before, a=nn.Linear(4, 3), b=nn.Linear(3, 3)),
        ["b.*"],
        {"b.weight", "b.bias"},
    ),
    "examples that see each other": (
        lambda: Of(lambda m, x: m.b(m.a(x) - m.a(x).tanh().mean(0)), a=nn.Linear(4, 3), b=nn.Linear(3, 3)),
        "head",
        {"b.weight", "b.bias"},
    ),
    "a head of layers": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))),
        ["2.*"],
        {"2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"},
    ),
    "names": (_middle, ["*.bias", "b.*"], {"a.bias", "b.weight", "b.bias", "c.bias"}),
}


def _problem(case: str, engine: str = "auto") -> tuple[Learner, TaskBatch, Tensor]:
    """With the mask [P], made from the names alone."""
    torch.manual_seed(0)
    make, adapt, names = CASES[case]
    model = make().double()
    learner = Learner(model, F.cross_entropy, engine, adapt)
    mask = torch.cat([torch.full((p.numel(),), float(name in names)) for name, p in model.named_parameters()]).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    y = torch.randint(3, (2, 9))
    return learner, TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]), mask


def _adapted(losses, theta: Tensor, mask: Tensor, lam: float, nu: float = 0.0) -> Tensor:
    """K steps in the parameters of the mask; differentiable by θ."""
    support, query = losses
    phi = theta
    for _ in range(STEPS):
        slope = torch.func.grad(lambda p: support(p) + nu * query(p))(phi) + lam * (phi - theta)
        phi = phi - LR * mask * slope
    return phi


def _implicit(losses, theta: Tensor, phi: Tensor, mask: Tensor, lam: float) -> Tensor:
    """∂f/∂θ through the minimiser's equation, by a dense Hessian: λ(H_aa + λI)⁻¹∂_a f and ∂_b f − H_ba (...)."""
    support, query = losses
    a, b = mask.bool(), ~mask.bool()
    hessian, slope = torch.func.hessian(support)(phi), torch.func.grad(query)(phi)
    v = torch.linalg.solve(hessian[a][:, a] + lam * torch.eye(int(a.sum()), dtype=phi.dtype), slope[a])
    found = torch.empty_like(theta)
    found[a], found[b] = lam * v, slope[b] - hessian[b][:, a] @ v
    return found


STENCILS = {
    "forward": {1: 1.0, 0: -1.0},
    "symmetric": {1: 0.5, -1: -0.5},
    "central4": {1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12},
}


def _wanted(name: str, losses, theta: Tensor, mask: Tensor) -> Tensor:
    support, query = losses
    if name in STENCILS:
        total = torch.zeros_like(theta)
        for offset, weight in STENCILS[name].items():
            phi = _adapted(losses, theta, mask, LAM, offset * NU)
            held = torch.func.grad(lambda p, nu=offset * NU: support(p) + nu * query(p))(phi)
            total += weight / NU * ((1 - mask) * held - LAM * (phi - theta))
        return total
    if name.startswith("maml"):
        return torch.func.grad(lambda t: query(_adapted(losses, t, mask, LAM)))(theta)
    if name == "fomaml":
        return torch.func.grad(query)(_adapted(losses, theta, mask, LAM))
    if name == "reptile":
        return theta - _adapted(losses, theta, mask, LAM)
    if name.startswith("tangent"):

        def slope(nu: Tensor) -> Tensor:  # of min h by θ, whose derivative by ν it is
            phi = _adapted(losses, theta, mask, LAM, nu)
            held = torch.func.grad(lambda p: support(p) + nu * query(p))(phi)
            return (1 - mask) * held - LAM * (phi - theta)

        zero = torch.zeros((), dtype=theta.dtype)
        return torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))[1]
    return _implicit(losses, theta, _adapted(losses, theta, mask, IMAML_LAM), mask, IMAML_LAM)


SOLVER = GradientDescent(STEPS, LR)
ESTIMATORS = {
    "forward": Forward(SOLVER, LAM, NU),
    "symmetric": Symmetric(SOLVER, LAM, NU),
    "central4": Central(SOLVER, LAM, NU),
    "maml": MAML(SOLVER, LAM),
    "maml, checkpointed": MAML(SOLVER, LAM, checkpoint=True),
    "fomaml": FOMAML(SOLVER, LAM),
    "reptile": Reptile(SOLVER, LAM, data="support"),
    "imaml": IMAML(SOLVER, IMAML_LAM, cg_steps=100, cg_tol=1e-14),
    "imaml, minres": IMAML(SOLVER, IMAML_LAM, cg_steps=100, cg_tol=1e-14, linear="minres"),
    "tangent": Tangent(SOLVER, LAM, way="products"),
    "tangent, by differences": Tangent(SOLVER, LAM, way="differences"),
}
TOLERANCE = dict.fromkeys(ESTIMATORS, 1e-9) | {"tangent, by differences": 1e-7}


@pytest.mark.parametrize("engine", ["auto", pytest.param("loop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_every_estimator(case, engine):
    learner, tasks, mask = _problem(case, engine)
    theta = learner.theta()
    for name, estimator in ESTIMATORS.items():
        wanted = [_wanted(name, plain_losses(learner, tasks, task), theta, mask) for task in range(2)]
        found = estimate(estimator, learner, theta, tasks)
        error = relative_error(found.gradient, torch.stack(wanted).mean(0))
        assert error < TOLERANCE[name], f"{name}, {learner.used}: {error}"


@pytest.mark.parametrize("envelope", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_one_is_the_slope_of_the_objective(case, envelope):
    """By differences of F + αM itself, as parameters that move and as others change, and by a dense matrix."""
    learner, tasks, mask = _problem(case)
    theta, lam = learner.theta(), 2.0
    exact = Exact(NewtonCG(tol=1e-12), lam, 1e-12, envelope=envelope)
    found = exact(learner, theta, tasks)
    phi = found.adapted().phi
    assert torch.equal(phi * (1 - mask), (theta * (1 - mask)).expand(2, -1))
    for task in range(2):
        losses = plain_losses(learner, tasks, task)
        wanted = _implicit(losses, theta, phi[task], mask, lam)
        of_minimum = mask * lam * (theta - phi[task]) + (1 - mask) * torch.func.grad(losses[0])(phi[task])
        assert relative_error(found.gradients[task], wanted + envelope * of_minimum) < 1e-9

    def objective(at: Tensor) -> Tensor:
        phi = exact.adapt(learner, at, tasks).phi
        support = torch.stack([plain_losses(learner, tasks, task)[0](phi[task]) for task in range(2)])
        minima = support + 0.5 * lam * (phi - at).square().sum(1)
        return (learner.query_loss(phi, tasks) + envelope * minima).mean()

    step, mean = 1e-5, found.gradients.mean(0)
    for part in (mask, 1 - mask):
        along = part * torch.randn_like(theta)
        slope = (objective(theta + step * along) - objective(theta - step * along)) / (2 * step)
        assert abs(float(slope - mean @ along)) < 1e-8 * float(mean.norm() * along.norm())


@pytest.mark.parametrize("envelope", [0.0, 0.7])
@pytest.mark.parametrize("case", ["listed, head", "names"])
def test_finite_differences_tend_to_the_exact_one_where_the_problem_is_solved(case, envelope):
    learner, tasks, _ = _problem(case)
    theta, lam = learner.theta(), 2.0
    solver = NewtonCG(tol=1e-13)
    wanted = Exact(solver, lam, 1e-12, envelope=envelope)(learner, theta, tasks).gradients
    errors = {
        kind: [
            relative_error(kind(solver, lam, nu, envelope=envelope)(learner, theta, tasks).gradients, wanted)
            for nu in (0.02, 0.01)
        ]
        for kind in (Forward, Symmetric, Central)
    }
    for kind, order in ((Forward, 1), (Symmetric, 2), (Central, 4)):
        coarse, fine = errors[kind]
        assert fine < 1e-2
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    tangent = Tangent(GradientDescent(200, 0.4), lam, envelope=envelope)(learner, theta, tasks).gradients
    assert relative_error(tangent, wanted) < 1e-7


@pytest.mark.parametrize(
    "solver", [GradientDescent(4, 0.1, momentum=0.6), GradientDescent(2, [0.1, 0.2]), Adam(3, 0.01, beta1=0.5)]
)
def test_maml_by_autograd_of_other_solvers(solver):
    learner, tasks, mask = _problem("norm and head")
    theta = learner.theta()

    def adapted(start: Tensor, support) -> Tensor:
        phi, memory = start, solver.memory(start)
        for step, rate in enumerate(solver.rates):
            slope = mask * torch.autograd.grad(support(phi), phi, create_graph=True)[0]
            direction, memory = solver.direction(slope, memory, step)
            phi = phi - rate * direction
        return phi

    found = MAML(solver)(learner, theta, tasks).gradients
    for task in range(2):
        support, query = plain_losses(learner, tasks, task)
        start = theta.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(query(adapted(start, support)), start)
        assert relative_error(found[task], wanted) < 1e-9


@pytest.mark.parametrize("solver", [SOLVER, Adam(5), BarzilaiBorwein(20), NewtonCG(), GradientDescent(3, batch=2)])
def test_solvers_leave_the_others_where_they_are(solver):
    learner, tasks, mask = _problem("names")
    problem = InnerProblem(learner, learner.theta(), tasks.keyed(), 0.5, torch.tensor([0.1, -0.1]).double())
    solution = solver.solve(problem)
    assert not solution.displacement[:, mask == 0].any()
    assert solution.displacement[:, mask == 1].all()
    inside = problem.engine().gradient(solution.phi) + 0.5 * solution.displacement
    assert torch.allclose(solution.residual, inside[:, mask == 1].norm(dim=1))


@pytest.mark.parametrize(("case", "apart"), [("head", True), ("a head of layers", True), ("names", False)])
def test_what_leads_up_to_a_head_is_computed_once(case, apart):
    """Four support and five query examples of two tasks: forward passes once, and a gradient at each solution."""
    learner, tasks, _ = _problem(case)
    work = estimate(Symmetric(SOLVER, LAM), learner, learner.theta(), tasks, diagnose=False).work
    assert (work.forward, work.gradients) == ((2 * 9, 2 * 2 * 9) if apart else (0, 2 * 2 * 9 * (STEPS + 1)))
    learner.work = type(learner.work)()
    work = estimate(Reptile(SOLVER, LAM, data="support"), learner, learner.theta(), tasks, diagnose=False).work
    assert (work.forward, work.gradients) == ((2 * 4, 0) if apart else (0, 2 * 4 * STEPS))


@pytest.mark.parametrize(
    "estimator", [Symmetric(GradientDescent(4)), MAML(GradientDescent(4)), IMAML(GradientDescent(4), 2)]
)
def test_a_head_of_unequal_tasks_with_a_loss_of_their_own(estimator, monkeypatch):
    """On features computed once: the same as through the whole network."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 9, 4).double(), torch.randint(3, (2, 9))
    there = torch.arange(9) < torch.tensor([[9], [6]])
    tasks = TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:], support_mask=there[:, 2:6], query_mask=there[:, 4:])
    found = []
    for _ in range(2):
        learner = Learner(
            _normed().double(), F.cross_entropy, adapt="head", support_loss=nn.CrossEntropyLoss(label_smoothing=0.2)
        )
        theta = torch.linspace(-1, 1, learner.parameter_count).double()
        found.append(estimate(estimator, learner, theta, tasks).gradient)
        monkeypatch.setattr(Learner, "features", lambda *_: None)
    assert relative_error(*found) < 1e-10


def test_the_first_features_are_the_later_ones():
    """Bit for bit: a run that goes on begins with a first call."""
    model = nn.Sequential(nn.Linear(40, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 5))
    learner, x, y = Learner(model, F.cross_entropy, adapt="head"), torch.randn(7, 25, 40), torch.randint(5, (7, 25))
    first, second = (learner.features(learner.theta(), TaskBatch(x, y, x, y), query=False) for _ in range(2))
    assert torch.equal(first[1].support_x, second[1].support_x)


def test_the_linear_system_is_a_heads():
    learner, tasks, _ = _problem("head")
    work = estimate(IMAML(SOLVER, IMAML_LAM, cg_steps=3), learner, learner.theta(), tasks, diagnose=False).work
    assert (work.gradients, work.hessian_products) == (2 * 5, 2 * 4)  # of the query set; the mixed one of the support


def test_step_lengths_of_all_parameters_are_those_of_a_head():
    learner, tasks, mask = _problem("head")
    rates = torch.full((STEPS, len(mask)), LR, dtype=torch.float64)
    for kind in (Symmetric, Tangent):
        found, wanted = (
            kind(GradientDescent(STEPS, lr), LAM)(learner, learner.theta(), tasks).gradients for lr in (rates, LR)
        )
        assert relative_error(found, wanted) < 1e-6


def test_the_bias_is_against_the_same_problem():
    learner, tasks, _ = _problem("head")
    found = bias(Symmetric(NewtonCG(tol=1e-12), 2.0, 1e-3), learner, tasks)
    assert found.relative_error < 1e-5
    assert bias(MAML(SOLVER), learner, tasks).relative_error < 1e-9
    everything = Learner(learner.model, F.cross_entropy)
    assert bias(Symmetric(NewtonCG(tol=1e-12), 2.0, 1e-3), everything, tasks).exact_norm != found.exact_norm


def test_by_the_function():
    learner, tasks, _ = _problem("head")
    found = fobmaml.meta_gradient(ESTIMATORS["symmetric"], learner.model, F.cross_entropy, tasks, adapt="head")
    flat = torch.cat([g.flatten() for g in found.gradient.values()])
    assert torch.allclose(flat, estimate(ESTIMATORS["symmetric"], learner, learner.theta(), tasks).gradient)


NAMES = {
    "transformer": (lambda: Transformer((4,), 3, width=4, depth=1), "head", {"head.weight", "head.bias"}),
    "conv4": (
        lambda: Conv4((1, 4, 4), 3, width=2, depth=1),
        "norm-and-head",
        {"head.weight", "head.bias", "norm0.weight", "norm0.bias"},
    ),
    "frozen": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)),
        "head",
        {"0.weight", "0.bias"},
    ),
    "order": (_middle, ["b.weight", "*.bias"], {"a.bias", "b.weight", "b.bias", "c.bias"}),
    "all": (_middle, "all", {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"}),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case):
    make, adapt, names = NAMES[case]
    model = make()
    assert adapted_names(model, [n for n, p in model.named_parameters() if p.requires_grad], adapt) == names


def test_a_tied_head_is_adapted_by_its_first_name():
    model = Of(lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(5, 3), head=nn.Linear(3, 5))
    model.head.weight = model.table.weight
    assert adapted_names(model, [name for name, _ in model.named_parameters()], "head") == {"table.weight", "head.bias"}


@pytest.mark.parametrize(
    ("adapt", "line"),
    [
        ("body", "adapt=body: takes one of all, head, norm-and-head, or a list of patterns"),
        ([], r"adapt=\[\]: takes"),
        (3, "adapt=3: takes"),
        ([3], r"adapt=\[3\]: takes"),
        (["c.*", "d.*"], r"adapt=d.\*: takes patterns of the model's parameters: a.weight, a.bias, .*c.bias$"),
        ("norm-and-head", "adapt=norm-and-head: takes a model that has layers called a norm"),
    ],
)
def test_bad_arguments(adapt, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        Learner(_middle(), F.cross_entropy, adapt=adapt)


def test_a_list_of_parameters_has_no_head():
    model = Of(lambda m, x: x @ m.w[0] @ m.w[1], w=nn.ParameterList([torch.eye(3), torch.eye(3)]))
    with pytest.raises(ValueError, match=r"^adapt=head: takes a model whose last layer is a module"):
        Learner(model, F.cross_entropy, adapt="head")
    assert Learner(model, F.cross_entropy, adapt=["w.1"]).adapted == {"w.1"}


def test_curvature_is_in_all_parameters():
    learner, tasks, _ = _problem("head")
    with pytest.raises(ValueError, match=r"^adapt=head: takes all"):
        curvature(learner, tasks, SOLVER)


RUN = ("model=mlp", "width=4", "steps=2", "eval.tasks=5", "eval.validation_tasks=0", "bias.every=0", "meta_batch=2")
RUN = (*RUN, "estimator=symmetric", "wandb.mode=disabled")


def test_on_the_command_line(run_train, tmp_path):
    for name, adapt in (("head", "head"), ("names", "[layers.3.*]")):
        done = run_train(*RUN, f"adapt={adapt}", f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
    head, names = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("head", "names"))
    assert head["test/loss"] == names["test/loss"]
    assert (head["config"]["adapt"], names["config"]["adapt"]) == ("head", ["layers.3.*"])
    assert run_train(*RUN, "adapt=body").stderr.startswith("error: adapt=body: takes one of all, head")
