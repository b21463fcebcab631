"""Adaptation at test time has settings of its own, which change nothing else."""

import json
import re

import pytest
import torch
from conftest import plain_losses
from test_training import MEASURED, QUICK

from fobmaml.estimators import FOMAML, IMAML, MAML, Adaptation, Forward, Reptile, Symmetric
from fobmaml.measure.accuracy import score
from fobmaml.models import CNN1d
from fobmaml.optim import SNGDM
from fobmaml.settings import Settings
from fobmaml.solvers import BarzilaiBorwein, GradientDescent
from fobmaml.training import MetaTraining


def _training(source, adaptation=None, estimator=None, **settings):
    torch.manual_seed(0)
    measured = {"validation": {"every": 2, "tasks": 8}, "bias": {"every": 2}, "smoothness": {"every": 2, "tasks": 2}}
    return MetaTraining(
        CNN1d((40,), 5, width=4).double(),
        source,
        estimator or Symmetric(GradientDescent(3)),
        Settings(**QUICK | {"steps": 4, "meta_batch": 4, "log_every": 1} | settings),
        lambda p: SNGDM(p, lr=0.1),
        [MEASURED[name][0](**options | measured.get(name, {})) for name, (_, options) in MEASURED.items()],
        adaptation,
    )


def _run(training):
    events = [training.measure()] + [event | training.measure() for event in training.train()]
    return [{k: v for k, v in event.items() if not k.startswith("time/")} for event in events]


@pytest.mark.parametrize("kind", [Forward, Symmetric, MAML, FOMAML, Reptile, IMAML])
def test_the_score_is_that_of_tasks_adapted_so(mnist1d, kind):
    """Written out with the plain module: other steps, step length and λ than the estimator's."""
    by = Adaptation(GradientDescent(6, 0.05, momentum=0.5), lam=0.3)
    training = _training(mnist1d, by, kind(GradientDescent(2)))
    tasks, learner, losses, right = training.fixed("test", 3), training.learner, [], []
    theta = learner.theta()
    for task in range(3):
        support, query = plain_losses(learner, tasks, task)
        phi, velocity = theta, torch.zeros_like(theta)
        for _ in range(6):
            velocity = 0.5 * velocity + torch.func.grad(support)(phi) + 0.3 * (phi - theta)
            phi = phi - 0.05 * velocity
        losses.append(float(query(phi)))
        outputs = torch.func.functional_call(learner.model, learner.unflatten(phi), (tasks.query_x[task],))
        right.append(float((outputs.argmax(1) == tasks.query_y[task]).double().mean()))
    found = score(training, tasks)
    assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-10)
    assert found.accuracy == pytest.approx(sum(right) / 3)


def test_a_solver_that_the_estimator_itself_refuses_may_adapt(mnist1d):
    """MAML differentiates its own steps only, and at λ = 0 FO-B-MAML has no meta-gradient."""
    by = Adaptation(BarzilaiBorwein(steps=30), lam=0.0)
    for estimator in (MAML(GradientDescent(2)), Symmetric(GradientDescent(2))):
        training = _training(mnist1d, by, estimator)
        tasks = training.fixed("test", 4)
        assert score(training, tasks).loss != score(_training(mnist1d, None, estimator), tasks).loss
        assert (training.estimator.solver.steps, training.estimator.lam) == (2, estimator.lam)  # as they were


def test_only_evaluation_changes(mnist1d):
    plain, other = _training(mnist1d), _training(mnist1d, Adaptation(GradientDescent(20, 0.05)))
    same, changed = _run(plain), _run(other)
    of_evaluation = {"val/accuracy", "val/loss"}
    for one, two in zip(same, changed, strict=True):
        assert one.keys() == two.keys()
        assert {key for key in one if one[key] != two[key]} <= of_evaluation
        assert "val/loss" not in one or one["val/loss"] != two["val/loss"]
    assert torch.equal(plain.learner.theta(), other.learner.theta())
    last, of_other = plain.measure(ended=True), other.measure(ended=True)
    assert last["memory/peak_bytes"] == of_other["memory/peak_bytes"]
    assert last["test/loss"] != of_other["test/loss"]


def test_by_default_it_is_that_of_training(mnist1d):
    for by in (None, Adaptation(), Adaptation(GradientDescent(3), 0.5)):
        training = _training(mnist1d, by)
        assert _run(training) == _run(_training(mnist1d))


@pytest.mark.parametrize(("argument", "value"), [("solver", "gd"), ("lam", -1), ("lam", "x")])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}={'str' if argument == 'solver' else value}: takes"):
        Adaptation(**{argument: value})


RUN = ("width=4", "steps=4", "eval.every=2", "eval.tasks=20", "eval.validation_tasks=10", "bias.every=0")
RUN = (*RUN, "estimator=symmetric", "wandb.mode=disabled")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("eval.solver.steps=0", "eval.solver.steps=0: takes a whole number of at least 1"),
        ("eval.solver.lr=-1", "eval.solver.lr=-1: takes a finite number above 0"),
        ("eval.lam=-1", "eval.lam=-1: takes a finite number of at least 0"),
        ("eval.solver=gd", "eval.solver=gd: takes settings of a solver, or null"),
        (
            "eval.solver._target_=fobmaml.optim.SNGDM",
            "eval.solver: .*missing 1 required positional argument: 'params'",
        ),
        (
            "eval.solver._target_=fobmaml.models.MLP eval.solver.input_shape=[4] eval.solver.outputs=2",
            "eval.solver._target_=fobmaml.models.MLP: takes one that makes a fobmaml.solvers.base.Solver",
        ),
        ("eval.solver.stepz=3", "eval.solver.*'?stepz.*"),
        ("eval.sover.steps=3", "eval.sover.steps: there is no such setting .*"),
    ],
)
def test_bad_settings_are_named(run_train, tmp_path, setting, line):
    done = run_train(*RUN, *setting.split(), "hydra.run.dir=run")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def _summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_by_the_command_line(run_train, tmp_path):
    assert run_train(*RUN, "hydra.run.dir=plain").returncode == 0
    steps = run_train("-m", *RUN, "eval.solver.steps=10,20", "hydra.sweep.dir=sweep")
    assert steps.returncode == 0, steps.stderr
    other = ("eval.solver._target_=fobmaml.solvers.NewtonCG", "eval.solver.steps=3", "eval.lam=2")
    assert run_train(*RUN, *other, "hydra.run.dir=other").returncode == 0
    batches = run_train(*RUN, "estimator=fobmaml", *other, "hydra.run.dir=batches")  # of which this solver has none
    assert batches.returncode == 0, batches.stderr
    plain, newton = _summary(tmp_path / "plain"), _summary(tmp_path / "other")
    ten, twenty = (_summary(next((tmp_path / "sweep").glob(f"*eval.solver.steps={steps}*"))) for steps in (10, 20))
    assert ten["test/loss"] == plain["test/loss"]  # as many as in training
    assert len({summary["test/loss"] for summary in (plain, twenty, newton)}) == 3
    for summary in (ten, twenty, newton):
        for key in ("train/loss", "meta_gradient/norm", "memory/peak_bytes", "work/example_gradients"):
            assert summary[key] == plain[key]
    assert (plain["config"]["eval"]["solver"], plain["config"]["eval"]["lam"]) == ({}, None)
    assert twenty["config"]["eval"]["solver"] == {"steps": 20}
    assert newton["config"]["eval"]["solver"] == {"_target_": "fobmaml.solvers.NewtonCG", "steps": 3}
    again = run_train(*RUN, "eval.solver.steps=7", "hydra.run.dir=plain")  # as with other settings of eval
    assert again.stderr.startswith("error: checkpoint ")
    assert "takes a checkpoint of the same configuration, and here eval=" in again.stderr
