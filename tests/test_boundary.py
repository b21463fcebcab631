"""What comes in: right, or one line that names the argument; what the caller owns comes back as it was."""

import copy
import io
import re
import subprocess
import sys
import threading
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from module_cases import ESTIMATORS, VECTORS, Plain, attention, hooked, made, tasks, tokens, vectors
from torch import nn

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Forward, Reptile, Symmetric, chunk_size, estimate
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import BarzilaiBorwein, GradientDescent, NewtonCG, Solution, Solver

GD = GradientDescent(4, 0.1)
SYMMETRIC, FO = Symmetric(GD, 0.5), FOMAML(GD)


def _labels(*shape: int) -> torch.Tensor:
    return torch.randint(3, shape)


def _flat(result: fobmaml.MetaGradient) -> torch.Tensor:
    return torch.cat([g.flatten() for g in result.gradient.values()])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# losses


@pytest.mark.parametrize("model", [nn.Linear(6, 1), MLP((6,), 1, 4, 1)], ids=["plain", "listed"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, y: F.mse_loss(o, y, reduction="none"),
        lambda o, y: (o - y).square().sum(1),
        lambda o, y: float((o - y)[0]),
        nn.MSELoss(reduction="none"),
        lambda o, y: (o - y).square().mean(0).expand(2),
    ],
)
@pytest.mark.parametrize("estimator", [SYMMETRIC, FO, MAML(GD)])
def test_a_loss_that_is_not_one_number_is_refused(model, loss_fn, estimator):
    batch = tasks(vectors, lambda *s: torch.randn(*s, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^loss_fn=(shape \(|float).*one number"):
        fobmaml.meta_gradient(estimator, copy.deepcopy(model).double(), loss_fn, batch)


@pytest.mark.parametrize("loss_fn", ["mse", None, 3])
def test_a_loss_that_is_no_function_is_refused(loss_fn):
    with pytest.raises(ValueError, match=r"^loss_fn="):
        fobmaml.meta_gradient(FO, nn.Linear(6, 3), loss_fn, tasks(vectors, _labels))


@pytest.mark.parametrize("label", [-1, 3, 7])
@pytest.mark.parametrize("which", ["support_y", "query_y"])
@pytest.mark.parametrize("estimator", [SYMMETRIC, FO, MAML(GD)])
@pytest.mark.parametrize("engine", ["auto", "stacked", "autograd", "loop"])
def test_a_label_without_an_output_is_refused_by_name(label, which, estimator, engine):
    batch = tasks(vectors, _labels)
    getattr(batch, which)[1, 2] = label
    with pytest.raises(ValueError, match=f"^{which}={label}: takes class labels from 0 to 2"):
        fobmaml.meta_gradient(estimator, MLP((6,), 3, 4, 1), F.cross_entropy, batch, engine=engine)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize("network", ["our mlp", "mlp", "lstm"])
def test_labels_of_any_integer(dtype, loss_fn, network):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0])
    wanted = fobmaml.meta_gradient(SYMMETRIC, model, loss_fn, batch)
    found = fobmaml.meta_gradient(
        SYMMETRIC,
        model,
        loss_fn,
        TaskBatch(batch.support_x, batch.support_y.to(dtype), batch.query_x, batch.query_y.to(dtype)),
    )
    assert torch.equal(_flat(found), _flat(wanted))


def test_a_cross_entropy_module_takes_the_fast_path():
    model, batch = CNN1d((40,), 5, 8), fobmaml.tasks.MNIST1D().sample("train", 3, torch.Generator().manual_seed(0))
    function, module = (
        fobmaml.meta_gradient(SYMMETRIC, model, loss, batch) for loss in (F.cross_entropy, nn.CrossEntropyLoss())
    )
    assert function.engine == module.engine
    assert torch.equal(_flat(function), _flat(module))


# networks


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), r"BatchNorm1d '1' updates batch"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 3)), r"Dropout '1' is random"),
        (lambda: nn.LSTM(6, 3, num_layers=2, dropout=0.5), r"LSTM '' is random"),
        (lambda: _dropping(attention()), r"MultiheadAttention 'attention' is random"),
        (lambda: _Functional(), r"_Functional '' returns something else for the same inputs"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.RReLU(), nn.Linear(4, 3)), r"RReLU '1' returns something else"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Flatten(0)), r"outputs of shape \(\d+,\)"),
        (lambda: nn.Sequential(nn.Linear(7, 4)), r"Linear '0' fails on inputs"),
        (lambda: nn.LSTM(6, 3), "outputs of tuple"),
        (lambda: _around_by_hook(), r"parameter 'b.(weight|bias)' is read around the call"),
        (lambda: _around_by_forward(), r"parameter '.*' is read around the call"),
        (lambda: _gradient_hooked(), r"parameter 'weight' has a gradient hook"),
        (lambda: nn.Identity(), "takes a module with trainable parameters"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "has no shape yet"),
        (lambda: _mixed(), "takes parameters of one real dtype"),
        (lambda: nn.Linear(6, 3, dtype=torch.complex64), "takes parameters of one real dtype"),
        (lambda: nn.Linear(6, 3, device="meta"), "one real device"),
        (lambda: torch.jit.trace(nn.Linear(6, 3), torch.randn(2, 6)), "is TorchScript"),
        (lambda: torch.compile(nn.Linear(6, 3)), "takes the module given to torch.compile"),
        (lambda: nn.DataParallel(nn.Linear(6, 3)), "takes the module inside"),
    ],
)
@pytest.mark.parametrize("estimator", [SYMMETRIC, FO, MAML(GD)])
def test_networks_that_cannot_work_are_named(make, says, estimator):
    with pytest.raises(ValueError, match=f"^model(:|=).*{says}"):
        fobmaml.meta_gradient(estimator, make(), F.cross_entropy, tasks(vectors, _labels))


def _dropping(model):
    model.attention.dropout = 0.3
    return model


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return F.dropout(self.a(x), 0.5)


def _around_by_hook():
    model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
    model.forward = MethodType(lambda m, x: m["a"](x), model)
    model["a"].register_forward_hook(lambda _, x, out: out + model["b"](x[0]))
    return model


def _around_by_forward():
    model = nn.Linear(6, 3)
    model.forward = lambda x: F.linear(x, model.weight, model.bias)
    return model


def _gradient_hooked():
    model = nn.Linear(6, 3)
    model.weight.register_hook(lambda g: 2.0 * g)
    return model


def _mixed():
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3).double())


def test_weights_that_forward_changes_are_refused():
    model = nn.Sequential(nn.Embedding(11, 2, max_norm=1.0), nn.Flatten(), nn.Linear(10, 3))
    with pytest.raises(ValueError, match=r"^model: Embedding '0' changes its weight in forward: takes max_norm=None"):
        fobmaml.meta_gradient(FO, model, F.cross_entropy, tasks(tokens, _labels))


def test_a_token_without_a_row_is_named():
    batch = tasks(tokens, _labels)
    batch.support_x[0, 0, 0] = 11
    model = nn.Sequential(nn.Embedding(11, 2), nn.Flatten(), nn.Linear(10, 3))
    with pytest.raises(ValueError, match=r"^model: Embedding '0' fails on inputs .*out of range"):
        fobmaml.meta_gradient(FO, model, F.cross_entropy, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Forward, Symmetric, Central])
def test_half_precision_is_refused_for_finite_differences(dtype, kind):
    with pytest.raises(ValueError, match=rf"^model={re.escape(str(dtype))}: takes float32 or float64 .*digits"):
        fobmaml.meta_gradient(kind(GD, 0.5), nn.Linear(6, 3).to(dtype), F.cross_entropy, tasks(vectors, _labels))


@pytest.mark.parametrize("network", ["our mlp", "mlp", "lstm"])
@pytest.mark.parametrize("name", ["symmetric", "maml", "imaml"])
def test_autocast_changes_nothing(network, name):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0]).float()
    wanted = _flat(fobmaml.meta_gradient(ESTIMATORS[name], model, F.cross_entropy, batch))
    with torch.autocast("cpu", torch.bfloat16):
        found = _flat(fobmaml.meta_gradient(ESTIMATORS[name], model, F.cross_entropy, batch))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("network", ["our mlp", "mlp", "lstm", "batch norm, evaluating"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_within_inference_mode(network, mode):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0])
    wanted = _flat(fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch))
    with mode():
        inside = TaskBatch(*(t.clone() for t in (batch.support_x, batch.support_y, batch.query_x, batch.query_y)))
        found = fobmaml.meta_gradient(SYMMETRIC, copy.deepcopy(model), F.cross_entropy, inside)
    assert torch.equal(_flat(found), wanted)
    assert not any(g.is_inference() for g in found.gradient.values())


@pytest.mark.parametrize("engine", ["autograd", "loop", "stacked", "fused", "fast"])
def test_an_engine_that_does_not_fit_is_refused(engine):
    model = nn.LSTM(6, 3)
    with pytest.raises(ValueError, match=f"^engine={engine}: takes|^model="):
        fobmaml.meta_gradient(FO, model, F.cross_entropy, tasks(vectors, _labels), engine=engine)


@pytest.mark.parametrize("network", ["lstm", "boolean mask"])
def test_vmap_is_refused_where_it_cannot(network):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0])
    with pytest.raises(ValueError, match=r"^engine=autograd: takes a network that torch.func.vmap can batch"):
        fobmaml.meta_gradient(FO, model, F.cross_entropy, batch, engine="autograd")
    assert fobmaml.meta_gradient(FO, model, F.cross_entropy, batch).engine == "loop"


def test_an_engine_by_hand_says_what_it_does_not_take():
    class Scaled(MLP):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model, batch = Scaled((6,), 3, 4, 1).double(), tasks(vectors, _labels)
    wanted = torch.stack([Plain(model, F.cross_entropy, batch).estimate("fomaml", task) for task in range(3)]).mean(0)
    found = fobmaml.meta_gradient(ESTIMATORS["fomaml"], model, F.cross_entropy, batch)
    torch.testing.assert_close(_flat(found), wanted, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"^engine=stacked: takes a sequence of .*, not Scaled '' \(aten.mul"):
        fobmaml.meta_gradient(FO, model, F.cross_entropy, batch, engine="stacked")


# arguments


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"estimator": "symmetric"}, "estimator=str: takes"),
        ({"tasks": (1, 2)}, "tasks=tuple: takes"),
        ({"model": F.relu}, "model=function: takes a torch.nn.Module"),
        ({"task_chunk": 0}, "task_chunk=0: takes"),
        ({"engine": "quick"}, "engine=quick: takes one of auto"),
    ],
)
def test_bad_arguments(change, says):
    given = {"estimator": FO, "model": nn.Linear(6, 3), "loss_fn": F.cross_entropy, "tasks": tasks(vectors, _labels)}
    with pytest.raises(ValueError, match=f"^{says}"):
        fobmaml.meta_gradient(**given | change)


@pytest.mark.parametrize("length", [4000, 60, 20, 3])
@pytest.mark.parametrize("model", [CNN1d((40,), 5, 8), MLP((40,), 5, 8)], ids=["cnn", "mlp"])
@pytest.mark.parametrize("engine", ["auto", "stacked", "autograd", "loop"])
@pytest.mark.parametrize("estimator", [SYMMETRIC, MAML(GD)])
def test_inputs_of_another_length_are_refused_by_every_engine(length, model, engine, estimator):
    batch = tasks(lambda *s: torch.randn(*s, length), lambda *s: torch.randint(5, s))
    with pytest.raises(ValueError, match=r"^(model|inputs|support_x)"):
        fobmaml.meta_gradient(estimator, model, F.cross_entropy, batch, engine=engine)


def test_refusals_do_not_hang_on_assertions():
    """Under python -O."""
    code = (
        "import torch, fobmaml; from torch.nn import functional as F; m = fobmaml.models.CNN1d((40,), 5, width=8)\n"
        "x = torch.randn(3, 4, 60); y = torch.zeros(3, 4, dtype=torch.long)\n"
        "try: fobmaml.meta_gradient(fobmaml.estimators.FOMAML(fobmaml.solvers.GradientDescent(2, 0.1)), m, "
        "F.cross_entropy, fobmaml.TaskBatch(x, y, x, y))\nexcept ValueError as e: print('refused', e)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.stdout.startswith("refused "), done.stderr


# solvers


class _Frozen(Solver):
    """Moves the last layer only."""

    def __init__(self, size: int):
        self.size, self.inner = size, GD

    def solve(self, problem):
        displacement = self.inner.solve(problem).displacement.clone()
        displacement[:, : -self.size] = 0.0
        return Solution(problem, displacement, torch.full((problem.rows,), 4))


@pytest.mark.parametrize("network", ["our mlp", "mlp"])
@pytest.mark.parametrize("kind", [Forward, Symmetric, Central, IMAML])
def test_a_solver_that_leaves_parameters_is_refused(network, kind):
    batch = tasks(vectors, _labels)
    estimator, model = kind(_Frozen(15), 0.5), made(VECTORS[network], batch.support_x[0])
    with pytest.raises(
        ValueError,
        match=r"^solver=_Frozen: takes one that moves every parameter, and this one leaves "
        r".*weight.* where it was",
    ):
        fobmaml.meta_gradient(estimator, model, F.cross_entropy, batch)


@pytest.mark.parametrize("solver", [NewtonCG(tol=1e-3), BarzilaiBorwein(tol=1e-3)])
def test_a_problem_that_starts_at_its_solution_is_no_fault_of_the_solver(solver):
    """The slope at θ is below ``tol``, and not zero."""
    model = nn.Linear(6, 2).double()
    support, query = vectors(3, 4), vectors(3, 5)
    with torch.no_grad():
        batch = fobmaml.TaskBatch(support, model(support) + 1e-5, query, model(query) + 1.0)
    result = fobmaml.meta_gradient(IMAML(solver, 0.5), model, F.mse_loss, batch)
    assert 0.0 < result.residual.max() < 1e-3
    assert all(part.abs().sum() > 0.0 for part in result.gradient.values())


def test_a_parameter_whose_slope_is_below_rounding_may_stay():
    """A step of 1e-20 is lost in a parameter of 1."""

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.shift = nn.Linear(6, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.linear(x) + 1e-20 * self.shift

    batch = fobmaml.TaskBatch(vectors(3, 4), vectors(3, 4)[..., :2], vectors(3, 5), vectors(3, 5)[..., :2])
    fobmaml.meta_gradient(Symmetric(BarzilaiBorwein(20), 0.5), Far().double(), F.mse_loss, batch)


def test_a_parameter_without_a_slope_may_stay():
    batch = tasks(vectors, _labels)
    fobmaml.meta_gradient(SYMMETRIC, made(VECTORS["an unused parameter"], batch.support_x[0]), F.cross_entropy, batch)


def test_a_solution_of_another_shape_is_refused():
    class Short(Solver):
        def solve(self, problem):
            return Solution(problem, torch.zeros(problem.rows, 2), torch.zeros(problem.rows))

    with pytest.raises(ValueError, match=r"^solver=Short: takes one whose solution is a displacement \[3, 21\]"):
        fobmaml.meta_gradient(FOMAML(Short()), nn.Linear(6, 3), F.cross_entropy, tasks(vectors, _labels))


def test_a_linear_solve_says_what_it_met():
    """A loss −‖φ‖²: the Hessian is −2, and with λ = 0.5 conjugate gradients cannot go on."""
    model = nn.Linear(6, 3, bias=False)

    def loss(o, y):
        return -o.square().mean()

    batch = tasks(lambda *s: torch.randn(*s, 6), lambda *s: torch.zeros(*s, 3))
    result = fobmaml.meta_gradient(IMAML(GD, lam=1e-3), model, loss, batch)
    assert result.linear.negative_curvature.all()
    assert torch.equal(result.linear.steps, torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(result.linear.relative_residual, torch.ones(3))
    assert not _flat(result).any()
    good = fobmaml.meta_gradient(IMAML(GD, lam=5.0, cg_steps=50, cg_tol=1e-5), model, F.mse_loss, batch, task_chunk=2)
    assert not good.linear.negative_curvature.any()
    assert (good.linear.relative_residual <= 1e-5).all()
    assert (good.linear.steps > 1).all()
    assert fobmaml.meta_gradient(SYMMETRIC, model, F.mse_loss, batch).linear is None


# what the caller owns


def _snapshot(model: nn.Module) -> dict:
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "ids": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "training": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def _assert_same(before: dict, after: dict) -> None:
    for name, tensor in before.pop("state").items():
        assert torch.equal(tensor, after["state"][name]), name
    after.pop("state")
    assert before == after


@pytest.mark.parametrize("network", sorted(VECTORS))
def test_the_callers_module_comes_back_as_it_was(network):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0])
    before = _snapshot(model)
    for name in ("symmetric", "maml", "imaml"):
        fobmaml.meta_gradient(ESTIMATORS[name], model, F.cross_entropy, batch)
    with pytest.raises(ValueError, match=r"^loss_fn: fails"):
        fobmaml.meta_gradient(SYMMETRIC, model, _failing, batch)
    _assert_same(before, _snapshot(model))
    if "hook" not in network:  # one of torch's own keeps a tensor with a history
        copy.deepcopy(model)
    if network == "keeps its activations":
        torch.save(model.state_dict(), io.BytesIO())
        assert not hasattr(model, "h")


def _failing(outputs, targets):
    raise RuntimeError("no loss today")


def test_a_module_that_has_kept_a_tensor_with_a_history_is_taken():
    batch = tasks(vectors, _labels)
    model = made(VECTORS["keeps its activations"], batch.support_x[0])
    wanted = _flat(fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch))
    kept = model(batch.support_x[0]), model.h
    assert torch.equal(_flat(fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch)), wanted)
    assert model.h is kept[1]
    learner = Learner(model, F.cross_entropy)
    estimator = IMAML(NewtonCG(), 5.0, 200, 1e-10)
    assert fobmaml.measure.bias(estimator, learner, batch).relative_error < 1e-6


@pytest.mark.parametrize("network", ["our mlp", "mlp", "lstm", "a frozen layer", "counts its calls", "spectral norm"])
def test_one_model_in_many_threads(network):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0])
    before = _snapshot(model)
    wanted = _flat(fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch))
    found: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(5):
            found.append(_flat(fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(one, wanted) for one in found)
    _assert_same(before, _snapshot(model))
    assert torch.backends.mha.get_fastpath_enabled()


def test_settings_of_torch_come_back_whatever_the_threads():
    batch = tasks(vectors, _labels)
    model = made(VECTORS["transformer layer"], batch.support_x[0])

    def work() -> None:
        for name in ("symmetric", "maml"):
            fobmaml.meta_gradient(ESTIMATORS[name], model, F.cross_entropy, batch)

    def flags() -> tuple[bool, ...]:
        return (
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cudnn.enabled,
        )

    before = flags()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flags() == before


# results do not depend on how they are computed


@pytest.mark.parametrize("network", ["our mlp", "our cnn", "mlp", "conv2d", "transformer layer", "a scalar parameter"])
def test_engines_agree(network):
    batch = tasks(vectors, _labels)
    model = made(VECTORS[network], batch.support_x[0])
    for kind in (Symmetric, MAML, FOMAML, Reptile, IMAML):
        results = []
        for engine in ("auto", "autograd", "loop"):
            learner = Learner(model, F.cross_entropy, engine)
            results.append(estimate(kind(GD, 0.5), learner, learner.theta(), batch))
            if engine != "auto":
                assert learner.used == engine
        for other in results[1:]:
            torch.testing.assert_close(other.gradient, results[0].gradient, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(other.query_loss, results[0].query_loss, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(other.residual, results[0].residual, rtol=1e-9, atol=1e-11)


def test_a_readme_loop_with_frozen_parameters():
    model = made(VECTORS["a frozen layer"], vectors(2))
    optimizer = fobmaml.optim.SNGDM(model.parameters(), lr=0.05)
    result = fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, tasks(vectors, _labels))
    for name, gradient in result.gradient.items():
        model.get_parameter(name).grad = gradient
    frozen = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)


def test_hooks_count():
    batch = tasks(vectors, _labels)
    for plain in (MLP((6,), 3, 4, 1), CNN1d((6,), 3, 3, 1)):
        plain.double()
        learner = Learner(hooked(plain), F.cross_entropy)
        found = learner.outputs(learner.theta().expand(3, -1), batch.support_x)
        assert "has hooks" in learner.untraced
        torch.testing.assert_close(found[0], plain(batch.support_x[0]))


def test_automatic_chunks_of_plain_modules():
    """As many rows as fill the cache by vmap, one where rows are looped over; the numbers are the same."""
    chunks = {}
    for name, width in (("small", 4), ("large", 900)):
        model = nn.Sequential(nn.Linear(6, width), nn.CELU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3))
        learner, batch = Learner(model, F.cross_entropy), tasks(vectors, _labels, 6, 10, 10).to(dtype=torch.float32)
        chunks[name] = chunk_size(learner, batch, SYMMETRIC)
        few, auto = (fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch, chunk) for chunk in (1, "auto"))
        torch.testing.assert_close(_flat(auto), _flat(few), rtol=1e-3, atol=1e-5)
    assert chunks == {"small": 6, "large": 1}
    with pytest.raises(ValueError, match=r"^task_chunk=all: takes one of auto$"):
        fobmaml.meta_gradient(SYMMETRIC, model, F.cross_entropy, batch, "all")
