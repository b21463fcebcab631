"""A trained network put to use: back from a run's folder, adapted to new tasks, exported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, PlainMLP
from hydra import compose, initialize_config_dir
from test_package import EXTRA
from torch import Tensor, nn

import fobmaml
from fobmaml.models import MLP, CNN1d
from fobmaml.run.build import build
from fobmaml.run.settings import same_run
from fobmaml.saved.checkpoints import read_checkpoint, save_checkpoint
from fobmaml.solvers import Adam, GradientDescent
from fobmaml.training import MetaTraining

QUICK = ("device=cpu", "width=8", "steps=2", "eval.validation_tasks=0", "eval.tasks=20", "bias.every=0")
Trained = Callable[..., MetaTraining]


@pytest.fixture
def trained(tmp_path) -> Trained:
    """Meta-trains for a moment and leaves a checkpoint in ``tmp_path``, as the program does."""

    def train(*overrides: str) -> MetaTraining:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", [*QUICK, *overrides])
        training = build(cfg)
        list(training.train())
        save_checkpoint(tmp_path / "checkpoint.pt", training.state_dict(), same_run(cfg))
        return training

    return train


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("estimator=maml", "estimator.learn_lr=0.1", "dtype=float64"),
        ("estimator=symmetric", "eval.solver.steps=3", "eval.lam=0.2"),
        ("estimator=symmetric", "eval.solver={_target_: fobmaml.solvers.Adam, steps: 4}"),
        ("dataset=sinusoid", "estimator=symmetric"),
        ("model=mlp", "adapt=head"),
        ("dataset.loss=mse", "solver=bb", "estimator=imaml"),
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_a_run_comes_back_and_adapts_as_at_meta_test(trained, tmp_path, overrides):
    training = trained(*overrides)
    run = fobmaml.load_run(tmp_path)
    assert run.step == 2
    assert run.folder == tmp_path
    assert run.settings["width"] == 8
    assert type(run.model) is type(training.learner.model)
    assert type(run.estimator) is type(training.estimator)
    assert type(run.data) is type(training.source)
    for name, values in training.learner.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], values)
    tasks = training.placed(training.fixed("test", 3))
    wanted = training.adapting.adapt(training.learner, training.learner.theta(), tasks).phi
    assert not torch.equal(wanted, training.learner.theta().expand_as(wanted))
    assert torch.equal(run.adapt_tasks(tasks.support_x, tasks.support_y).phi, wanted)
    outputs = training.learner.outputs(wanted, tasks.query_x)
    for task in range(3):
        network = run.adapt(tasks.support_x[task], tasks.support_y[task])
        assert torch.allclose(network(tasks.query_x[task]), outputs[task], atol=1e-5)


def test_the_accuracy_of_a_run_is_that_of_its_predictions(trained, tmp_path):
    training = trained()
    measured = training.measure(ended=True)["test/accuracy"]
    tasks, run = training.fixed("test", 20), fobmaml.load_run(tmp_path)
    right = run.predict(run.adapt_tasks(tasks.support_x, tasks.support_y), tasks.query_x) == tasks.query_y
    assert right.double().mean().item() == pytest.approx(measured, abs=1e-3)


def _by_hand(model: nn.Module, loss_fn, x: Tensor, y: Tensor, lam: float, steps: int, lr: float) -> dict[str, Tensor]:
    """Gradient descent on f̂(φ) + (λ/2)‖φ − θ‖², through the module's ordinary forward."""
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    phi = dict(theta)
    for _ in range(steps):
        phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
        loss = loss_fn(torch.func.functional_call(model, phi, (x,)), y)
        loss = loss + 0.5 * lam * sum((phi[name] - theta[name]).square().sum() for name in phi)
        slope = dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
        phi = {name: p.detach() - lr * slope[name] for name, p in phi.items()}
    return phi


@pytest.mark.parametrize("make", [PlainMLP, lambda: CNN1d((40,), 5, width=6), lambda: nn.Linear(40, 5)])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_adapt_is_gradient_descent_and_leaves_the_model(make, mode):
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(12, 40).double(), torch.arange(12) % 5
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with mode():
        found = fobmaml.adapt(model, GradientDescent(steps=4, lr=0.2), F.cross_entropy, x, y, lam=0.3)
    assert type(found) is type(model)
    for name, wanted in _by_hand(model, F.cross_entropy, x, y, 0.3, 4, 0.2).items():
        assert torch.allclose(found.get_parameter(name), wanted, rtol=1e-9, atol=1e-12), name
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in found.named_parameters()} == trainable
    F.cross_entropy(found(x), y).backward()  # it is a module like any other
    assert {p.data_ptr() for p in found.state_dict().values()}.isdisjoint(
        p.data_ptr() for p in model.state_dict().values()
    )
    for values in found.state_dict().values():
        values.zero_()
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_adapt_moves_what_it_is_asked_to():
    torch.manual_seed(0)
    model, x, y = PlainMLP(), torch.randn(12, 40), torch.arange(12) % 5
    found = fobmaml.adapt(model, GradientDescent(steps=2), F.cross_entropy, x, y, adapt="head")
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, found.get_parameter(name))]
    assert moved == [name for name, _ in model.named_parameters()][-2:]


def test_what_is_tied_stays_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model, x = Tied(), torch.randn(6, 4)
    found = fobmaml.adapt(model, GradientDescent(steps=3), F.mse_loss, x, torch.ones(6, 4))
    assert found.second.weight is found.first.weight
    assert not torch.equal(found.first.weight, model.first.weight)


def test_many_tasks_are_the_single_ones():
    torch.manual_seed(1)
    model = MLP((3,), 2, width=4, depth=1)
    x, y, new = torch.randn(30, 8, 3), torch.arange(8).remainder(2).expand(30, 8), torch.randn(30, 5, 3)
    solver = Adam(steps=5, lr=0.05)
    many = fobmaml.adapt_tasks(model, solver, F.cross_entropy, x, y, lam=0.1, task_chunk=7)
    assert len(many) == 30 == len(list(many))
    assert many(new).shape == (30, 5, 2)
    assert not many(new).requires_grad
    for task in (0, 13, 29):
        one = fobmaml.adapt(model, solver, F.cross_entropy, x[task], y[task], lam=0.1)
        assert torch.allclose(many[task](new[task]), one(new[task]), atol=1e-6)
        assert torch.allclose(many(new)[task], one(new[task]), atol=1e-6)
    with pytest.raises(ValueError, match=r"x=\[29, 5, 3\]: takes \[30 tasks, examples, \.\.\.\]"):
        many(new[1:])


def test_a_solver_that_draws_batches_draws_the_same():
    model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.arange(20) % 2
    first, second = (
        fobmaml.adapt(model, GradientDescent(steps=5, batch=3), F.cross_entropy, x, y).weight for _ in range(2)
    )
    assert torch.equal(first, second)
    several = fobmaml.adapt_tasks(
        model, GradientDescent(steps=5, batch=3), F.cross_entropy, x.expand(4, -1, -1), y.expand(4, -1)
    )
    assert all(torch.allclose(network.weight, first, atol=1e-6) for network in several)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    fobmaml.adapt(model, GradientDescent(steps=5, batch=3), F.cross_entropy, x, y)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_arrays_and_other_dtypes_are_taken(trained, tmp_path):
    trained()
    run = fobmaml.load_run(tmp_path)
    tasks = run.data.sample("test", 1, torch.Generator().manual_seed(0))
    x, y, new = tasks.support_x[0], tasks.support_y[0], tasks.query_x[0]
    assert x.dtype == torch.float64
    wanted = run.predict_proba(run.adapt(x.float(), y), new.float())
    network = run.adapt(x.numpy(), y.numpy().astype(np.int32))
    assert torch.equal(run.predict_proba(network, new.numpy()), wanted)
    assert torch.allclose(wanted.sum(1), torch.ones(len(new)))
    assert torch.equal(wanted.argmax(1), run.predict(network, new))
    many = run.adapt_tasks(x[None], y[None])
    assert torch.allclose(run.predict_proba(many, new[None])[0], wanted, atol=1e-6)


def test_bad_examples_are_named(trained, tmp_path):
    trained()
    run, x, y = fobmaml.load_run(tmp_path), torch.randn(10, 40), torch.arange(10) % 5
    for bad_x, bad_y, text in (
        (x, y[:9], "support_y=.*takes 10 examples a task"),
        (x, y + 1, "label"),
        (x[:, :1], y, "inputs"),
        ("x", y, "support_x=str: takes a tensor or an array"),
        (x, np.array(["a"] * 10), "y=ndarray: takes a tensor or an array of numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            run.adapt(bad_x, bad_y)
    with pytest.raises(ValueError, match="solver=float: takes a fobmaml"):
        fobmaml.adapt(nn.Linear(40, 5), 0.1, F.cross_entropy, x, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lam=-1: takes a finite number of at least 0"):
        fobmaml.adapt(nn.Linear(40, 5), GradientDescent(), F.cross_entropy, x, y, lam=-1)


def test_what_has_no_classes_has_no_probabilities(trained, tmp_path):
    trained("dataset=sinusoid", "estimator=fomaml")
    run, x = fobmaml.load_run(tmp_path), torch.randn(6, 1)
    network = run.adapt(x, x.sin())
    assert torch.equal(run.predict(network, x), network(x))
    with pytest.raises(ValueError, match="predict_proba=mean squared error: takes a run whose loss makes prob"):
        run.predict_proba(network, x)
    trained("dataset.loss=mse", "estimator=fomaml")
    run, x = fobmaml.load_run(tmp_path), torch.randn(5, 40)
    network = run.adapt(x, torch.arange(5))
    assert torch.equal(run.predict(network, x), network(x).argmax(1))
    with pytest.raises(ValueError, match="predict_proba=mean squared error"):
        run.predict_proba(network, x)


class Tokens:
    """As many classes as positions; ``last``: the layout [N, L, C], else [N, C, L]."""

    input_shape, outputs, classification = (3,), 3, True

    def __init__(self, last: bool):
        self.last = last

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.mT if self.last else outputs, targets)

    def sample(self, split, count, generator):
        raise NotImplementedError


@pytest.mark.parametrize("last", [True, False])
def test_the_loss_tells_which_dimension_is_the_classes(trained, tmp_path, last):
    trained()
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    state["config"]["model"] = {"_target_": "fobmaml.models.MLP", "depth": 0}
    state["model"] = MLP((3,), 3, depth=0).state_dict()
    save_checkpoint(tmp_path / "checkpoint.pt", state, state.pop("config"))
    run = fobmaml.load_run(tmp_path, data=Tokens(last))
    outputs = torch.randn(4, 3, 3)
    assert torch.equal(run.predict(nn.Identity(), outputs), outputs.argmax(2 if last else 1))
    assert torch.allclose(run.predict_proba(nn.Identity(), outputs).sum(2 if last else 1), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"outputs=\[4, 2, 2\]: takes 3 classes"):
        run.predict(nn.Identity(), outputs[:, :2, :2])


def _with_settings(folder: Path, group: str, settings: dict) -> None:
    state = read_checkpoint(folder / "checkpoint.pt")
    config = state.pop("config")
    save_checkpoint(folder / "checkpoint.pt", state, {**config, group: settings})


@pytest.mark.parametrize(
    ("group", "settings"),
    [
        ("model", {"_target_": "os.system", "command": "touch executed"}),
        ("model", {"_target_": "fobmaml.run.provenance.subprocess.run", "args": ["touch", "executed"]}),
        ("model", {"_target_": "fobmaml.files.os.system", "command": "touch executed"}),
        ("model", {"_target_": "fobmaml.run.events.EventLog", "path": "executed"}),
        (
            "model",
            {"_target_": "fobmaml.models.CNN1d", "width": {"_target_": "os.system", "command": "touch executed"}},
        ),
        ("dataset", {"_target_": "fobmaml.tasks.MNIST1D", "_args_": [{"_target_": "os.getpid"}]}),
        ("dataset", {"_target_": "builtins.open", "file": "executed", "mode": "w"}),
        ("solver", {"_target_": "outside.Solver"}),
        ("eval", {"solver": {"_target_": "outside.Solver"}, "lam": None}),
        ("estimator", {"_target_": 3}),
    ],
)
def test_a_file_makes_nothing_but_parts_of_fobmaml(trained, tmp_path, monkeypatch, group, settings):
    trained()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outside.py").write_text("open('executed', 'w')\n")
    _with_settings(tmp_path, group, settings)
    with pytest.raises(
        ValueError, match=r"_target_=.*: takes a data set, network, solver or estimator of fobmaml's"
    ) as e:
        fobmaml.load_run(tmp_path)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "executed").exists()


def test_other_classes_are_a_matter_of_trust(trained, tmp_path, monkeypatch):
    trained("estimator=fomaml")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_user.py").write_text(
        "from fobmaml.solvers import GradientDescent\nclass Mine(GradientDescent):\n    mine = True\n"
    )
    _with_settings(tmp_path, "solver", {"_target_": "of_a_user.Mine", "steps": 3, "_convert_": "all"})
    with pytest.raises(ValueError, match=r"solver\._target_=of_a_user\.Mine: takes .*; trust=True takes any"):
        fobmaml.load_run(tmp_path)
    run = fobmaml.load_run(tmp_path, trust=True)
    assert run.estimator.solver.mine
    assert run.estimator.solver.steps == 3


@pytest.mark.parametrize(
    ("group", "settings", "text"),
    [
        ("solver", {"_target_": "fobmaml.solvers.Gone"}, r"solver\._target_=fobmaml\.solvers\.Gone: takes what can be"),
        ("solver", {"_target_": "fobmaml.solvers.Adam", "speed": 3}, "solver: fobmaml.solvers.Adam refuses .*speed"),
        ("solver", {"_target_": "fobmaml.models.MLP", "input_shape": [2], "outputs": 2}, "one that makes a .*Solver"),
        ("dtype", "float16", "dtype=float16: takes one of float32, float64"),
    ],
)
def test_settings_that_cannot_be_taken_are_named(trained, tmp_path, group, settings, text):
    trained()
    _with_settings(tmp_path, group, settings)
    with pytest.raises(ValueError, match=text):
        fobmaml.load_run(tmp_path)


def test_a_folder_without_a_whole_checkpoint_is_refused(trained, tmp_path):
    with pytest.raises(fobmaml.saved.CheckpointError, match="takes a checkpoint file, and there is none"):
        fobmaml.load_run(tmp_path)
    with pytest.raises(ValueError, match="device=gpu: takes a device of torch's"):
        fobmaml.load_run(tmp_path, device="gpu")
    trained()
    _with_settings(tmp_path, "dataset", {"_target_": "fobmaml.tasks.MNIST1D", "ways": 4})
    with pytest.raises(
        fobmaml.saved.CheckpointError, match=r"checkpoint\.pt: .*no run can be made.*size mismatch"
    ) as e:
        fobmaml.load_run(tmp_path)
    assert "\n" not in str(e.value)


def test_a_file_is_enough_without_hydra_or_the_data(trained, tmp_path):
    """On a machine that has torch and numpy alone; and nothing of what torch takes seconds to import."""
    trained()
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRA}))
import torch, fobmaml
class Like:
    input_shape, outputs, classification = (40,), 5, True
    loss_fn = staticmethod(torch.nn.functional.cross_entropy)
    def sample(self, split, count, generator): ...
run = fobmaml.load_run({str(tmp_path / "checkpoint.pt")!r}, data=Like())
network = run.adapt(torch.randn(10, 40), torch.arange(10) % 5)
print(run.predict(network, torch.randn(7, 40)).shape, fobmaml.read_runs({str(tmp_path)!r})[0]["status"])
print([name for name in ("sympy", "torch._dynamo", "torch.distributed.tensor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([7]) unfinished\n[]\n"


@pytest.fixture
def adapted(trained, tmp_path) -> tuple[nn.Module, Tensor]:
    trained()
    run = fobmaml.load_run(tmp_path)
    tasks = run.data.sample("test", 1, torch.Generator().manual_seed(0)).to(dtype=torch.float32)
    return run.adapt(tasks.support_x[0], tasks.support_y[0]), tasks.query_x[0]


def test_an_adapted_network_is_exported(adapted, tmp_path):
    network, x = adapted
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("examples")},))
    torch.export.save(exported, tmp_path / "network.pt2")
    again = torch.export.load(tmp_path / "network.pt2").module()
    for examples in (x, x[:3]):
        assert torch.allclose(again(examples), network(examples), atol=1e-6)


def test_an_adapted_network_is_written_as_onnx(adapted, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network, x = adapted
    torch.onnx.export(network.eval(), (x,), str(tmp_path / "network.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "network.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, network(x).detach().numpy(), atol=1e-5)
