"""The work that is counted is what the docstrings say, however tasks are grouped; what it ends, and clipping."""

import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import PlainMLP, tasks_of
from test_training import meta_training

import fobmaml
from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Estimate, Forward, Reptile, Symmetric, estimate
from fobmaml.models import CNN1d
from fobmaml.optim import SNGDM
from fobmaml.solvers import BarzilaiBorwein, GradientDescent, InnerProblem, NewtonCG

S, Q, K, T = 25, 75, 3, 5
"""Support and query examples of a task, inner steps, tasks."""


class Own(FOMAML):
    """Of a user: the mean of the query gradients before and after the inner steps. It says nothing of its work."""

    def __call__(self, learner, theta, tasks):
        solution = self.adapt(learner, theta, tasks)
        both = [learner.query_gradient(phi, tasks) for phi in (solution.phi, solution.problem.theta)]
        return Estimate(sum(both) / 2, lambda: solution)


FORMULAS = {
    "forward": (Forward, K * (S + Q) + K * S, 0),
    "symmetric": (Symmetric, 2 * K * (S + Q), 0),
    "central4": (Central, 4 * K * (S + Q), 0),
    "maml": (MAML, K * S + Q, K * S),
    "maml_checkpoint": (partial(MAML, checkpoint=True), 2 * K * S + Q, K * S),
    "fomaml": (FOMAML, K * S + Q, 0),
    "reptile": (Reptile, K * (S + Q), 0),
    "imaml": (IMAML, K * S + Q, None),  # the products that conjugate gradients took
    "own": (Own, K * S + 2 * Q, 0),
}


@pytest.fixture(scope="module")
def batch(mnist1d):
    return mnist1d.sample("train", T, torch.Generator().manual_seed(0)).to(dtype=torch.float32)


def _cnn():
    return CNN1d((40,), 5, width=4)


def _model(kind=_cnn):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("name", FORMULAS)
def test_every_estimator_takes_what_it_says(batch, name):
    kind, gradients, products = FORMULAS[name]
    estimator = kind(GradientDescent(K))
    for make, engine, chunk in (
        (_cnn, "auto", "auto"),
        (_cnn, "auto", 2),
        (_cnn, "stacked", 1),
        (_cnn, "autograd", 2),
        (PlainMLP, "auto", "auto"),
        (PlainMLP, "loop", 2),
    ):
        found = fobmaml.meta_gradient(estimator, _model(make), F.cross_entropy, batch, chunk, engine)
        steps = S * int(found.linear.steps.sum()) if products is None else T * products
        assert (found.work.example_gradients, found.work.hessian_products) == (T * gradients, steps), (engine, chunk)
        assert found.work.total == pytest.approx(T * gradients + 8 / 3 * steps)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_is_what_the_engines_are_asked_for(batch, monkeypatch, momentum):
    """Calls of the loss's own gradient, one for each row, instead of the counter."""
    seen = Counter()
    model = _model()

    def loss(outputs, targets):
        seen[len(targets)] += 1
        return F.mse_loss(outputs, F.one_hot(targets, 5).float())

    learner = fobmaml.Learner(model, loss, "loop")
    theta = learner.theta()
    estimator = Symmetric(GradientDescent(K, momentum=momentum))
    estimate(estimator, learner, theta, batch, diagnose=False)  # tries the loss and the network
    seen.clear()
    work = estimate(estimator, learner, theta, batch, diagnose=False).work
    assert work.example_gradients == sum(examples * calls for examples, calls in seen.items()) == T * 2 * K * (S + Q)


@pytest.mark.parametrize("solver", [BarzilaiBorwein(steps=60, tol=1e-3), NewtonCG(steps=20, tol=1e-6)])
def test_rows_that_are_solved_do_not_count_while_others_are_not(solver):
    learner, tasks = tasks_of("logistic", count=6)
    problem = InnerProblem(learner, learner.theta(), tasks, 0.01)
    solution = solver.solve(problem)
    taken = {*zip(solution.gradients.tolist(), solution.hessian_products.tolist(), strict=True)}
    assert len(taken) > 1
    work, examples = learner.work.read(), tasks.support_x.shape[1]
    assert work.gradients == examples * int(solution.gradients.sum())
    assert work.hessian_products == examples * int(solution.hessian_products.sum())
    for chunk in (1, 4):
        chunked = estimate(FOMAML(solver, 0.01), learner, learner.theta(), tasks, chunk, diagnose=False).work
        assert chunked.gradients == work.gradients + 6 * tasks.query_x.shape[1]
        assert (chunked.hessian_products, chunked.forward) == (work.hessian_products, work.forward)
    if isinstance(solver, BarzilaiBorwein):
        assert work.forward == 0
    else:  # a line search looks at the start and at one point at least
        assert work.forward >= 2 * examples * int((solution.gradients - 1).sum())
        assert work.example_gradients == work.gradients + work.forward / 3


def test_imaml_counts_the_products_that_each_task_took(batch):
    """Conjugate gradients meet negative curvature, sooner in some tasks, and stop there."""
    estimator = IMAML(GradientDescent(K))
    whole = fobmaml.meta_gradient(estimator, _model(PlainMLP), F.cross_entropy, batch)
    assert len(set(whole.linear.steps.tolist())) > 1
    assert whole.work.hessian_products == S * int(whole.linear.steps.sum())
    assert fobmaml.meta_gradient(estimator, _model(PlainMLP), F.cross_entropy, batch, 1).work == whole.work


def test_diagnosis_is_no_work(batch):
    learner = fobmaml.Learner(_model(), F.cross_entropy)
    estimator = Symmetric(GradientDescent(K))
    looked, not_looked = (
        estimate(estimator, learner, learner.theta(), batch, None, look).work for look in (True, False)
    )
    assert looked == not_looked


def _training(source, estimator=None, optimizer=SNGDM, **settings):
    return meta_training(
        _model(),
        source,
        estimator or Symmetric(GradientDescent(K)),
        lambda p: optimizer(p, lr=0.1),
        **{"steps": 8, "meta_batch": 4, "validation_every": 3} | settings,
    )


def _timeless(events):
    return [{key: value for key, value in event.items() if not key.startswith("time/")} for event in events]


def test_training_adds_up_and_measuring_does_not(mnist1d):
    training = _training(mnist1d, bias_every=4, log_every=4, estimator=MAML(GradientDescent(K)))
    assert training.measure()["work/example_gradients"] == 0
    for event in training.train():
        event |= training.measure()
        if "train/loss" in event or "val/loss" in event:
            assert event["work/example_gradients"] == training.step * 4 * (K * S + Q)
            assert event["work/hessian_products"] == training.step * 4 * K * S
    training.measure(ended=True)
    assert training.latest["work/example_gradients"] == 8 * 4 * (K * S + Q)
    assert isinstance(training.latest["work/hessian_products"], int)


STEP = 4 * 2 * K * (S + Q)
"""Example-gradients of a meta-step of ``_training``."""


@pytest.mark.parametrize(
    ("budget", "steps", "taken"),
    [(5 * STEP, None, 5), (4.5 * STEP, None, 5), (1, None, 1), (5 * STEP, 3, 3), (5 * STEP, 30, 5), (5 * STEP, 0, 0)],
)
def test_a_budget_ends_a_run_at_the_first_step_that_reaches_it(mnist1d, budget, steps, taken):
    training = _training(mnist1d, steps=steps, budget=budget, log_every=100, bias_every=2)
    events = [training.measure() | event for event in training.train()]
    assert len(events) == training.step == taken
    assert training.ended
    if taken:
        assert "train/loss" in events[-1]
    assert {"val/loss", "bias/cosine"} <= training.measure().keys()  # due at the end, whatever step it is
    assert training.work.total == taken * STEP


def test_a_hessian_product_counts_for_eight_thirds_of_the_budget(mnist1d):
    step = 4 * (K * S + Q + 8 / 3 * K * S)
    for share, taken in ((0.999, 3), (1.001, 4)):
        training = _training(mnist1d, steps=None, budget=3 * step * share, estimator=MAML(GradientDescent(K)))
        assert len(list(training.train())) == taken


def test_the_learning_rate_follows_the_budget(mnist1d):
    def rates(**settings):
        return [event["optimizer/lr"] for event in _training(mnist1d, log_every=1, **settings).train()]

    assert rates(steps=None, budget=4 * STEP) == rates(steps=9, budget=4 * STEP) == rates(steps=4)
    wanted = [0.05 * (1 + math.cos(math.pi * t / 3.5)) for t in range(4)]
    assert rates(steps=None, budget=3.5 * STEP) == pytest.approx(wanted)
    assert rates(steps=3, budget=9 * STEP) == rates(steps=3)  # the steps end it
    assert rates(steps=None, budget=3 * STEP, schedule="constant") == [0.1] * 3


def test_a_run_with_a_budget_continues_bit_for_bit(mnist1d):
    settings = {"steps": None, "budget": 5 * STEP, "log_every": 2, "task_clip": 0.05, "clip": 0.01}
    whole, first, second = (_training(mnist1d, **settings) for _ in range(3))
    wanted, stream = list(whole.train()), first.train()
    begun = [next(stream) for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert _timeless(begun + list(second.train())) == _timeless(wanted)
    assert torch.equal(second.learner.theta(), whole.learner.theta())
    assert second.work == whole.work


@pytest.mark.parametrize("name", ["symmetric", "maml", "rates", "reptile", "own"])
def test_clipping_of_tasks_is_a_loop_over_tasks(batch, name):
    """``rates``: step lengths have derivatives, too, and count with the others."""
    kind = partial(MAML, learn_lr=1.0) if name == "rates" else FORMULAS[name][0]
    estimator, model = kind(GradientDescent(K)), _model().double()
    tasks = batch.to(dtype=torch.float64)
    alone = [fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks[i : i + 1]).gradient for i in range(T)]
    norms = [math.sqrt(sum(float(part.square().sum()) for part in each.values())) for each in alone]
    limit = sorted(norms)[2]  # of three tasks' above, or of its own norm: neither
    limit *= 1 + 1e-9
    for chunk in ("auto", 1, 2):
        found = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks, chunk, task_clip=limit)
        assert found.clipped.tolist() == [norm > limit for norm in norms]
        assert sum(found.clipped.tolist()) == 2
        for key, value in found.gradient.items():
            wanted = sum(each[key] * min(1.0, limit / norm) for each, norm in zip(alone, norms, strict=True)) / T
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    plain = fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks)
    assert plain.clipped is None
    with pytest.raises(ValueError, match=r"^task_clip=0: takes a finite number above 0"):
        fobmaml.meta_gradient(estimator, model, F.cross_entropy, tasks, task_clip=0)


def test_a_task_that_is_not_finite_is_not_hidden_by_clipping(mnist1d):
    training = _training(mnist1d, estimator=FOMAML(GradientDescent(30, lr=1e18)), task_clip=1.0)
    with pytest.raises(fobmaml.training.Diverged):
        list(training.train())
    zero = fobmaml.TaskBatch(*(torch.zeros(2, 3, 1) for _ in range(4)))
    model = torch.nn.Linear(1, 1, bias=False)
    found = fobmaml.meta_gradient(FOMAML(GradientDescent(1)), model, F.mse_loss, zero, task_clip=1.0)
    assert found.gradient["weight"].tolist() == [[0.0]]


def test_the_share_of_clipped_tasks_is_logged_where_it_is_set(mnist1d):
    training = _training(mnist1d, task_clip=1e-6, log_every=1, meta_batch=3)
    assert [event["meta_gradient/clipped"] for event in training.train()] == [1.0] * 8
    assert training.latest["meta_gradient/norm"] <= 1e-6 * (1 + 1e-5)
    assert not [event for event in _training(mnist1d, log_every=1).train() if "meta_gradient/clipped" in event]


def test_measurements_of_the_estimator_do_not_clip(mnist1d):
    on = {"bias_every": 1, "bias_at_start": True, "smoothness_every": 1}
    training, plain = (_training(mnist1d, task_clip=clip, **on) for clip in (1e-3, None))
    for key in ("bias/relative_error", "smoothness/gradient_norm"):
        assert training.measure()[key] == plain.measure()[key]


@pytest.mark.parametrize("optimizer", [SNGDM, torch.optim.SGD, torch.optim.Adam])
def test_clip_shortens_what_any_optimizer_gets(mnist1d, optimizer):
    """Against the same loop written out, with torch's clipping."""
    limit, gradients = 0.004, []
    training = _training(mnist1d, steps=3, schedule="constant", optimizer=optimizer, clip=limit, log_every=1)
    model = _model()
    own = optimizer(model.parameters(), lr=0.1)
    for step in range(3):
        tasks = training.tasks("train", 4, 0, step)
        for name, gradient in fobmaml.meta_gradient(training.estimator, model, F.cross_entropy, tasks).gradient.items():
            model.get_parameter(name).grad = gradient
        gradients.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        own.step()
    assert max(gradients) > limit  # it matters
    assert [event["meta_gradient/norm"] for event in training.train()] == pytest.approx(gradients, rel=1e-3)
    for mine, theirs in zip(model.parameters(), training.learner.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


QUICK = ("width=4", "eval.tasks=20", "eval.validation_tasks=10", "bias.every=0", "wandb.mode=disabled")


def test_a_budget_by_the_command_line(run_train, tmp_path):
    step = 16 * 2 * 10 * (S + Q)
    done = run_train(
        *QUICK,
        "estimator=symmetric",
        "steps=null",
        f"budget={3 * step}",
        "task_clip=0.01",
        "clip=1",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    assert f"{3 * step:,} example-gradients\n" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("completed", 3)
    assert (summary["work/example_gradients"], summary["work/hessian_products"]) == (3 * step, 0)
    assert 0 < summary["meta_gradient/clipped"] <= 1
    assert summary["test/accuracy"] is not None
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [(e["step"], e["work/example_gradients"]) for e in events if "val/loss" in e] == [(0, 0), (3, 3 * step)]
    refused = run_train(*QUICK, "steps=null")
    assert refused.stderr == "error: steps=None: takes a whole number of at least 0, or None with a budget\n"
