"""A measurement, a solver and an estimator from a user's own package, each in a few lines, by the command line."""

import json
import math
import os
import re
from pathlib import Path

import pytest

QUICK = (
    "width=4",
    "steps=4",
    "log_every=1",
    "eval.tasks=20",
    "eval.validation_tasks=10",
    "bias.every=0",
    "wandb.mode=disabled",
    "hydra.run.dir=run",
)

MEASUREMENT = {
    "mine/__init__.py": """
import torch
from fobmaml.measure import Periodic

class Agreement(Periodic):
    keys = {"agreement/cosine": "of two validation tasks' meta-gradients, mean over pairs"}

    def __call__(self, training):
        tasks, theta = training.placed(training.fixed("validation", 4)), training.learner.theta()
        g = torch.nn.functional.normalize(training.estimator(training.learner, theta, tasks).gradients)
        return {"agreement/cosine": float((g @ g.T).triu(1).sum() / 6)}
""",
    "mine/configs/measure/agreement.yaml": """
# @package agreement
_target_: mine.Agreement
every: 2 # meta-steps
""",
}

SOLVER = {
    "mine/__init__.py": """
from fobmaml.solvers import Solution, Solver

class Nesterov(Solver):
    def __init__(self, steps: int, lr: float):
        self.steps, self.lr = steps, lr

    def solve(self, problem):
        phi = ahead = problem.theta
        for k in range(self.steps):
            before, phi = phi, ahead - self.lr * problem.gradient(ahead)
            ahead = phi + k / (k + 3) * (phi - before)
        return Solution(problem, phi - problem.theta)
""",
    "mine/configs/solver/nesterov.yaml": """
_target_: mine.Nesterov
steps: 10
lr: 0.1
""",
}

ESTIMATOR = {
    "mine/__init__.py": """
from fobmaml.estimators import Estimate, Estimator

class Both(Estimator):
    needs_proximal_term = False

    def __init__(self, solver, lam: float, share: float):
        super().__init__(solver, lam)
        self.share = share

    def __call__(self, learner, theta, tasks):
        solution = self.adapt(learner, theta, tasks)
        gradient = learner.query_gradient(solution.phi, tasks) - self.share * solution.displacement
        return Estimate(gradient, lambda: solution)
""",
    "mine/configs/estimator/both.yaml": """
_target_: mine.Both
lam: 0.0
share: 0.5
""",
}


@pytest.fixture
def run_with(run_train, tmp_path):
    """The command line with a package of the user's, in ``tmp_path/mine``, and its settings."""

    def call(package: dict[str, str], *overrides: str):
        assert sum(len(text.strip().splitlines()) for text in package.values()) < 20
        for name, text in package.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text.lstrip())
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return run_train("--config-dir=mine/configs", *overrides, env={"PYTHONPATH": os.pathsep.join(paths)})

    return call


def _summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_a_measurement(run_with, tmp_path):
    done = run_with(MEASUREMENT, *QUICK, "+measure=agreement")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {event["step"]: event["agreement/cosine"] for event in events if "agreement/cosine" in event}
    assert list(found) == [0, 2, 4]
    assert all(-1 <= value <= 1 for value in found.values())
    summary = _summary(tmp_path)
    assert summary["agreement/cosine"] == found[4]
    assert summary["test/accuracy"] is not None  # the others are there as before
    assert run_with(MEASUREMENT, *QUICK, "+measure=agreement", "agreement.every=-1").stderr == (
        "error: agreement.every=-1: takes a whole number of at least 0\n"
    )
    assert re.search(
        r"agreement/cosine +of two validation tasks", run_with(MEASUREMENT, "+measure=agreement", "--help").stdout
    )


def test_measurements_can_be_left_out(run_with, tmp_path):
    done = run_with(MEASUREMENT, *(setting for setting in QUICK if setting != "bias.every=0"), "measure=[agreement]")
    assert done.returncode == 0, done.stderr
    assert "meta-steps" in done.stdout
    assert "accuracy" not in done.stdout
    assert not {"val/loss", "test/loss", "memory/peak_bytes", "bias/cosine"} & _summary(tmp_path).keys()


def test_a_solver(run_with, tmp_path):
    done = run_with(SOLVER, *QUICK, "solver=nesterov", "solver.steps=5")
    assert done.returncode == 0, done.stderr
    summary = _summary(tmp_path)
    assert summary["choices"]["solver"] == "nesterov"
    assert summary["config"]["solver"] == {"_target_": "mine.Nesterov", "steps": 5, "lr": 0.1}
    assert 0 < summary["inner/residual"] < math.inf


def test_an_estimator(run_with, tmp_path):
    done = run_with(ESTIMATOR, *QUICK, "estimator=both", "estimator.share=0.25", "bias.every=4")
    assert done.returncode == 0, done.stderr
    assert re.search(r"estimator +both\n", done.stdout)
    summary = _summary(tmp_path)
    assert summary["config"]["estimator"]["share"] == 0.25
    assert 0 < summary["bias/relative_error"] < math.inf  # against back-propagation through the steps, as lam=0
