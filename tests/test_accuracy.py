"""Accuracy by simulation: where the chance of a right answer is known, means and intervals are what they have to be."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fobmaml.measure.accuracy import ignored_label, task_accuracies
from fobmaml.measure.intervals import mean_interval

CLASSES, TASKS, QUERIES = 4, 50, 6


def _last_loss(outputs, targets):
    """Of classes in the last dimension."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _simulated(generator, length=None, ignored=0.0, layout="behind", tasks=TASKS):
    """Outputs and targets of tasks that are right with a chance of their own, 0.7 on average."""
    shape = (tasks, QUERIES) if length is None else (tasks, QUERIES, length)
    targets = torch.randint(CLASSES, shape, generator=generator)
    chance = 0.5 + 0.4 * torch.rand((tasks,) + (1,) * (len(shape) - 1), generator=generator)
    right = torch.rand(shape, generator=generator) < chance
    outputs = F.one_hot((targets + (~right).long()) % CLASSES, CLASSES) + 0.5 * torch.rand(
        *shape, CLASSES, generator=generator
    )
    if layout == "behind":
        outputs = outputs.movedim(-1, 2)
    targets[torch.rand(shape, generator=generator) < ignored] = -100
    return outputs, targets


@pytest.mark.parametrize(
    ("length", "layout", "ignored", "loss"),
    [
        (None, "behind", 0.0, F.cross_entropy),
        (None, "behind", 0.3, nn.CrossEntropyLoss()),
        (9, "behind", 0.0, F.cross_entropy),
        (9, "behind", 0.5, F.cross_entropy),
        (9, "last", 0.3, _last_loss),
        (CLASSES, "behind", 0.3, F.cross_entropy),
        (CLASSES, "last", 0.3, _last_loss),
    ],
)
def test_the_interval_covers_the_mean_in_95_of_100_cases(length, layout, ignored, loss):
    generator, sets = torch.Generator().manual_seed(0), 1000
    found = [mean_interval(task_accuracies(*_simulated(generator, length, ignored, layout), loss)) for _ in range(sets)]
    covered = sum(abs(mean - 0.7) <= half for mean, half in found) / sets
    assert abs(covered - 0.95) < 0.025  # three standard errors, and Student's t is a little wider
    mean = sum(mean for mean, _ in found) / sets
    counted = QUERIES * (length or 1) * (1 - ignored)
    deviation = math.sqrt(0.4**2 / 12 + (0.21 - 0.4**2 / 12) / counted)  # between tasks, and within
    assert mean == pytest.approx(0.7, abs=4 * deviation / math.sqrt(TASKS * sets))
    assert sum(half for _, half in found) / sets == pytest.approx(1.96 * deviation / math.sqrt(TASKS), rel=0.04)


def test_ignored_labels_do_not_count():
    outputs = torch.eye(3)[torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0]])]
    targets = torch.tensor([[0, 1, -100, 2], [-100, -100, -100, -100], [0, -100, 1, -100]])
    found = task_accuracies(outputs, targets, F.cross_entropy)
    torch.testing.assert_close(found, torch.tensor([2 / 3, math.nan, 0.5], dtype=torch.float64), equal_nan=True)
    assert mean_interval(found)[0] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean_interval(found)[1] == pytest.approx(1.96 * (1 / 6) / math.sqrt(2) / math.sqrt(2))
    assert mean_interval(found[1:2]) == (None, None)
    assert mean_interval(found[2:]) == (0.5, None)


@pytest.mark.parametrize(
    "loss",
    [
        partial(F.cross_entropy, ignore_index=0),
        nn.CrossEntropyLoss(ignore_index=0),
        partial(nn.CrossEntropyLoss(ignore_index=0)),
    ],
)
def test_the_loss_says_which_label_it_ignores(loss):
    outputs, targets = torch.eye(3)[torch.tensor([[0, 1, 1]])], torch.tensor([[0, 1, 2]])
    assert ignored_label(loss) == 0
    assert task_accuracies(outputs, targets, loss).tolist() == [0.5]
    assert task_accuracies(outputs, targets, F.cross_entropy).tolist() == [pytest.approx(2 / 3)]


def test_probabilities_as_targets():
    outputs, targets = torch.randn(5, 7, 4), torch.randn(5, 7, 4).softmax(-1)
    wanted = (outputs.argmax(-1) == targets.argmax(-1)).double().mean(1)
    assert torch.equal(task_accuracies(outputs, targets, F.cross_entropy), wanted)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        ((2, 5, 1), torch.zeros(2, 5).long()),
        ((2, 5, 1), torch.zeros(2, 5, 1)),
        ((2, 5), torch.zeros(2, 5).long()),
        ((2, 5, 3), torch.zeros(2, 5, 3).long()),
        ((2, 5, 3, 4), torch.zeros(2, 5).long()),
        ((2, 5, 3), torch.zeros(2, 4).long()),
    ],
)
def test_what_is_no_class_has_no_accuracy(outputs, targets):
    with pytest.raises(ValueError, match=r"^outputs \[2, 5.*\]: takes classes, two or more"):
        task_accuracies(torch.randn(outputs), targets, F.cross_entropy)
