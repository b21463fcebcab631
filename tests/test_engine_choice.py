"""Between autograd and the loop a stopwatch chooses: once, and again in the same way where a run continues."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.engine import trial
from fobmaml.estimators import MAML, Symmetric, chunk_size
from fobmaml.models import MLP
from fobmaml.optim import SNGDM
from fobmaml.settings import Settings
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import FewShot
from fobmaml.training import MetaTraining

SMALL, LARGE = 8, 400
WAYS = ("batched", "one_by_one")


class Scaled(nn.Module):
    """With an operation that no engine by hand knows."""

    def __init__(self, width: int = SMALL):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, x):
        return self.inner(x) * torch.ones(()).exp()


@pytest.fixture
def takes(monkeypatch):
    """Sets how long each way takes; counts the calls. What is large here is a tenth of what is elsewhere."""
    for limit in ("LOOP_FROM", "FLOPS_AT_ONCE"):
        monkeypatch.setattr(trial, limit, getattr(trial, limit) // 10)
    found = SimpleNamespace(now=0.0, batched=1.0, one_by_one=1.0, calls=[])

    def watch(name):
        way = getattr(trial, f"rows_{name}")

        def call(network, phi, x):
            found.calls.append((name, tuple(x.shape)))
            found.now += getattr(found, name) * len(phi)
            return way(network, phi, x)

        monkeypatch.setattr(trial, f"rows_{name}", call)

    for name in WAYS:
        watch(name)
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


def _engine(learner: Learner, x: torch.Tensor, second_order: bool = False) -> str:
    loss = learner.row_loss(torch.zeros(x.shape[:2], dtype=torch.long))
    learner.engine_for(x, loss, second_order)
    return learner.used


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    ("width", "batched", "one_by_one", "engine"),
    [
        (SMALL, 1.0, 1.0, "autograd"),  # which the rule takes
        (SMALL, 1.03, 1.0, "autograd"),  # and which is not clearly slower
        (SMALL, 1.08, 1.0, "loop"),
        (LARGE, 1.0, 1.0, "loop"),
        (LARGE, 1.0, 1.03, "loop"),
        (LARGE, 1.0, 1.08, "autograd"),
    ],
)
def test_the_faster_one_is_taken_and_by_rule_where_they_are_alike(
    takes, width, batched, one_by_one, engine, second_order
):
    torch.manual_seed(0)
    takes.batched, takes.one_by_one = batched, one_by_one
    learner, x = Learner(Scaled(width), F.cross_entropy), torch.randn(4, 5, 6)
    learner.measure(x, 200, second_order)
    assert (learner._trial.flops_an_example * 200 > trial.LOOP_FROM) == (width == LARGE)
    assert _engine(learner, x, second_order) == engine
    rows = {name: {shape[0] for way, shape in takes.calls if way == name and shape[1] == 200} for name in WAYS}
    assert rows["one_by_one"] == {2}
    assert len(rows["batched"]) == (1 if width == SMALL else 2)  # of the small one the rule takes as many as are tried
    assert 2 <= min(rows["batched"]) <= max(rows["batched"]) <= trial.MOST_ROWS
    assert learner.measured[second_order] == (engine == "autograd")
    assert (learner.rows_at_once(x, 200, second_order) == 1) == (engine == "loop")
    count = len(takes.calls)
    learner.measure(x, 200, second_order)
    assert len(takes.calls) == count


def test_nothing_is_measured_where_there_is_nothing_to_choose(monkeypatch):
    def stopwatch(*_):
        raise RuntimeError

    monkeypatch.setattr(trial.Trial, "_fastest", stopwatch)
    x = torch.randn(4, 5, 6)
    for engine in ("autograd", "loop"):
        learner = Learner(Scaled(), F.cross_entropy, engine)
        learner.measure(x, 5, False)
        assert _engine(learner, x) == engine
    Learner(nn.Sequential(nn.Linear(6, 3)), F.cross_entropy).measure(x, 5, True)  # by hand
    recurrent = Learner(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), Recurrent()), F.cross_entropy)
    recurrent.measure(x, 5, False)  # vmap does not take it
    assert _engine(recurrent, x) == "loop"
    y = torch.zeros(4, 5, dtype=torch.long)
    tasks, estimator = TaskBatch(x, y, x, y), Symmetric(GradientDescent(2, 0.1))
    assert fobmaml.meta_gradient(estimator, Scaled(), F.cross_entropy, tasks).engine == "autograd"  # once, by the rule
    with pytest.raises(RuntimeError):
        chunk_size(Learner(Scaled(), F.cross_entropy), tasks, estimator, measure=True)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.gru(x.unsqueeze(-1))[0][:, -1])


def _training(estimator, model=None) -> MetaTraining:
    torch.manual_seed(0)
    source = FewShot(torch.randn(60, 6), torch.arange(60) // 10, 3, 2, 3, split=(6, 0, 0))
    settings = Settings(steps=4, meta_batch=3)
    return MetaTraining(model or Scaled(), source, estimator, settings, lambda p: SNGDM(p, lr=0.1))


@pytest.mark.parametrize("estimator", [Symmetric, MAML])
def test_a_run_measures_and_one_that_goes_on_does_not(monkeypatch, estimator):
    answers, asked = [0], []
    monkeypatch.setattr(trial.Trial, "_fastest", lambda *given: asked.append(given[-1]) or answers[0])
    whole = _training(estimator(GradientDescent(2, 0.1)))
    list(whole.train())
    assert (whole.learner.used, asked) == ("loop", [estimator is MAML])
    first = _training(estimator(GradientDescent(2, 0.1)))
    next(first.train())
    state, count = first.state_dict(), len(asked)
    answers[0] = 1
    continued = _training(estimator(GradientDescent(2, 0.1)))
    continued.load_state_dict(state)
    list(continued.train())
    assert (continued.learner.used, len(asked)) == ("loop", count)
    assert torch.equal(continued.learner.theta(), whole.learner.theta())
    anew = _training(estimator(GradientDescent(2, 0.1)))
    list(anew.train())
    assert anew.learner.used == "autograd"
    torch.testing.assert_close(anew.learner.theta(), whole.learner.theta())


def test_more_rows_at_once_are_taken_where_they_are_faster(takes, monkeypatch):
    learner, x = Learner(Scaled(100), F.cross_entropy), torch.randn(4, 5, 6)
    few = -(-trial.FLOPS_AT_ONCE // (2 * 900 * 1_000))
    batched = trial.rows_batched

    def call(network, phi, x):
        found = batched(network, phi, x)
        takes.now -= 0.5 * (len(phi) > few)  # the more, the less each
        return found

    monkeypatch.setattr(trial, "rows_batched", call)
    takes.one_by_one, takes.batched = 2.0, 1.0
    learner.measure(x, 1_000, False)
    assert learner.measured == {False: trial.MORE}
    assert learner.rows_at_once(x, 1_000, False) == trial.MORE * few


def test_a_network_by_hand_goes_on_by_hand():
    training = _training(Symmetric(GradientDescent(2, 0.1)), MLP((6,), 3, width=4, depth=1))
    training.learner.measured = {False: 0, True: 0}
    list(training.train())
    assert not {"autograd", "loop"} & {*training.learner.used.split("+")}
