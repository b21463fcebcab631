"""Tasks that loaders bring: in their order, each once, and a run that is continued goes on where it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fobmaml import TaskBatch
from fobmaml.estimators import FOMAML
from fobmaml.measure import MetaTest
from fobmaml.models import MLP
from fobmaml.settings import Settings
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import Stream, TaskSource
from fobmaml.training import MetaTraining


def _task(n: int, noise: float = 0.0):
    """Support and query of task n, which is its number."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(7, 2, generator=generator) + noise
    x[:, 0] = n
    y = torch.randint(2, (7,), generator=generator)
    return x[:3], y[:3], x[3:], y[3:]


class _Tasks(Dataset):
    def __init__(self, count=10, random=None):
        self.count, self.random = count, random

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        drawn = {None: lambda: 0.0, "torch": lambda: float(torch.rand(())), "numpy": np.random.rand}
        return _task(n, drawn[self.random]())


class _Endless(IterableDataset):
    def __iter__(self):
        n = 0
        while True:
            yield _task(n)
            n += 1


def _stream(train=None, **changes) -> Stream:
    train = DataLoader(_Tasks(), batch_size=4) if train is None else train
    return Stream(train, **{"outputs": 2, "loss_fn": F.cross_entropy, **changes})


def _drawn(source, count, split="train") -> list[int]:
    batch = source.sample(split, count, torch.Generator())
    assert (batch.support_x[:, 0, 0] == batch.query_x[:, 0, 0]).all()
    return batch.support_x[:, 0, 0].int().tolist()


def _at(source, position, count) -> list[int]:
    source.seek(position)
    return _drawn(source, count)


def test_training_tasks_come_in_order_and_again():
    source = _stream()
    assert source.input_shape == (2,)
    assert [_at(source, 3 * step, 3) for step in range(5)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1], [2, 3, 4]]
    assert _at(source, 6, 3) == [6, 7, 8]  # back
    assert _at(source, 0, 3) == [0, 1, 2]  # as often as anybody likes
    assert _at(source, 9, 12) == [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert [_at(_stream(DataLoader(_Endless(), batch_size=5)), p, 3) for p in (0, 40)] == [[0, 1, 2], [40, 41, 42]]


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffling_is_a_function_of_the_seed(workers):
    def loader():
        return DataLoader(_Tasks(random="torch"), batch_size=4, shuffle=True, num_workers=workers)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _stream(loader())
    orders = [_at(first, 5 * step, 5) for step in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3]) == list(range(10))
    assert orders[:2] != orders[2:]
    torch.manual_seed(2)
    again = _stream(loader())
    again.seek(15)
    first.seek(15)
    one, other = (source.sample("train", 5, torch.Generator()) for source in (first, again))
    assert torch.equal(one.support_x, other.support_x)
    assert torch.equal(one.query_x, other.query_x)
    if not workers:
        assert [_at(_stream(loader(), seed=1), 5 * step, 5) for step in range(2)] != orders[:2]


def test_validation_and_test_tasks_are_the_first_ones():
    shuffled = DataLoader(_Tasks(), batch_size=3, shuffle=True)
    source = _stream(validation=DataLoader(_Tasks(8), batch_size=3), test=shuffled)
    assert _drawn(source, 5, "validation") == [0, 1, 2, 3, 4]
    assert _drawn(source, 7, "validation") == [0, 1, 2, 3, 4, 5, 6]
    assert _drawn(source, 2, "validation") == [0, 1]
    assert _drawn(source, 6, "test") == _drawn(source, 6, "test")
    with pytest.raises(ValueError, match=r"^tasks=8: takes more of DataLoader, which brings no others"):
        _drawn(source, 9, "validation")
    with pytest.raises(ValueError, match=r"^split=test: takes one that has a loader"):
        _drawn(_stream(), 2, "test")


def test_task_batches_and_lists_are_loaders_too():
    batches = [TaskBatch.padded([_task(n), tuple(t[: 2 + n % 2] for t in _task(n + 1))]) for n in (0, 2, 4)]
    source = TaskSource.from_dataloader(batches, outputs=2, loss_fn=F.cross_entropy)
    assert _at(source, 2, 2) == [2, 3]
    assert source.sample("train", 2, torch.Generator()).support_mask is not None
    plain = [[t.unsqueeze(0) for t in _task(n)] for n in range(3)]
    assert _at(_stream(plain), 1, 4) == [1, 2, 0, 1]
    for bad, text in (
        ([torch.zeros(3)], "train=Tensor: takes a loader of fobmaml.TaskBatch or of"),
        ([(torch.zeros(2, 3), torch.zeros(2))], "train=tuple of 2: takes a loader"),
        ([], "tasks=0: takes more of list, which brings no others"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            _stream(bad)
    mixed = _stream([batches[0], TaskBatch(*plain[0])])
    with pytest.raises(ValueError, match=r"^tasks=batches of different shapes: takes equal numbers of"):
        _at(mixed, 1, 2)


def _training(train, steps=6, **changes) -> MetaTraining:
    torch.manual_seed(0)
    source = _stream(train, test=DataLoader(_Tasks(8), batch_size=3))
    return MetaTraining(
        MLP((2,), 2, width=4, depth=1),
        source,
        FOMAML(GradientDescent(2, 0.1)),
        Settings(steps=steps, meta_batch=3, **changes),
        torch.optim.Adam,
        [MetaTest(8)],
    )


def test_a_stream_is_not_sampled_ahead():
    with pytest.raises(ValueError, match=r"^prefetch=True: takes false for a stream"):
        _training(DataLoader(_Tasks(), batch_size=3), prefetch=True)


@pytest.mark.parametrize("random", [None, "torch"])
@pytest.mark.parametrize("stopped", [1, 3, 5])
def test_continued_is_uninterrupted_bit_for_bit(random, stopped):
    def loader():
        return DataLoader(_Tasks(random=random), batch_size=4, shuffle=True)

    whole = _training(loader())
    list(whole.train())
    first = _training(loader())
    for _ in zip(range(stopped), first.train(), strict=False):
        first.peak_bytes()  # what is measured on the way takes no tasks out of the stream
    torch.manual_seed(7)  # another process, another state of torch's generator
    second = _training(loader())
    torch.rand(5)
    second.load_state_dict(first.state_dict())
    second.load_state_dict(first.state_dict())  # as a run does, before and behind its lock
    assert second.step == stopped
    list(second.train())
    assert torch.equal(second.learner.theta(), whole.learner.theta())
    assert second.measure(ended=True) == whole.measure(ended=True)


def test_another_stream_is_refused_by_name():
    np.random.seed(0)  # noqa: NPY002
    first = _training(DataLoader(_Tasks(random="numpy"), batch_size=4))
    for _ in zip(range(3), first.train(), strict=False):
        pass
    for other in (_Tasks(random="numpy"), _Tasks(9), _Tasks(random="torch")):
        second = _training(DataLoader(other, batch_size=4, shuffle=True))
        before = second.learner.theta()
        with pytest.raises(ValueError, match=r"^dataset: the stream's first tasks are not those that"):
            second.load_state_dict(first.state_dict())
        assert torch.equal(second.learner.theta(), before)
