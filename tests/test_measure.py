"""Memory agrees with the process's own, and bias with a dense solve."""

import json
import os
import subprocess
import sys

import module_cases
import pytest
import torch
import torch.nn.functional as F
from conftest import dense_meta_gradient, plain_losses, relative_error, tasks_of

from fobmaml import Learner
from fobmaml.estimators import FOMAML, MAML, Reptile, Symmetric, estimate
from fobmaml.measure import bias, curvature, peak_bytes, smoothness
from fobmaml.models import CNN1d
from fobmaml.solvers import BarzilaiBorwein, GradientDescent, InnerProblem, NewtonCG
from fobmaml.tasks import MNIST1D

MB = 2**20


def test_peak_counts_what_is_alive_at_once():
    def computation():
        a = torch.ones(MB, dtype=torch.uint8)
        b = torch.ones(2 * MB, dtype=torch.uint8)  # 3 MB alive
        del a
        c = torch.ones(MB // 2, dtype=torch.uint8)  # 2.5 MB
        return b, c

    assert peak_bytes(computation) == 3 * MB


def test_peak_sees_temporaries_inside_operators():
    x, y = torch.ones(64, 128, 32), torch.ones(64, 32, 16)
    product = 64 * 128 * 16 * 4
    assert peak_bytes(lambda: torch.bmm(x, y)) == product
    strided = torch.ones(32, 64, 128).permute(1, 2, 0)[:, ::2]  # reshaping it inside an operator takes a copy
    assert peak_bytes(lambda: torch.tensordot(strided, y[0], dims=([2], [0]))) >= product / 2 + 64 * 64 * 32 * 4


def test_peak_does_not_count_what_was_there_before():
    held = [torch.ones(4 * MB, dtype=torch.uint8)]
    assert peak_bytes(lambda: held.append(torch.ones(MB, dtype=torch.uint8))) == MB
    assert peak_bytes(held.clear) == 0


SCRIPT = """
import ctypes, json, sys, torch
import torch.nn.functional as F
from fobmaml import Learner
from fobmaml.estimators import MAML, Symmetric, estimate
from fobmaml.measure import peak_bytes
from fobmaml.models import CNN1d
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D

torch.set_num_threads(1)
kind, width, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
solver = GradientDescent(steps, 0.1)
estimator = MAML(solver) if kind == "maml" else Symmetric(solver)
learner = Learner(CNN1d((40,), 5, width=width), F.cross_entropy)
tasks = MNIST1D().sample("train", 16, torch.Generator().manual_seed(0)).to(dtype=torch.float32)
small = Learner(CNN1d((40,), 5, width=2), F.cross_entropy)

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

estimate(estimator, small, small.theta(), tasks, diagnose=False)  # loads the kernels
theta = learner.theta()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again at the present
before = status("VmRSS")
estimate(estimator, learner, theta, tasks, diagnose=False)
grown = status("VmHWM") - before
print(json.dumps({"grown": grown, "measured": peak_bytes(lambda: estimate(estimator, learner, theta, tasks,
                                                                          diagnose=False))}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "width", "steps"), [("maml", 256, 4), ("symmetric", 320, 2)])
def test_cpu_memory_agrees_with_resident_memory(kind, width, steps):
    """Within 15 % of the growth of the process's peak resident memory, on cases of hundreds of MB.

    The C library is told to give freed blocks back at once: it otherwise keeps some, and resident memory then measures
    its fragmentation too.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(width), str(steps)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
    )
    found = json.loads(done.stdout)
    assert found["measured"] > 150 * MB
    assert found["measured"] == pytest.approx(found["grown"], rel=0.15)


@pytest.mark.parametrize("kind", [MAML, Symmetric])
def test_memory_against_inner_steps(mnist1d, kind):
    """The claim itself: flat for symmetric, growing with the steps for MAML by its activations."""
    learner = Learner(CNN1d((40,), 5, width=8), F.cross_entropy, engine="stacked")
    tasks = mnist1d.sample("train", 4, torch.Generator().manual_seed(0)).to(dtype=torch.float32)
    peaks = [
        peak_bytes(lambda k=k: estimate(kind(GradientDescent(k)), learner, learner.theta(), tasks, diagnose=False))
        for k in (2, 20)
    ]
    if kind is MAML:
        assert peaks[1] > 5 * peaks[0]
    else:
        assert peaks[1] <= 1.01 * peaks[0]


def test_bias_is_the_distance_to_the_dense_meta_gradient():
    learner, tasks = tasks_of("logistic")
    wanted = dense_meta_gradient(learner, tasks, 0.7).mean(0)
    for estimator in (FOMAML(GradientDescent(5), 0.7), Symmetric(BarzilaiBorwein(tol=1e-10), 0.7, 1e-3)):
        returned = estimate(estimator, learner, learner.theta(), tasks).gradient
        found = bias(estimator, learner, tasks)
        assert found.relative_error == pytest.approx(relative_error(returned, wanted), rel=1e-4, abs=1e-8)
        assert found.cosine == pytest.approx(float(torch.cosine_similarity(returned, wanted, dim=0)), rel=1e-6)
        assert found.reference == "exact, lam=0.7"


def test_bias_of_batches_is_that_of_their_mean():
    learner, tasks = tasks_of("logistic")
    theta = learner.theta()
    wanted = dense_meta_gradient(learner, tasks, 0.7).mean(0)

    def alone(count):
        drawn = [tasks.keyed(torch.Generator().manual_seed(seed)) for seed in range(count)]
        return torch.stack([estimate(estimator, learner, theta, each, diagnose=False).gradient for each in drawn])

    estimator = Symmetric(GradientDescent(20, 0.3, batch=2, query_batch=2), 0.7, 1e-3)
    single = alone(600)
    exactly = relative_error(single.mean(0), wanted)
    noise = float((single - single.mean(0)).norm(dim=1).square().mean().sqrt() / wanted.norm())
    found = bias(estimator, learner, tasks)
    assert found == bias(estimator, learner, tasks.keyed())  # whatever was drawn
    assert abs(found.relative_error - exactly) < 3 * noise / 128**0.5
    assert noise > exactly  # of a single draw little is bias
    assert bias(estimator, learner, tasks, draws=1).relative_error == pytest.approx(relative_error(single[0], wanted))
    same = bias(MAML(estimator.solver), learner, tasks.keyed())
    assert same.relative_error < 1e-5  # its reference makes the same draws


def test_bias_without_a_proximal_term_is_against_the_unrolled_objective(mnist1d):
    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 5, width=8), F.cross_entropy)
    tasks = mnist1d.sample("train", 4, torch.Generator().manual_seed(0))
    own = bias(MAML(GradientDescent()), learner, tasks)
    assert own.relative_error < 1e-5
    assert own.reference.startswith("exact after the solver's steps")
    assert 0.01 < bias(FOMAML(GradientDescent()), learner, tasks).relative_error < 1
    assert bias(Reptile(BarzilaiBorwein()), learner, tasks).reason is not None


def test_bias_that_cannot_be_had_says_why(mnist1d, monkeypatch):
    monkeypatch.setattr(sys.modules["fobmaml.measure.bias"], "NewtonCG", lambda tol: NewtonCG(steps=1, tol=tol))
    learner = Learner(CNN1d((40,), 5, width=8), F.cross_entropy)
    tasks = mnist1d.sample("train", 4, torch.Generator().manual_seed(0))
    found = bias(Symmetric(GradientDescent()), learner, tasks)
    assert found.relative_error is None
    assert found.cosine is None
    assert found.reason.startswith("inner solve: 4 of 4 tasks")


def test_smoothness_of_a_quadratic_is_its_hessian_along_the_gradient():
    """Least squares and a linear model: after K steps F is still a quadratic, and its Hessian A is constant."""
    learner, tasks = tasks_of("least_squares")
    solver = GradientDescent(steps=3, lr=0.1)

    def objective(theta):
        total = 0.0
        for task in range(len(tasks)):
            support, query = plain_losses(learner, tasks, task)
            phi = theta
            for _ in range(3):
                phi = phi - 0.1 * torch.func.grad(support)(phi)
            total = total + query(phi) / len(tasks)
        return total

    theta = learner.theta()
    a, g = torch.func.jacrev(torch.func.grad(objective))(theta), torch.func.grad(objective)(theta)
    for radius in (1e-3, 1.0):
        found = smoothness(MAML(solver), learner, tasks, radius)
        assert found.local == pytest.approx(float((a @ g).norm() / g.norm()), rel=1e-9)
        assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    with pytest.raises(ValueError, match=r"^radius=0: takes a finite number above 0"):
        smoothness(MAML(solver), learner, tasks, 0)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_curvature_is_that_of_the_dense_hessian_and_jacobian(loss):
    source = MNIST1D(ways=3, shots=2, queries=2, loss=loss)
    tasks = source.sample("train", 2, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 3, width=4).double(), source.loss_fn)
    theta, solver = learner.theta(), GradientDescent(steps=4, lr=0.2)
    found = curvature(learner, tasks, solver)
    wanted = []
    for task in range(2):
        hessian = torch.func.hessian(plain_losses(learner, tasks, task)[0])(theta)
        outputs = lambda flat, x=tasks.support_x[task]: torch.func.functional_call(  # noqa: E731
            learner.model, learner.unflatten(flat), (x,)
        )
        j, m = torch.func.jacrev(outputs)(theta), outputs(theta)  # [N, C, P], [N, C]
        p = m.softmax(-1)
        b = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1) if loss == "cross_entropy" else 2 / 3 * torch.eye(3)
        gauss_newton = torch.einsum("ncp,ncd,ndq->pq", j, b.expand(len(m), 3, 3).to(j), j) / len(m)
        spectra = [torch.linalg.eigvalsh(part) for part in (hessian, gauss_newton, hessian - gauss_newton)]
        wanted.append([s.abs().max() for s in spectra] + [spectra[0].min()])
    values = torch.tensor(wanted, dtype=torch.float64).mean(0).tolist()
    assert [found.hessian, found.gauss_newton, found.network, found.lowest] == pytest.approx(values, rel=1e-6)
    exact, first_order = (estimate(kind(solver), learner, theta, tasks).gradient for kind in (MAML, FOMAML))
    assert found.fomaml_error == pytest.approx(relative_error(first_order, exact), rel=1e-9)
    assert 0 < found.gauss_newton_error < found.fomaml_error


@pytest.mark.parametrize("case", ["our mlp", "lstm", "transformer layer"])
@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.smooth_l1_loss, F.cross_entropy])
def test_curvature_of_other_networks_and_losses(case, loss_fn):
    torch.manual_seed(0)
    targets = torch.randint if loss_fn is F.cross_entropy else None
    batch = module_cases.tasks(
        module_cases.vectors, lambda *s: targets(3, s) if targets else torch.randn(*s, 3, dtype=torch.float64), count=1
    )
    model = module_cases.made(module_cases.VECTORS[case], batch.support_x[0])
    learner, solver = Learner(model, loss_fn), GradientDescent(steps=3, lr=0.1)
    found = curvature(learner, batch, solver)
    theta, size = learner.theta(), learner.parameter_count
    problem = InnerProblem(learner, theta, batch[:1], 0.0)
    columns = [problem.linearize(theta.expand(1, -1))[1](unit[None])[0] for unit in torch.eye(size, dtype=theta.dtype)]
    eigenvalues = torch.linalg.eigvalsh(torch.stack(columns))
    assert found.hessian == pytest.approx(float(eigenvalues.abs().max()), rel=1e-8)
    assert found.lowest == pytest.approx(float(eigenvalues.min()), rel=1e-6, abs=1e-9)
    exact, first_order = (estimate(kind(solver), learner, theta, batch).gradient for kind in (MAML, FOMAML))
    assert found.fomaml_error == pytest.approx(relative_error(first_order, exact), rel=1e-8)


def test_a_linear_model_has_no_curvature_of_its_own():
    learner, tasks = tasks_of("logistic")
    found = curvature(learner, tasks, GradientDescent(steps=3, lr=0.5))
    assert found.network < 1e-12 * found.hessian
    assert found.gauss_newton_error < 1e-12 < 1e-3 < found.fomaml_error
    with pytest.raises(ValueError, match=r"^solver: momentum=0.5, batch=None: takes 0"):
        curvature(learner, tasks, GradientDescent(steps=3, momentum=0.5))


def test_an_estimator_may_bring_its_own_reference(mnist1d):
    """FO-MAML against the gradient of the loss after two steps, whatever its λ."""

    class Short(FOMAML):
        def reference(self, tol):
            return MAML(GradientDescent(2, 0.1)), "two steps"

    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 5, width=4).double(), F.cross_entropy)
    tasks = mnist1d.sample("train", 2, torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    solver = GradientDescent(2, 0.1)
    own, usual = bias(Short(solver, lam=0.5), learner, tasks), bias(FOMAML(solver), learner, tasks)
    exact = estimate(MAML(solver), learner, learner.theta(), tasks).gradient
    found = estimate(FOMAML(solver, lam=0.5), learner, learner.theta(), tasks).gradient
    assert own.reference == "two steps"
    assert own.relative_error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-9)
    assert usual.reference == "exact after the solver's steps, lam=0"
