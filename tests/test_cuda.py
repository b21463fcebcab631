"""On a GPU: the values, the precision, the memory and the command line. Skipped where there is none."""

import copy
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import QUIET, start_train, wait_until
from module_cases import (
    CASES,
    ESTIMATORS,
    FIRST_DERIVATIVES_ONLY,
    LOSSES,
    Plain,
    made,
    tasks,
)
from torch import Tensor, nn

import fobmaml
from fobmaml import estimators, solvers
from fobmaml.measure import peak_bytes
from fobmaml.models import CNN1d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def _flat(result: fobmaml.MetaGradient) -> Tensor:
    return torch.cat([g.flatten() for g in result.gradient.values()])


@pytest.mark.parametrize("case", CASES)
def test_modules(case):
    """What plain autograd returns on the CPU, task by task; cuDNN's recurrent layers have no second derivative."""
    torch.manual_seed(0)
    make, x = CASES[case]
    batch = tasks(x, LOSSES["cross_entropy"][1])
    model = made(make, batch.support_x[0])
    plain, wanted = Plain(model, F.cross_entropy, batch), {}
    for name in ("symmetric", "fomaml", *(() if case in FIRST_DERIVATIVES_ONLY else ("maml", "imaml"))):
        wanted[name] = torch.stack([plain.estimate(name, task) for task in range(len(batch))]).mean(0)
    model.cuda()
    for name, right in wanted.items():
        for chunk in (None, 1):
            found = fobmaml.meta_gradient(ESTIMATORS[name], model, F.cross_entropy, batch.to(device="cuda"), chunk)
            error = float((_flat(found).cpu() - right).norm() / right.norm())
            assert error < 1e-9, f"{name}, task_chunk={chunk}, {found.engine}: {error}"


def _signals(count: int = 4) -> fobmaml.TaskBatch:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(count, n, 40, generator=generator) for n in (25, 75)]
    y = [torch.randint(0, 5, (count, n), generator=generator) for n in (25, 75)]
    return fobmaml.TaskBatch(x[0], y[0], x[1], y[1])


def _plain(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, width, 5, 2, 1),
        nn.SiLU(),
        nn.Conv1d(width, width, 3, 2, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


@pytest.mark.parametrize("network", ["ours", "plain"])
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_keeps_its_digits_whatever_the_process_has_set(network, tf32):
    """At ν = 0.01 differences of solutions lose two digits to rounding; in TF32 they would lose all."""
    torch.manual_seed(0)
    model, batch = CNN1d((40,), 5, width=32) if network == "ours" else _plain(32), _signals()
    model(batch.support_x[0])
    estimator = estimators.Symmetric(solvers.GradientDescent(10, 0.1), 0.5, 0.01)
    wanted = _flat(
        fobmaml.meta_gradient(estimator, copy.deepcopy(model).double(), F.cross_entropy, batch.to(dtype=torch.float64))
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=tf32):
            found = fobmaml.meta_gradient(estimator, model.cuda(), F.cross_entropy, batch.to(device="cuda"))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    assert float((_flat(found).cpu() - wanted).norm() / wanted.norm()) < 2e-3
    if network == "ours":
        assert found.engine == "stacked"


LR = [0.1, 0.08, 0.06, 0.05, 0.05]
ON_BATCHES = {
    "symmetric": estimators.Symmetric(solvers.GradientDescent(5, LR, batch=10, query_batch=5), 0.5, 0.01),
    "forward, momentum": estimators.Forward(solvers.GradientDescent(5, 0.1, momentum=0.5, batch=7), 0.5, 0.01),
    "forward, Adam": estimators.Forward(solvers.Adam(5, 0.01, batch=10, query_batch=5), 0.5, 0.01),
    "tangent": estimators.Tangent(solvers.GradientDescent(5, 0.1, batch=10, query_batch=5), 0.5),
    "maml": estimators.MAML(solvers.GradientDescent(5, 0.1, batch=10)),
    "maml, all steps": estimators.MAML(solvers.GradientDescent(5, 0.1), multi_step=0.5, learn_lr=0.1),
    "fomaml": estimators.FOMAML(solvers.GradientDescent(5, 0.1, batch=10)),
    "reptile, Adam": estimators.Reptile(solvers.Adam(5, 0.01, beta1=0.0, batch=10), data="all"),
    "imaml, damped": estimators.IMAML(solvers.GradientDescent(5, 0.1), 2.0, damping=1.0),
}


@pytest.mark.parametrize("case", ON_BATCHES)
@pytest.mark.parametrize("network", ["ours", "plain"])
def test_batches_are_drawn_as_on_the_cpu(case, network):
    torch.manual_seed(0)
    model = (CNN1d((40,), 5, width=8) if network == "ours" else _plain(8)).double()
    model(torch.zeros(1, 40, dtype=torch.float64))
    batch = _signals().to(dtype=torch.float64).keyed(torch.Generator().manual_seed(1))

    def call(tasks: fobmaml.TaskBatch) -> fobmaml.MetaGradient:  # learned step lengths stay with an estimator
        return fobmaml.meta_gradient(copy.deepcopy(ON_BATCHES[case]), model, F.cross_entropy, tasks, task_clip=1e-3)

    wanted = _flat(call(batch))
    model.cuda()
    found = call(batch.to(device="cuda"))
    assert float((_flat(found).cpu() - wanted).norm() / wanted.norm()) < 1e-9
    assert found.clipped.any()


def test_nu_is_chosen_as_on_the_cpu():
    torch.manual_seed(0)
    model, batch = CNN1d((40,), 5, width=8).double(), _signals().to(dtype=torch.float64)
    estimator = estimators.Symmetric(solvers.GradientDescent(5, 0.1), 0.5, "auto")
    wanted = fobmaml.meta_gradient(estimator, model, F.cross_entropy, batch).nu
    found = fobmaml.meta_gradient(estimator, model.cuda(), F.cross_entropy, batch.to(device="cuda")).nu
    assert 0.5 < found / wanted < 2  # it is chosen by the rounding, which is another there


def test_memory_is_flat_in_inner_steps_and_grows_with_mamls():
    batch, model = _signals().to(device="cuda"), CNN1d((40,), 5, width=32).cuda()

    def peak(kind: type[estimators.Estimator], steps: int) -> int:
        estimator = kind(solvers.GradientDescent(steps, 0.01))
        call = lambda: fobmaml.meta_gradient(estimator, model, F.cross_entropy, batch)  # noqa: E731
        call()
        return peak_bytes(call, "cuda")

    assert peak(estimators.Symmetric, 80) < 1.05 * peak(estimators.Symmetric, 10)
    assert peak(estimators.MAML, 80) > 4 * peak(estimators.MAML, 10)


def test_command_line(tmp_path, run_train):
    """Trains there, goes on without the GPU, and measures there."""
    shared = (
        "width=16",
        "steps=300",
        "checkpoint_every=5",
        "eval.tasks=20",
        "bias.every=0",
        "wandb.mode=disabled",
        "hydra.run.dir=run",
    )
    process = start_train(tmp_path, "device=cuda", *shared, **QUIET)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 130
    done = run_train("device=cpu", *shared, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    stages = "inner=[{until: 0.5, steps: 3}]"
    short = ("steps=20", "eval.tasks=20", "bias.every=0", "dtype=float64", "wandb.mode=disabled", stages)
    for device in ("cpu", "cuda"):
        done = run_train(f"device={device}", *short, f"hydra.run.dir={device}")
        assert done.returncode == 0, done.stderr
    on = {d: json.loads((tmp_path / d / "summary.json").read_text()) for d in ("cpu", "cuda")}
    assert on["cuda"]["test/loss"] == pytest.approx(on["cpu"]["test/loss"], rel=1e-9)
    assert on["cuda"]["work/example_gradients"] == on["cpu"]["work/example_gradients"]
    done = run_train(
        "device=cuda",
        "estimator=symmetric",
        "width=16",
        "steps=10",
        "eval.tasks=20",
        "bias.every=5",
        "hydra.run.dir=whole",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["status"], summary["engine"]) == ("completed", "stacked")
    assert summary["memory/peak_bytes"] > 0
    assert summary["bias/reason"] or summary["bias/relative_error"] > 0
