"""Intervals of means over tasks that share examples, by simulation."""

import math

import pytest
import torch

from fobmaml.measure.intervals import Ratios, mean_interval, same_examples

TASKS, QUERIES = 60, 12


def _sampled(generator, examples, length=1, counted=1.0):
    """Tasks whose query examples are drawn from a set of as many, itself a sample; an example is right with a chance of
    its own, 0.7 on average."""
    chance = 0.4 + 0.6 * torch.rand(examples, generator=generator)
    found = torch.stack([torch.randperm(examples, generator=generator)[:QUERIES] for _ in range(TASKS)])
    shape = (TASKS, QUERIES, length)
    of = (torch.rand(shape, generator=generator) < counted).double()
    right = (torch.rand(shape, generator=generator) < chance[found, None]) * of
    return Ratios(right.sum(2), of.sum(2), found)


@pytest.mark.parametrize(("length", "counted"), [(1, 1.0), (1, 0.6), (4, 0.5)])
def test_it_covers_the_mean_over_all_examples_that_might_have_been_drawn(length, counted):
    generator, sets = torch.Generator().manual_seed(0), 1000
    found = [_sampled(generator, 100, length, counted).mean_interval() for _ in range(sets)]
    covered = sum(abs(mean - 0.7) <= half for mean, half in found) / sets
    assert abs(covered - 0.95) < 0.03
    deviation = torch.tensor([mean for mean, _ in found]).std()
    assert sum(half for _, half in found) / sets == pytest.approx(1.96 * float(deviation), rel=0.08)


def test_over_tasks_alone_it_would_not():
    generator, sets = torch.Generator().manual_seed(0), 300
    alone = [
        mean_interval(each.parts.sum(1) / each.of.sum(1)) for each in (_sampled(generator, 30) for _ in range(sets))
    ]
    assert sum(abs(mean - 0.7) <= half for mean, half in alone) / sets < 0.8


def test_without_shared_examples_it_is_the_interval_over_tasks():
    found = _sampled(torch.Generator().manual_seed(0), 100)
    own = Ratios(found.parts, found.of, torch.arange(TASKS * QUERIES).view(TASKS, QUERIES))
    assert own.mean_interval() == pytest.approx(mean_interval(own.parts.mean(1)))
    assert found.mean_interval()[1] > own.mean_interval()[1]


def test_by_hand():
    """Two examples, one always right and one never, in both of two tasks: no difference between tasks, all between
    examples."""
    parts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = Ratios(parts, torch.ones(2, 2), torch.tensor([[7, 9], [9, 7]]))
    between = 2 * (2 * 0.25**2 - 4 * 0.125**2)  # of the examples' sums ±1/4, of the shares ±1/8; two of two examples
    assert found.mean_interval() == (0.5, pytest.approx(1.96 * math.sqrt(between)))
    assert found.by_example().tolist() == [2.0, 0.0]


def test_equal_examples_have_equal_numbers():
    generator = torch.Generator().manual_seed(0)
    for made in (
        torch.rand(50, 7, generator=generator),
        torch.rand(50, 3, 4, generator=generator, dtype=torch.float64),
        torch.randint(9, (50, 7), generator=generator),
        torch.rand(50, 7, generator=generator).half(),
    ):
        places = torch.randint(50, (6, 20), generator=generator)
        numbers = same_examples(made[places])
        equal = numbers.flatten()[:, None] == numbers.flatten()
        assert torch.equal(equal, places.flatten()[:, None] == places.flatten())
