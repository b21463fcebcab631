"""What several tests need: float64 problems, reference solutions computed another way, and the command line."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import POSSIBLE, Forks
from torch import Tensor, nn

from fobmaml import Learner, TaskBatch
from fobmaml.engine import library
from fobmaml.models import MLP
from fobmaml.solvers import InnerProblem, Solution, Solver
from fobmaml.tasks import MNIST1D, Logistic

ROOT = Path(__file__).parents[1]
OF_WANDB = (
    "MODE",
    "DISABLED",
    "PROJECT",
    "ENTITY",
    "NAME",
    "RUN_GROUP",
    "TAGS",
    "NOTES",
    "RUN_ID",
    "API_KEY",
    "BASE_URL",
)
READ_BY_A_RUN = {
    "HYDRA_FULL_ERROR",
    "PYTHONPATH",
    "ID",
    "TASKS",
    "NU",
    "FIXED",
    *(f"WANDB_{name}" for name in OF_WANDB),
}
"""Variables of the environment that are read by a run, and not by an import."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too: tests run side by side


@pytest.fixture
def used_memory(monkeypatch):
    """Memory that compiled code is given holds what was there before."""
    empty = torch.empty

    def used(*sizes, **about):
        memory = empty(*sizes, **about)
        return memory.fill_(255) if memory.dtype == torch.uint8 else memory  # as float32: not a number

    monkeypatch.setattr(torch, "empty", used)


@pytest.fixture(autouse=True)
def one_thread():
    """Problems are small, and threads cost more than they give; a test, or a program that it calls, may take more."""
    torch.set_num_threads(1)


@pytest.fixture(params=["neon"] if platform.machine() in library.ARM else ["avx512", "avx2"])
def instructions(request, monkeypatch):
    """The compiled kernel for each set of vector instructions that this processor has."""
    own = library.instructions()
    if request.param != own and (own, request.param) != ("avx512", "avx2"):
        pytest.skip(f"{request.param} is not used here")
    monkeypatch.setattr(library, "instructions", lambda: request.param)
    library.kernel.cache_clear()
    if library.kernel() is None:
        pytest.skip("the kernel was not compiled")
    yield
    library.kernel.cache_clear()


@pytest.fixture(scope="session")
def mnist1d() -> MNIST1D:
    return MNIST1D()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def run_train(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line as a user would, in a folder of the test's own: run_train("steps=3", ...). With an ``env``
    that may change what an import does, by a Python of its own."""

    def call(*overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        if not POSSIBLE or not READ_BY_A_RUN.issuperset(env or {}):
            return subprocess.run(
                command, cwd=tmp_path, text=True, capture_output=True, timeout=1500, env={**os.environ, **(env or {})}
            )
        forks = request.getfixturevalue("forks")
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            forks.start(overrides, tmp_path, out.name, err.name, {**os.environ, **(env or {})})
            return subprocess.CompletedProcess(command, forks.wait(), *(Path(f.name).read_text() for f in (out, err)))

    return call


def start_train(folder: Path, *overrides: str, by: tuple[str, ...] = (), **options: object) -> subprocess.Popen[str]:
    """The command line in ``folder``, not waited for; ``by``: a module that starts it, and its arguments."""
    return subprocess.Popen(
        [sys.executable, *by, str(ROOT / "train.py"), *overrides],
        cwd=folder,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until a process that goes on has done something; five minutes at most."""
    limit = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < limit, "waited five minutes"
        time.sleep(0.005)


def processes_in(folder: Path) -> Iterator[tuple[int, str]]:
    """Number and environment of every process whose working folder it is."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder:
                yield int(entry.name), (entry / "environ").read_text()
        except OSError:
            continue


def tasks_of(kind: str, count: int = 4) -> tuple[Learner, TaskBatch]:
    """A linear model in float64 and tasks of ``kind``: logistic or least_squares."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    if kind == "logistic":
        tasks = Logistic(dimension=4, shots=12, queries=9).sample("train", count, generator)
        return Learner(MLP((4,), 2, depth=0).double(), F.cross_entropy), tasks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tasks = TaskBatch(normal(count, 12, 4), normal(count, 12, 2), normal(count, 9, 4), normal(count, 9, 2))
    return Learner(MLP((4,), 2, depth=0).double(), F.mse_loss), tasks


def plain_losses(learner: Learner, tasks: TaskBatch, task: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    """f̂ᵢ and fᵢ as functions of one flat vector, through the module's ordinary forward: no stacking, no vmap."""
    shapes = {name: p.shape for name, p in learner.model.named_parameters() if p.requires_grad}
    turned = {f"{name}.weight" for name, layer in learner.model.named_modules() if isinstance(layer, nn.Conv1d)}

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        parameters = {
            name: part.view(shape[0], shape[2], shape[1]).mT if name in turned else part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        return learner.loss_fn(torch.func.functional_call(learner.model, parameters, (x,)), y)

    return (
        lambda flat: loss(flat, tasks.support_x[task], tasks.support_y[task]),
        lambda flat: loss(flat, tasks.query_x[task], tasks.query_y[task]),
    )


def newton(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 50) -> Tensor:
    """The minimiser of a strongly convex function, by Newton's method with a dense Hessian."""
    phi = start.clone()
    for _ in range(steps):
        step = torch.linalg.solve(torch.func.hessian(loss)(phi), torch.func.grad(loss)(phi))
        phi = phi - step
        if step.norm() < 1e-15 * (1 + phi.norm()):
            break
    return phi


def dense_meta_gradient(learner: Learner, tasks: TaskBatch, lam: float, at: Tensor | None = None) -> Tensor:
    """λ(H + λI)⁻¹∇f, [T, P], with a dense Hessian, at φ* (by Newton) or at the rows ``at``."""
    theta, rows = learner.theta(), []
    for task in range(len(tasks)):
        support, query = plain_losses(learner, tasks, task)
        phi = (
            at[task]
            if at is not None
            else newton(lambda p, support=support: support(p) + 0.5 * lam * (p - theta).square().sum(), theta)
        )
        hessian = torch.func.hessian(support)(phi)
        eye = torch.eye(len(theta), dtype=theta.dtype)
        rows.append(lam * torch.linalg.solve(hessian + lam * eye, torch.func.grad(query)(phi)))
    return torch.stack(rows)


class NewtonSolver(Solver):
    """Solves every row with a dense Hessian, then moves it by ``delta`` in a random direction: an inner solve of known
    precision."""

    def __init__(self, delta: float = 0.0, seed: int = 0):
        self.delta, self.generator = delta, torch.Generator().manual_seed(seed)

    def solve(self, problem: InnerProblem) -> Solution:
        phi = problem.theta.clone()
        for _ in range(30):
            gradient, product = problem.linearize(phi)
            columns = [product(unit.expand_as(phi).contiguous()) for unit in torch.eye(phi.shape[1], dtype=phi.dtype)]
            step = torch.linalg.solve(torch.stack(columns, dim=2), gradient)
            phi = phi - step
            if step.norm() < 1e-15 * (1 + phi.norm()):
                break
        error = torch.randn(phi.shape, generator=self.generator, dtype=phi.dtype)
        phi = phi + self.delta * error / error.norm(dim=1, keepdim=True)
        return Solution(problem, phi - problem.theta, torch.zeros(problem.rows))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class PlainMLP(nn.Module):
    """A module that does not list its layers, with a tied, a frozen and a normalisation layer: a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(40, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.GroupNorm(2, 8))
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.inner(x)) * self.scale)
