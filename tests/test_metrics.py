"""Metrics by simulation: where the truth is known, means and intervals over tasks are what they have to be."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fobmaml import TaskBatch
from fobmaml.estimators import FOMAML
from fobmaml.measure import R2, Accuracy, MeanSquaredError, TokenAccuracy
from fobmaml.measure.accuracy import score
from fobmaml.measure.intervals import mean_interval
from fobmaml.models import MLP
from fobmaml.settings import Settings
from fobmaml.solvers import GradientDescent
from fobmaml.training import MetaTraining

TASKS, SETS, QUERIES, CLASSES = 40, 1500, 6, 4


def _masks(generator, shape, fewest=2) -> torch.Tensor:
    """Each task has ``fewest`` to QUERIES examples."""
    sizes = torch.randint(fewest, QUERIES + 1, shape[:1], generator=generator)
    return torch.arange(QUERIES) < sizes.unsqueeze(1)


def _right_or_not(generator, tasks, length=None, masked=False):
    """Predictions that are right with a chance of the task's own, 0.7 on average; the examples that there are not are
    all wrong."""
    shape = (tasks, QUERIES) if length is None else (tasks, QUERIES, length)
    targets = torch.randint(CLASSES, shape, generator=generator)
    chance = 0.5 + 0.4 * torch.rand((tasks,) + (1,) * (len(shape) - 1), generator=generator)
    right = torch.rand(shape, generator=generator) < chance
    mask = _masks(generator, shape) if masked else None
    if masked:
        right &= mask.view(tasks, QUERIES, *[1] * (len(shape) - 2))
    outputs = F.one_hot((targets + (~right).long()) % CLASSES, CLASSES).double().movedim(-1, 2)
    return outputs, targets, mask


def _off_by_noise(generator, tasks, masked=False, fewest=2):
    """Targets N(0, 4), errors N(0, s²) with a task's own s² in [0.5, 1.5]."""
    targets = 2.0 * torch.randn(tasks, QUERIES, 2, generator=generator, dtype=torch.float64)
    variance = 0.5 + torch.rand(tasks, 1, 1, generator=generator, dtype=torch.float64)
    outputs = targets + variance.sqrt() * torch.randn(targets.shape, generator=generator, dtype=torch.float64)
    mask = _masks(generator, targets.shape, fewest) if masked else None
    if masked:
        outputs[~mask] += 100.0
    return outputs, targets, mask


CASES = {
    "accuracy": (Accuracy(), _right_or_not, {}),
    "accuracy, masks": (Accuracy(), _right_or_not, {"masked": True}),
    "token accuracy": (TokenAccuracy(), _right_or_not, {"length": 5}),
    "token accuracy, masks": (TokenAccuracy(), _right_or_not, {"length": 5, "masked": True}),
    "mse": (MeanSquaredError(), _off_by_noise, {}),
    "mse, masks": (MeanSquaredError(), _off_by_noise, {"masked": True}),
    "r2": (R2(), _off_by_noise, {}),
    "r2, masks": (R2(), _off_by_noise, {"masked": True, "fewest": 5}),  # of two examples it has no variance
}


@pytest.mark.parametrize("case", CASES)
def test_the_interval_is_that_of_the_mean_over_tasks(case):
    """The half width is 1.96 true standard errors within 2 %: those of the means of many sets of tasks."""
    metric, simulate, how = CASES[case]
    generator = torch.Generator().manual_seed(0)
    values = metric(*simulate(generator, TASKS * SETS, **how), F.cross_entropy).view(SETS, TASKS)
    found = [mean_interval(one) for one in values]
    means, halves = (np.array(part) for part in zip(*found, strict=True))
    true = values.std() / math.sqrt(TASKS)  # of all tasks at once
    assert np.sqrt((halves**2).mean()) / 1.96 == pytest.approx(float(true), rel=0.02)
    assert means.std() == pytest.approx(float(true), rel=4 / math.sqrt(2 * SETS))
    if simulate is _right_or_not:
        assert means.mean() == pytest.approx(0.7, abs=4 * float(true) / math.sqrt(SETS))
    elif isinstance(metric, R2):
        assert not values.isnan().any()
    else:
        assert means.mean() == pytest.approx(1.0, abs=4 * float(true) / math.sqrt(SETS))
    covered = np.abs(means - means.mean()) <= halves
    assert covered.mean() == pytest.approx(0.95, abs=0.06 if isinstance(metric, R2) else 0.02)  # R² is skewed


def test_metrics_by_hand():
    outputs = torch.tensor([[[1.0], [2.0], [9.0]], [[1.0], [1.0], [1.0]]])
    targets = torch.tensor([[[2.0], [4.0], [0.0]], [[1.0], [1.0], [1.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(MeanSquaredError()(outputs, targets, mask, F.mse_loss).tolist(), [2.5, 0.0])
    found = R2()(outputs, targets, mask, F.mse_loss)
    assert found[0] == pytest.approx(1 - 5 / 2)
    assert found[1].isnan()  # all targets are equal
    assert mean_interval(found) == (pytest.approx(-1.5), None)
    tokens = torch.tensor([[[0, 1], [1, -100], [2, 2]]])
    said = F.one_hot(torch.tensor([[[0, 0], [1, 1], [0, 0]]]), 3).float()
    assert TokenAccuracy()(said.movedim(-1, 2), tokens, None, F.cross_entropy).tolist() == [pytest.approx(2 / 5)]
    last = torch.tensor([[True, True, False]])
    assert TokenAccuracy()(said.movedim(-1, 2), tokens, last, F.cross_entropy).tolist() == [pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "takes"),
    [
        (MeanSquaredError(), (2, 3, 4), torch.zeros(2, 3).long(), r"metrics=mse: takes targets like the outputs"),
        (
            R2(),
            (2, 3, 1),
            torch.zeros(2, 3),
            r"metrics=r2: takes targets like the outputs, \[2, 3, 1\], and .* \[2, 3\]",
        ),
        (TokenAccuracy(), (2, 3, 4), torch.zeros(2, 3).long(), r"metrics=token_accuracy: takes targets \[T, Q, L"),
    ],
)
def test_targets_that_do_not_fit_are_refused(metric, outputs, targets, takes):
    with pytest.raises(ValueError, match=f"^{takes}"):
        metric(torch.zeros(outputs), targets, None, F.cross_entropy)


class _Unequal:
    """Lines through random points, a number of examples of each task's own."""

    input_shape, outputs, classification, loss_fn = (2,), 1, False, staticmethod(F.mse_loss)
    support_loss = staticmethod(F.smooth_l1_loss)

    def sample(self, split, count, generator):
        tasks = []
        for _ in range(count):
            w = torch.randn(2, 1, generator=generator, dtype=torch.float64)
            sizes = torch.randint(2, 9, (2,), generator=generator).tolist()
            parts = [torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in sizes]
            tasks.append((parts[0], parts[0] @ w, parts[1], parts[1] @ w))
        return TaskBatch.padded(tasks)


def test_a_run_on_unequal_tasks_scores_each_task_alone():
    torch.manual_seed(0)
    training = MetaTraining(
        MLP((2,), 1, width=4, depth=1),
        _Unequal(),
        FOMAML(GradientDescent(3, 0.1)),
        Settings(steps=3, meta_batch=4),
        torch.optim.Adam,
        metrics=[MeanSquaredError(), R2()],
    )
    list(training.train())
    tasks = training.fixed("test", 12)
    found, alone = score(training, tasks), []
    for one in tasks.split(1):
        s, q = one.support_mask[0], one.query_mask[0]
        parts = one.support_x[:, s], one.support_y[:, s], one.query_x[:, q], one.query_y[:, q]
        alone.append(score(training, TaskBatch(*parts)))
    assert found.loss == pytest.approx(np.mean([each.loss for each in alone]), rel=1e-5)
    assert found.metrics["mse"][0] == pytest.approx(found.loss, rel=1e-5)
    assert found.metrics["r2"][0] == pytest.approx(np.mean([each.metrics["r2"][0] for each in alone]), rel=1e-5)
    assert found.accuracy is None


def test_on_the_command_line(run_train, tmp_path):
    small = ("width=4", "steps=2", "meta_batch=2", "eval.tasks=4", "eval.validation_tasks=4", "bias.every=0")
    done = run_train("dataset=sinusoid", *small, "wandb.mode=disabled", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test/accuracy"] is None
    assert summary["test/mse"] == pytest.approx(summary["test/loss"], rel=1e-5)
    assert summary["test/r2_ci95"] > 0
    assert {"val/mse", "val/r2"} <= summary.keys()
    assert "meta-test r2 " in done.stdout
    done = run_train("metrics=[mse]", *small)
    assert done.returncode == 1
    assert done.stderr.startswith("error: metrics=mse: takes targets like the outputs, [1, 75, 5]"), done.stderr
