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
