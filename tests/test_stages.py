"""An inner solver by stages of training: each step has its stage's, adaptation its own, and a run goes on as it was."""

import copy
import json
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_training import MEASURED, QUICK

import fobmaml
from fobmaml import Learner
from fobmaml.estimators import IMAML, MAML, Adaptation, Reptile, Symmetric
from fobmaml.measure.accuracy import score
from fobmaml.models import CNN1d
from fobmaml.optim import SNGDM
from fobmaml.settings import Settings
from fobmaml.solvers import Adam, GradientDescent, NewtonCG
from fobmaml.stages import Stage, Stages
from fobmaml.training import MetaTraining

S, Q, TASKS = 25, 75, 4
OWN = partial(GradientDescent, 3, 0.1, batch=10)
STAGES = (Stage(0.3, GradientDescent(1, 0.2, batch=5, query_batch=4)), Stage(0.6, GradientDescent(2, 0.1, batch=5)))


def _model():
    torch.manual_seed(0)
    return CNN1d((40,), 5, width=4).double()


def _training(source, estimator=None, stages=STAGES, adaptation=None, **settings):
    return MetaTraining(
        _model(),
        source,
        estimator or Symmetric(OWN()),
        Settings(**QUICK | {"steps": 8, "meta_batch": TASKS, "log_every": 3} | settings),
        lambda p: SNGDM(p, lr=0.1),
        [MEASURED["test"][0](tasks=8), MEASURED["memory"][0](), MEASURED["smoothness"][0](every=3, tasks=2)],
        adaptation,
        stages,
    )


def _run(training):
    events = [event | training.measure() for event in training.train()]
    return [{k: v for k, v in event.items() if not k.startswith("time/")} for event in events]


def test_each_step_has_the_solver_of_its_stage(mnist1d):
    """Against the loop written out; steps 0, 1, 2 of 8 are the first stage's, 3 and 4 the second's."""
    training, model = _training(mnist1d, schedule="constant"), _model()
    optimizer, examples = SNGDM(model.parameters(), lr=0.1), 0
    for step, solver in enumerate([STAGES[0].solver] * 3 + [STAGES[1].solver] * 2 + [OWN()] * 3):
        result = fobmaml.meta_gradient(
            Symmetric(solver), model, F.cross_entropy, training.tasks("train", TASKS, 0, step)
        )
        for name, p in model.named_parameters():
            p.grad = result.gradient[name]
        optimizer.step()
        examples += result.work.example_gradients
    _run(training)
    assert training.work.example_gradients == examples
    assert examples == 2 * TASKS * (3 * (5 + 4) + 2 * 2 * (5 + Q) + 3 * 3 * (10 + Q))
    for mine, theirs in zip(model.parameters(), training.learner.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("end", [{"steps": 8}, {"steps": None, "budget": 8 * 1500.0}])
@pytest.mark.parametrize("at", [2, 3, 6])
def test_continued_is_uninterrupted_bit_for_bit(mnist1d, end, at):
    """``at``: within a stage, between two, and behind the last."""
    whole, first, second = (_training(mnist1d, estimator=None, **end) for _ in range(3))
    wanted, stream = _run(whole), first.train()
    for _ in range(at):
        next(stream)
        first.measure()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert _run(second) == wanted[at:]
    assert len(wanted) > 6
    assert torch.equal(second.learner.theta(), whole.learner.theta())


def test_adaptation_is_by_the_whole_solver_from_the_first_step(mnist1d):
    plain, staged = _training(mnist1d, stages=()), _training(mnist1d)
    next(staged.train())
    assert staged.estimator.solver is STAGES[0].solver
    staged.learner.model.load_state_dict(plain.learner.model.state_dict())
    tasks = plain.fixed("test", 3)
    assert score(staged, tasks) == score(plain, tasks)
    other = _training(mnist1d, adaptation=Adaptation(GradientDescent(7, 0.05)))
    assert score(other, tasks).loss != score(plain, tasks).loss


def test_measurements_are_of_the_present_stage(mnist1d):
    training, found = _training(mnist1d), {}
    for step in range(1, 9):
        next(training.train())
        plain = _training(mnist1d, Symmetric(STAGES[1].solver if step == 3 else OWN()), ())
        plain.load_state_dict(copy.deepcopy(training.state_dict()))
        if event := training.measure():
            found[step] = event == plain.measure()
    assert found == {3: True, 6: True, 8: True}


def test_memory_is_that_of_the_stage_that_needs_the_most(mnist1d):
    """MAML's grows with its steps."""
    few, many = (_training(mnist1d, MAML(GradientDescent(k)), ()).peak_bytes() for k in (2, 8))
    assert many > 2 * few
    for own, stage in ((2, 8), (8, 2)):
        training = _training(mnist1d, MAML(GradientDescent(own)), [Stage(0.5, GradientDescent(stage))])
        assert training.peak_bytes() == many
        assert training.estimator.solver.steps == own
    stages = [Stage(0.5, GradientDescent(8))]
    with pytest.raises(ValueError, match=r"^memory_limit_mb="):
        _training(mnist1d, MAML(GradientDescent(2)), stages, memory_limit_mb=few / 1e6 / TASKS)


def test_learned_step_lengths_go_with_every_stage(mnist1d):
    estimator = MAML(GradientDescent(2), learn_lr=1.0)
    training = _training(mnist1d, estimator, [Stage(0.5, GradientDescent(2, 0.2, batch=10))], Adaptation(lam=0.3))
    _run(training)
    (rates,) = training.outer.variables.values()
    assert (rates != 0.1).all()
    tasks = training.fixed("test", 2)
    learner, theta = training.learner, training.learner.theta()
    for adapting in (training.estimator, training.adapting):
        lengths = adapting.learned(learner).rates
        for k in range(2):
            wanted = [rates[k, i].expand(shape).flatten() for i, shape in enumerate(learner.shapes.values())]
            assert torch.equal(lengths[k], torch.cat(wanted))
    moved = training.adapting.adapt(learner, theta, tasks).displacement
    assert not torch.equal(moved, training.estimator.adapt(learner, theta, tasks).displacement)  # by its λ
    said = _training(mnist1d, MAML(GradientDescent(2), learn_lr=1.0), (), Adaptation(GradientDescent(5, 0.05)))
    assert said.adapting.learned(learner).rates == [0.05] * 5


def test_imaml_pulls_back_by_the_length_of_the_stage(mnist1d):
    model = _model()
    learner, tasks = Learner(model, F.cross_entropy), mnist1d.sample("train", 2, torch.Generator().manual_seed(0))
    estimator = IMAML(GradientDescent(3, 0.1), 2.0, pull_back=True)
    stages = Stages(estimator, [Stage(0.5, GradientDescent(3, 0.2))])
    for progress, lr in ((0.0, 0.2), (0.5, 0.1)):
        stages.enter(progress)
        wanted = IMAML(GradientDescent(3, lr), 2.0, pull_back=True).adapt(learner, learner.theta(), tasks)
        found = estimator.adapt(learner, learner.theta(), tasks)
        assert torch.equal(found.displacement, wanted.displacement)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Stage(0.0, OWN()), r"until=0.0: takes a finite number above 0 below 1"),
        (lambda: Stage(1.0, OWN()), r"until=1.0: takes a finite number above 0 below 1"),
        (lambda: Stage(0.5, "gd"), r"solver=str: takes a fobmaml.solvers.Solver"),
        (lambda: Stages(Symmetric(OWN()), [STAGES[1], STAGES[0]]), r"inner=a stage until 0.3: takes .* after 0.6"),
        (lambda: Stages(Symmetric(OWN()), [Stage(0.5, Adam())]), r"inner=Adam: takes the solver of .*GradientDescent"),
        (lambda: Stages(MAML(OWN(), learn_lr=1.0), STAGES), r"inner=steps=1: takes 3, whose lengths are learned"),
    ],
)
def test_bad_stages_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_any_setting_of_any_solver_may_change(mnist1d):
    for kind, stage in (
        (partial(Symmetric, NewtonCG(2, 1e-8, 10)), NewtonCG(2, 1e-2, 5)),
        (partial(Reptile, Adam(3, batch=10)), Adam(5, 0.02, batch=5)),
    ):
        training = _training(mnist1d, kind(), [Stage(0.5, stage)], steps=2, log_every=1)
        assert _run(training)[-1]["inner/residual"] is not None


RUN = ("width=4", "steps=6", "meta_batch=4", "eval.tasks=20", "eval.validation_tasks=10", "bias.every=0")
RUN = (*RUN, "estimator=symmetric", "wandb.mode=disabled")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("inner=5", r"inner=5: takes null, or a list of stages: \[{until: 0.5, steps: 5}\]"),
        ("inner=[{steps: 5}]", r"inner\[0\]={'steps': 5}: takes until and settings of the solver: .*"),
        ("inner=[{until: 0.5, steps: 0}]", r"inner\[0\].steps=0: takes a whole number of at least 1"),
        ("inner=[{until: 0.5}, {until: 1}]", r"inner\[1\].until=1: takes a finite number above 0 below 1"),
        ("inner=[{until: 0.5, stepz: 5}]", r"inner\[0\]: .*unexpected keyword argument 'stepz'.*"),
    ],
)
def test_bad_settings_are_named(run_train, tmp_path, setting, line):
    done = run_train(*RUN, setting, "hydra.run.dir=run")
    assert done.returncode == 1
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_by_the_command_line(run_train, tmp_path):
    staged = "inner=[{until: 0.5, steps: 2, batch: 5, query_batch: 5}]"
    done = run_train(*RUN, staged, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["work/example_gradients"] == 4 * 2 * (3 * 2 * 10 + 3 * 10 * (S + Q))
    again = run_train(*RUN, "hydra.run.dir=run")  # without the stages
    assert "takes a checkpoint of the same configuration, and here inner=None" in again.stderr
