"""The loop: continuing is the uninterrupted run, fixed tasks are fixed, and trouble stops it before harm is done."""

import math
import re
import statistics
import time
from functools import partial

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fobmaml import Learner, TaskBatch, solvers
from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Forward, Symmetric, chunk_size, estimate
from fobmaml.logged import loss_name
from fobmaml.measure import (
    BiasMeasurement,
    CurvatureMeasurement,
    ErrorEstimateMeasurement,
    MemoryMeasurement,
    MetaTest,
    SmoothnessMeasurement,
    Validation,
)
from fobmaml.measure.accuracy import score
from fobmaml.models import MLP, CNN1d
from fobmaml.optim import SNGDM, ClippedSGD
from fobmaml.run.plotting import learning_curve
from fobmaml.settings import Settings
from fobmaml.tasks import Logistic, Sinusoid
from fobmaml.tasks.few_shot import mean_squared_error
from fobmaml.training import EVALUATION_SEED, Diverged, MetaTraining

QUICK = {
    "steps": 1,
    "seed": 0,
    "meta_batch": 16,
    "task_chunk": "auto",
    "memory_limit_mb": None,
    "engine": "auto",
    "schedule": "cosine",
    "log_every": 10,
    "checkpoint_every": 100,
    "fixed_tasks": False,
    "prefetch": False,
}
MEASURED = {
    "test": (MetaTest, {"tasks": 8}),
    "memory": (MemoryMeasurement, {}),
    "validation": (Validation, {"every": 100, "tasks": 8}),
    "bias": (BiasMeasurement, {"every": 0, "tasks": 2, "at_start": False, "tol": 1e-8}),
    "error_estimate": (ErrorEstimateMeasurement, {"every": 0, "tasks": 1}),
    "smoothness": (SmoothnessMeasurement, {"every": 0, "tasks": 2, "radius": 1e-3}),
    "curvature": (CurvatureMeasurement, {"every": 0, "tasks": 2}),
}
"""In the order of configs/train.yaml."""


def meta_training(model, source, estimator, optimizer=torch.optim.Adam, **changes) -> MetaTraining:
    """``changes`` of ``Settings``, or of a measurement: bias_every=2."""
    parts = {
        name: {key: changes.pop(f"{name}_{key}", value) for key, value in options.items()}
        for name, (_, options) in MEASURED.items()
    }
    return MetaTraining(
        model,
        source,
        estimator,
        Settings(**QUICK | changes),
        optimizer,
        [MEASURED[name][0](**options) for name, options in parts.items()],
    )


def _training(source, steps: int = 8, seed: int = 0, optimizer=SNGDM, lr: float = 0.1, estimator=None, **settings):
    torch.manual_seed(seed)
    model = CNN1d((40,), 5, width=4) if source.classification else MLP((1,), 1, width=16, depth=2)
    estimator = estimator or Symmetric(solvers.GradientDescent(steps=3, lr=0.1))
    return meta_training(
        model,
        source,
        estimator,
        lambda p: optimizer(p, lr=lr),
        **{"steps": steps, "seed": seed, "meta_batch": 4} | settings,
    )


@pytest.mark.parametrize(
    ("optimizer", "batches"),
    [
        (SNGDM, {}),
        (ClippedSGD, {}),
        (torch.optim.Adam, {}),
        (SNGDM, {"batch": 4}),
        (SNGDM, {"batch": 4, "query_batch": 6}),
    ],
)
def test_continued_is_uninterrupted_bit_for_bit(mnist1d, tmp_path, optimizer, batches):
    run = partial(
        _training, mnist1d, optimizer=optimizer, estimator=Symmetric(solvers.GradientDescent(3, 0.1, **batches))
    )
    whole = run()
    events = list(whole.train())
    first = run()
    stream = first.train()
    begun = [next(stream) for _ in range(5)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = run()
    for p in second.learner.model.parameters():
        nn.init.normal_(p)  # what was there before does not matter
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    continued = list(second.train())
    assert torch.equal(whole.learner.theta(), second.learner.theta())

    def timeless(these):
        return [{k: v for k, v in event.items() if not k.startswith("time/")} for event in these]

    assert timeless(events) == timeless(begun + continued)
    assert whole.measure(ended=True) == second.measure(ended=True)
    assert len(second.step_seconds) == 8


def test_it_is_the_estimator_and_optimizer_by_hand(mnist1d):
    """Two meta-steps against a loop written out with the public pieces."""
    import fobmaml

    training = _training(mnist1d, steps=2, schedule="constant")
    torch.manual_seed(0)
    model = CNN1d((40,), 5, width=4)
    optimizer = SNGDM(model.parameters(), lr=0.1)
    for step in range(2):
        tasks = training.tasks("train", 4, 0, step)
        result = fobmaml.meta_gradient(training.estimator, model, F.cross_entropy, tasks)
        for name, p in model.named_parameters():
            p.grad = result.gradient[name]
        optimizer.step()
    list(training.train())
    for mine, theirs in zip(model.parameters(), training.learner.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_step_times_do_not_grow_without_bound(mnist1d, monkeypatch):
    """The time of training is that of all steps, the median that of the latest, and checkpoints stay as large."""
    monkeypatch.setattr("fobmaml.training.RECENT", 5)
    training, sizes = _training(mnist1d, steps=20, log_every=1), []
    for event in training.train():
        assert event["time/meta_step_s"] == statistics.median(training.step_seconds)
        sizes.append(len(training.state_dict()["step_seconds"]))
    assert sizes == [1, 2, 3, 4, *[5] * 16]
    assert training.train_seconds > sum(training.step_seconds)
    assert training.measure()["time/train_s"] == training.train_seconds
    continued = _training(mnist1d, steps=20)
    continued.load_state_dict(training.state_dict())
    assert continued.step_seconds == training.step_seconds
    assert continued.step_seconds.maxlen == 5
    assert continued.train_seconds == training.train_seconds


class _Tokens:
    """Of each position the sign of a number: an example has several labels, some of them ignored."""

    input_shape, outputs, classification = (6,), 2, True

    def __init__(self, last: bool, ignored: bool):
        self.loss_fn = self._last if last else F.cross_entropy
        self.ignored = ignored

    @staticmethod
    def _last(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def sample(self, split, count, generator):
        x = torch.randn(count, 12, 6, generator=generator)
        y = (x > 0).long()
        if self.ignored:
            y[torch.rand(y.shape, generator=generator) < 0.4] = -100
            y[0, 4:] = -100  # a task without a counted query label
        return TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


class _PerPosition(nn.Module):
    """Knows the sign, but for the last two of six positions."""

    def __init__(self, last: bool):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(1)), last

    def forward(self, x):
        known = torch.cat([x[..., :4], -x[..., 4:]], -1)
        outputs = torch.stack([-known, known], -1) * self.scale
        return outputs if self.last else outputs.movedim(-1, 1)


@pytest.mark.parametrize("last", [False, True])
def test_accuracy_of_several_labels_an_example(last):
    def scored(ignored):
        training = meta_training(_PerPosition(last), _Tokens(last, ignored), FOMAML(solvers.GradientDescent(1, 1e-6)))
        return score(training, training.fixed("test", 40)), training.tasks("test", 40, EVALUATION_SEED)

    whole, _ = scored(False)
    assert whole.accuracy == pytest.approx(4 / 6)
    assert whole.accuracy_ci95 == pytest.approx(0, abs=1e-12)  # in every task the same
    some, tasks = scored(True)
    each = []
    for y in tasks.query_y[1:]:
        counted = y != -100
        each.append(float(counted[:, :4].sum() / counted.sum()))
    assert some.accuracy == pytest.approx(statistics.fmean(each))
    assert some.accuracy_ci95 == pytest.approx(1.96 * statistics.stdev(each) / math.sqrt(39))
    assert math.isfinite(some.loss)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (F.cross_entropy, "cross-entropy (nats)"),
        (nn.CrossEntropyLoss(), "cross-entropy (nats)"),
        (partial(F.cross_entropy, label_smoothing=0.1), "cross-entropy (nats)"),
        (F.mse_loss, "mean squared error"),
        (nn.MSELoss(), "mean squared error"),
        (mean_squared_error, "mean squared error"),
        (F.huber_loss, "huber loss"),
        (nn.HuberLoss(), "huber loss"),
        (nn.GaussianNLLLoss(), "gaussian nll loss"),
        (nn.L1Loss(), "mean absolute error"),
        (F.nll_loss, "negative log-likelihood (nats)"),
        (lambda o, y: o, "loss"),
    ],
)
def test_a_loss_has_its_own_name(loss, name):
    assert loss_name(loss) == name


def _texts(path):
    """All that an SVG shows in words."""
    return [a or b for a, b in re.findall(r">([^<>]+)</text>|<tspan[^>]*>([^<]+)", path.read_text())]


def test_plots_say_what_was_tested(tmp_path):
    events = [{"step": step, "val/accuracy": 0.5, "val/loss": 1.0, "train/loss": 1.0} for step in (0, 2)]
    for accuracy, half, text in (
        (0.625, 0.05, "test tasks: 62.5 ± 5.0 % (95 % interval)"),
        (0.625, None, "test tasks: 62.5 %"),
        (None, None, None),
    ):
        summary = {"step": 2, "choices": {"estimator": "maml"}, "test/accuracy": accuracy, "test/accuracy_ci95": half}
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            learning_curve(events, summary, tmp_path / "curve.svg")
        assert [said for said in _texts(tmp_path / "curve.svg") if said.startswith("test tasks")] == [text] * bool(text)


def test_plots_say_which_loss(tmp_path):
    """The axes' labels in the picture of a run, which are text in an SVG."""

    class Own(Sinusoid):
        @staticmethod
        def pinball_loss(outputs, targets):
            return (0.7 * (targets - outputs)).maximum(0.3 * (outputs - targets)).mean()

        loss_fn = pinball_loss

    for source, left, right in (
        (Own(), "pinball loss", "pinball loss"),
        (Logistic(), "accuracy (%)", "cross-entropy (nats)"),
    ):
        torch.manual_seed(0)
        model = MLP(source.input_shape, source.outputs, width=4, depth=1)
        training = meta_training(model, source, FOMAML(solvers.GradientDescent(1, 0.1)), steps=2, log_every=1)
        events = [{"step": 0, **training.measure()}]
        events += [{"step": training.step, **event} for event in training.train()]
        summary = {"step": 2, "choices": {"estimator": "fomaml"}, **training.latest}
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            learning_curve(events, summary, tmp_path / "curve.svg")
        texts = _texts(tmp_path / "curve.svg")
        assert left in texts
        assert right in texts
        assert "mean squared error" not in texts


def test_schedule(mnist1d):
    rates = [e["optimizer/lr"] for e in _training(mnist1d, steps=4, lr=0.2, log_every=1).train()]
    assert rates == pytest.approx([0.2 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    for schedule, wanted in (("constant", [0.2] * 4), ("linear", [0.2, 0.15, 0.1, 0.05])):
        training = _training(mnist1d, steps=4, lr=0.2, log_every=1, schedule=schedule)
        assert [e["optimizer/lr"] for e in training.train()] == pytest.approx(wanted)


def test_evaluation_tasks_are_the_same_for_every_estimator_and_seed(mnist1d):
    a = _training(mnist1d, seed=0)
    b = _training(mnist1d, seed=5, estimator=MAML(solvers.GradientDescent(2)))
    for split in ("validation", "test"):
        x, y = a.tasks(split, 20, EVALUATION_SEED), b.tasks(split, 20, EVALUATION_SEED)
        assert torch.equal(x.query_x, y.query_x)
        assert torch.equal(x.support_y, y.support_y)
    assert not torch.equal(a.tasks("train", 4, 0, 0).query_x, a.tasks("train", 4, 0, 1).query_x)
    assert not torch.equal(a.tasks("train", 4, 0, 0).query_x, a.tasks("train", 4, 1, 0).query_x)
    assert not torch.equal(a.tasks("validation", 4, 0).query_x, a.tasks("train", 4, 0).query_x)


def test_accuracy_and_its_interval_by_hand(mnist1d):
    training = _training(mnist1d)
    found = score(training, training.fixed("test", 12))
    tasks = training.tasks("test", 12, EVALUATION_SEED).to(dtype=torch.float32)
    theta = training.learner.unflatten(training.learner.theta())
    correct = []
    for i in range(12):
        phi = theta
        for _ in range(3):

            def loss(p, i=i):
                out = torch.func.functional_call(training.learner.model, p, (tasks.support_x[i],))
                prox = sum((v - theta[n]).square().sum() for n, v in p.items())
                return F.cross_entropy(out, tasks.support_y[i]) + 0.25 * prox  # λ = 0.5

            phi = {n: v - 0.1 * torch.func.grad(loss)(phi)[n] for n, v in phi.items()}
        out = torch.func.functional_call(training.learner.model, phi, (tasks.query_x[i],))
        correct.append((out.argmax(1) == tasks.query_y[i]).double())
    right = torch.stack(correct)
    each, shares = right.mean(1), (right - right.mean()) / right.numel()
    assert found.accuracy == pytest.approx(float(each.mean()), abs=1e-3)
    of_examples = dict[bytes, float]()
    for x, share in zip(tasks.query_x.flatten(0, 1), shares.flatten().tolist(), strict=True):
        key = x.numpy().tobytes()
        of_examples[key] = of_examples.get(key, 0.0) + share
    count = len(of_examples)
    assert count < right.numel()
    shared = sum(share**2 for share in of_examples.values()) - float(shares.square().sum())
    variance = float(each.var()) / 12 + max(shared, 0.0) * count / (count - 1)
    assert found.accuracy_ci95 == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)


def test_regression_has_a_loss_and_no_accuracy():
    training = _training(Sinusoid(), steps=60, lr=0.05)
    before = score(training, training.fixed("validation", 50))
    list(training.train())
    after = score(training, training.fixed("validation", 50))
    assert before.accuracy is None
    assert after.accuracy_ci95 is None
    assert after.loss < before.loss


def test_a_meta_gradient_that_is_not_finite_stops_before_the_step(mnist1d):
    training = _training(mnist1d, estimator=FOMAML(solvers.GradientDescent(steps=30, lr=1e18)))
    before = training.learner.theta()
    with pytest.raises(Diverged, match=r"at step 1 is not finite: try a smaller solver.lr"):
        list(training.train())
    assert torch.equal(training.learner.theta(), before)
    assert training.step == 0


def test_task_chunk_does_not_change_the_result(mnist1d):
    paths = []
    for chunk in ("auto", 1, 3, 100):
        training = _training(mnist1d, task_chunk=chunk)
        list(training.train())
        paths.append(training.learner.theta())
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], rtol=1e-3, atol=1e-4)


def test_automatic_chunks_shrink_with_width(mnist1d):
    tasks = mnist1d.sample("train", 16, torch.Generator().manual_seed(0))
    small, large = (Learner(CNN1d((40,), 5, width=w), F.cross_entropy, "stacked") for w in (16, 250))
    central, forward, fomaml = (kind(solvers.GradientDescent()) for kind in (Central, Forward, FOMAML))
    assert [e.cost(5, 5).rows for e in (central, forward, fomaml)] == [4, 1, 1]
    assert chunk_size(small, tasks, central) == 16
    assert chunk_size(large, tasks, central) == 1
    assert chunk_size(large, tasks, central) < chunk_size(large, tasks, fomaml) == chunk_size(large, tasks)


def test_automatic_chunks_keep_threads_busy_where_gradients_are_compiled(mnist1d):
    learner = Learner(CNN1d((40,), 5, width=250), F.cross_entropy)
    learner.fuses = lambda chain: True  # also where there is no compiler
    tasks = mnist1d.sample("train", 16, torch.Generator().manual_seed(0))
    central, maml = (kind(solvers.GradientDescent()) for kind in (Central, MAML))
    chunks = {threads: [] for threads in (1, 2)}
    for threads, found in chunks.items():
        torch.set_num_threads(threads)
        found += [chunk_size(learner, tasks, estimator) for estimator in (central, None, maml)]
    assert chunks == {1: [2, 8, 4], 2: [4, 16, 4]}  # 4 rows a task, 1 and 1; MAML's keep their signals


def test_memory_limit_bounds_what_is_alive(mnist1d):
    free = _training(mnist1d)
    unlimited = free.measure(ended=True)["memory/peak_bytes"]
    limit = 0.6 * unlimited / 1e6
    limited = _training(mnist1d, memory_limit_mb=limit)
    assert limited.measure(ended=True)["memory/peak_bytes"] <= limit * 1e6
    for training in (free, limited):
        list(training.train())
    torch.testing.assert_close(limited.learner.theta(), free.learner.theta(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"^memory_limit_mb=0.001: takes at least [\d.]+, what one task needs"):
        _training(mnist1d, memory_limit_mb=0.001)
    with pytest.raises(ValueError, match=r"^memory_limit_mb=5: takes task_chunk=auto"):
        _training(mnist1d, memory_limit_mb=5, task_chunk=2)


def test_fixed_tasks_are_the_same_everywhere(mnist1d):
    training = _training(mnist1d, fixed_tasks=True)
    reference = training.tasks("train", 4, 0)
    for split, seed, step in (("train", 0, 7), ("validation", 5, 0), ("test", 0, 1)):
        assert torch.equal(training.tasks(split, 4, seed, step).query_x, reference.query_x)


def test_what_is_due(mnist1d):
    """At the start all that is on, then every so many steps, and at the end."""
    training = _training(
        mnist1d,
        steps=5,
        validation_every=2,
        bias_every=0,
        smoothness_every=4,
        curvature_every=3,
        estimator=MAML(solvers.GradientDescent(2)),
    )
    seen = [sorted({key.split("/")[0] for key in training.measure()})]
    for _ in training.train():
        seen.append(sorted({key.split("/")[0] for key in training.measure()}))
    everything = ["curvature", "smoothness", "time", "val", "work"]
    assert seen == [
        everything,
        [],
        ["time", "val", "work"],
        ["curvature"],
        ["smoothness", "time", "val", "work"],
        everything,
    ]


def test_measuring_without_training_or_tasks(mnist1d):
    training = _training(mnist1d, steps=0, test_tasks=0, validation_tasks=0, bias_every=1)
    assert list(training.train()) == []
    assert set(training.measure()) == {
        "bias/relative_error",
        "bias/cosine",
        "bias/reference",
        "bias/reason",
        "bias/exact_norm",
    }
    last = training.measure(ended=True)
    assert last.keys() == {"memory/peak_bytes"}
    assert last["memory/peak_bytes"] > 0


def test_curvature_needs_plain_gradient_descent(mnist1d):
    with pytest.raises(ValueError, match=r"^curvature\.every=1: takes solver=gd without momentum"):
        _training(mnist1d, curvature_every=1, estimator=Symmetric(solvers.GradientDescent(momentum=0.5)))


@pytest.mark.slow
def test_sampling_costs_less_than_a_twentieth_of_a_meta_step(mnist1d):
    """A ratio, with a wide margin: sampling is some half a millisecond, a default meta-step over a hundred."""
    torch.manual_seed(0)
    training = meta_training(CNN1d((40,), 5, width=32), mnist1d, Symmetric(solvers.GradientDescent()), steps=5)
    list(training.train())
    spent = []
    for step in range(20):
        started = time.perf_counter()
        training.placed(training.tasks("train", 16, 0, step))
        spent.append(time.perf_counter() - started)
    assert sorted(spent)[10] < 0.05 * sorted(training.step_seconds)[2]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", -1),
        ("steps", 2.5),
        ("steps", None),
        ("budget", 0),
        ("budget", "much"),
        ("task_clip", 0),
        ("clip", -1),
        ("meta_batch", 0),
        ("task_chunk", "some"),
        ("task_chunk", 0),
        ("schedule", "exponential"),
        ("seed", -1),
        ("checkpoint_every", 0),
        ("memory_limit_mb", 0),
        ("fixed_tasks", 1),
        ("prefetch", 1),
        ("engine", "fast"),
    ],
)
def test_bad_settings(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}={value}: takes"):
        Settings(**QUICK | {setting: value})


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("validation", "every", 0),
        ("validation", "tasks", 1),
        ("test", "tasks", 1),
        ("bias", "every", -1),
        ("bias", "tol", 0),
        ("bias", "draws", 0),
        ("bias", "at_start", 0),
        ("bias", "tasks", 0),
        ("smoothness", "radius", 0),
        ("smoothness", "tasks", 0),
        ("curvature", "every", -1),
        ("curvature", "tasks", 0),
    ],
)
def test_bad_settings_of_measurements(name, setting, value):
    kind, options = MEASURED[name]
    with pytest.raises(ValueError, match=f"^{setting}={value}: takes"):
        kind(**options | {setting: value})


def test_measurements_write_the_keys_that_they_name(mnist1d):
    training = _training(mnist1d, steps=0, bias_every=1, smoothness_every=1, curvature_every=1)
    for measurement in training.measurements:
        assert list(measurement(training)) == list(measurement.keys)
        assert {*measurement.results, *measurement.progress} <= measurement.keys.keys()
        assert all(measurement.keys.values())


def test_negative_curvature_is_logged_and_said_once(mnist1d, caplog):
    """At λ = 1e-4 conjugate gradients meet it in nearly every task."""
    training = _training(mnist1d, steps=8, log_every=1, estimator=IMAML(solvers.GradientDescent(2, 0.1), lam=1e-4))
    first = _training(mnist1d, steps=8, log_every=1, estimator=IMAML(solvers.GradientDescent(2, 0.1), lam=1e-4))
    theta = first.learner.theta()
    result = estimate(first.estimator, first.learner, theta, first.tasks("train", 4, 0, 0).to(dtype=torch.float32))
    events = list(training.train())
    for key, met in (
        ("negative_curvature", result.linear.negative_curvature),
        ("steps", result.linear.steps),
        ("relative_residual", result.linear.relative_residual),
    ):
        assert events[0][f"linear/{key}"] == pytest.approx(float(met.double().mean()))
    assert sum(4 * event["linear/negative_curvature"] for event in events) > 10
    assert [record.message for record in caplog.records if "negative curvature" in record.message] == [
        record.message for record in caplog.records
    ][:1]
    again = _training(mnist1d, steps=8, estimator=training.estimator)
    again.load_state_dict(training.state_dict())
    assert again.negative_curvature_tasks == training.negative_curvature_tasks
    quiet = _training(mnist1d, steps=2, log_every=1)
    assert not [key for event in quiet.train() for key in event if key.startswith("linear")]
