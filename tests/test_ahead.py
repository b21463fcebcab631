"""Tasks that are sampled while a step is computed: the same run, bit for bit."""

from threading import Event, current_thread, main_thread

import pytest
import torch
import torch.nn.functional as F

from fobmaml.estimators import Symmetric
from fobmaml.models import MLP
from fobmaml.optim import SNGDM
from fobmaml.settings import Settings
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import FewShot
from fobmaml.training import MetaTraining

STEPS = 5
PATIENCE = 20.0


class Watched(FewShot):
    """A transform by torch's own generator; a thread's ``sample`` waits for the loss to be called, and the other way
    round, so that one of them that is not made beside the other fails."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(60, 3, generator=generator), torch.arange(60) // 10
        super().__init__(x, y, 2, 2, 3, split=(4, 0, 2), transform=lambda x: x + torch.rand(x.shape))
        self.loss_fn = self.loss
        self.watched, self.fails_in = False, None
        self.sampling, self.computing, self.beside = Event(), Event(), []

    def loss(self, outputs, targets):
        self.computing.set()
        assert not self.watched or self.sampling.wait(PATIENCE)
        return F.cross_entropy(outputs, targets)

    def sample(self, split, count, generator):
        if current_thread() is not main_thread():
            self.sampling.set()
            self.beside.append(self.computing.wait(PATIENCE))
        if self.fails_in == 0:
            raise OSError("the disk is gone")
        self.fails_in = None if self.fails_in is None else self.fails_in - 1
        return super().sample(split, count, generator)


def _training(prefetch: bool) -> MetaTraining:
    torch.manual_seed(0)
    return MetaTraining(
        MLP((3,), 2, width=4, depth=1),
        Watched(),
        Symmetric(GradientDescent(2, 0.1)),
        Settings(steps=STEPS, meta_batch=3, prefetch=prefetch),
        lambda p: SNGDM(p, lr=0.1),
    )


def _trained(prefetch: bool, state=None, steps=STEPS) -> MetaTraining:
    training = _training(prefetch)
    if state is not None:
        training.load_state_dict(state)
    training.source.computing.clear()
    training.source.watched = prefetch
    stream = training.train()
    while training.step < steps:
        next(stream)
    return training


def test_tasks_sampled_ahead_are_the_same_run():
    plain, ahead = _trained(False), _trained(True)
    assert plain.source.beside == []
    assert ahead.source.beside == [True] * STEPS
    assert torch.equal(plain.learner.theta(), ahead.learner.theta())
    continued = _trained(True, _trained(True, steps=2).state_dict())
    assert torch.equal(plain.learner.theta(), continued.learner.theta())
    continued = _trained(True, _trained(False, steps=2).state_dict())
    assert torch.equal(plain.learner.theta(), continued.learner.theta())


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_sampling_raises_is_raised_in_its_step(prefetch):
    training = _training(prefetch)
    training.source.fails_in = 2
    with pytest.raises(ValueError, match=r"^dataset: sample\('train', 3\) failed: OSError: the disk is gone"):
        list(training.train())
    assert training.step == 2


def _source(kind: str) -> FewShot:
    generator = torch.Generator().manual_seed(0)
    counts = {"equal": [30] * 6, "unequal": [12, 40, 30, 25, 31, 18], "small": [5, 6, 7, 5, 6, 7]}.get(kind, [30] * 6)
    x, y = (
        torch.rand(sum(counts), 1, 4, 4, generator=generator),
        torch.arange(6).repeat_interleave(torch.tensor(counts)),
    )
    transform = (lambda x: x + torch.rand(x.shape)) if kind == "transform" else None
    x = (255 * x).to(torch.uint8) if kind == "bytes" else x
    return FewShot(x, y, 2, 2, 3, split=(6, 0, 0), transform=transform, rotations=kind == "rotations")


def _of(source: FewShot, steps: int | None = STEPS) -> MetaTraining:
    torch.manual_seed(0)
    settings = Settings(steps=steps, budget=None if steps else 10**9, meta_batch=3)
    model = MLP(source.input_shape, 2, width=4, depth=1)
    return MetaTraining(model, source, Symmetric(GradientDescent(2, 0.1)), settings, lambda p: SNGDM(p, lr=0.1))


@pytest.mark.parametrize("kind", ["equal", "unequal", "small", "transform", "rotations", "bytes"])
def test_tasks_of_several_steps_together_are_those_of_each(kind):
    """Of many steps, so that some rows of random numbers are drawn again."""
    training = _of(_source(kind))
    steps = range(3, 203)
    for step, found in zip(steps, training.each("train", 3, 0, steps), strict=True):
        alone = training.tasks("train", 3, 0, step).tensors()
        assert alone.keys() == found.tensors().keys()
        assert all(torch.equal(tensor, alone[name]) for name, tensor in found.tensors().items()), step


def test_the_steps_of_a_run_have_the_tasks_of_their_numbers(monkeypatch):
    training, taken, made = _of(_source("unequal"), steps=19), [], []
    each, placed = training.each, training.placed
    monkeypatch.setattr(training, "each", lambda *given: made.append(len(given[-1])) or each(*given))
    monkeypatch.setattr(training, "placed", lambda tasks: taken.append(tasks) or placed(tasks))
    list(training.train())
    assert made == [1, 8, 8, 2]  # the first one shows their size, and there are 19
    for step, tasks in enumerate(taken):
        assert torch.equal(tasks.query_x, training.tasks("train", 3, 0, step).query_x)


def test_large_tasks_are_made_one_by_one(monkeypatch):
    monkeypatch.setattr("fobmaml.tasks.ahead.BYTES", 1000)
    training, made = _of(_source("equal")), []
    each = training.each
    monkeypatch.setattr(training, "each", lambda *given: made.append(len(given[-1])) or each(*given))
    list(training.train())
    assert made == [1] * STEPS


def test_a_transform_that_fails_does_so_in_its_step():
    source = _source("equal")
    wrong = _of(source).tasks("train", 3, 0, 4).support_x[0, 0]
    source._transforms = dict.fromkeys(("train",), lambda x: 1 / 0 if (x == wrong).all(1).all(1).any() else x)
    training = _of(source)
    with pytest.raises(ValueError, match=r"^dataset: sample\('train', 3\) failed: ZeroDivisionError"):
        list(training.train())
    assert training.step <= 4  # the first step whose tasks have that example
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        training.tasks("train", 3, 0, training.step)
