"""The part of a task's predictions that is right, the interval of its mean over tasks, and the loss beside it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine import Learner
from fobmaml.logged import WORK, worked
from fobmaml.measure.base import Event, Measurement, Periodic, Training, shown
from fobmaml.precision import full_precision
from fobmaml.tasks import TaskBatch, TaskSource

IGNORED = -100
"""The label that torch's losses leave out by default."""


def ignored_label(loss_fn: Callable[..., Tensor]) -> int:
    """The label that a loss leaves out: its own ``ignore_index``, as of ``nn.CrossEntropyLoss`` or a ``partial``."""
    if isinstance(loss_fn, partial):
        return int(loss_fn.keywords.get("ignore_index", ignored_label(loss_fn.func)))
    return int(getattr(loss_fn, "ignore_index", IGNORED))


def task_accuracies(outputs: Tensor, targets: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of each task the part of its counted targets at which ``argmax`` of the outputs is right, [T]; NaN without any.

    ``targets``: classes [T, Q] or, several an example, [T, Q, L, ...], with ``outputs`` [T, Q, C], or [T, Q, C, L, ...]
    as for ``cross_entropy``, or [T, Q, L, ..., C]; or probabilities of classes, in the layout of ``outputs``. A label
    that is no class, or that the loss ignores, is not counted.

    Raises ValueError where shapes do not fit.
    """
    dim = class_dim(outputs, targets, loss_fn)
    if targets.is_floating_point():
        return (outputs.argmax(dim) == targets.argmax(dim)).flatten(1).double().mean(1)
    counted = (targets >= 0) & (targets < outputs.shape[dim]) & (targets != ignored_label(loss_fn))
    right = (outputs.argmax(dim) == targets) & counted
    return right.flatten(1).sum(1).double() / counted.flatten(1).sum(1)


def class_dim(outputs: Tensor, targets: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Which dimension of ``outputs`` [T, Q, ...] is the classes': the one behind the examples, or the last."""
    shape, last = outputs.shape, outputs.dim() - 1
    if targets.is_floating_point():
        fitting = [2] if shape == targets.shape and last >= 2 else []
    else:
        fitting = [
            dim for dim in dict.fromkeys((2, last)) if last >= 2 and shape[:dim] + shape[dim + 1 :] == targets.shape
        ]
    if not fitting or shape[fitting[0]] < 2:
        raise ValueError(
            f"outputs {list(shape)}: takes classes, two or more, as [T, Q, C], [T, Q, C, ...] or "
            f"[T, Q, ..., C], for an accuracy at targets {list(targets.shape)}"
        )
    if len(fitting) == 1:
        return fitting[0]
    # As many classes as positions: in the right layout, outputs that favour the targets have the lesser loss.
    favoured = 9.0 * F.one_hot(targets.flatten(0, 1).clamp(0, shape[-1] - 1), shape[-1]).to(outputs.dtype)
    losses = [float(loss_fn(layout, targets.flatten(0, 1))) for layout in (favoured.movedim(-1, 1), favoured)]
    return fitting[losses[1] < losses[0]]


def mean_accuracy(accuracies: Tensor) -> tuple[float | None, float | None]:
    """Of the tasks [T] that have one: mean and half width of its 95 % interval, 1.96 standard errors over tasks.

    None where there is none, and for the interval of a single task.
    """
    known = accuracies[~accuracies.isnan()].double()
    if not len(known):
        return None, None
    return float(known.mean()), 1.96 * float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else None


@dataclass(frozen=True)
class Score:
    """Means over tasks. ``accuracy`` and the half width of its 95 % interval (1.96 standard errors over tasks) are
    fractions, None where outputs are not classes. A task whose labels are all ignored is in neither mean."""

    loss: float
    accuracy: float | None
    accuracy_ci95: float | None


def score(training: Training, tasks: TaskBatch) -> Score:
    """On tasks adapted as ``training.adapting`` does, at the present parameters."""
    tasks, learner, theta = training.placed(tasks), training.learner, training.learner.theta()
    parts = []
    for part in tasks.split(training.chunk(tasks)):
        with full_precision(learner.device):
            phi = training.adapting.adapt(learner, theta, part).phi
            with torch.no_grad():
                parts.append(task_scores(learner, training.source, learner.outputs(phi, part.query_x), part.query_y))
    losses, accuracies = (torch.cat(values) for values in zip(*parts, strict=True))
    if not training.source.classification:
        return Score(float(losses.mean()), None, None)
    return Score(float(losses[~accuracies.isnan()].mean()), *mean_accuracy(accuracies))


def task_scores(learner: Learner, source: TaskSource, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of each task, both [T]; an accuracy that there is not is NaN."""
    losses = learner.losses(outputs, targets).double()
    if not source.classification:
        return losses, torch.full_like(losses, math.nan)
    return losses, task_accuracies(outputs, targets, learner.loss_fn)


def _count(tasks: int) -> int:
    """Of tasks to evaluate on. Raises ValueError for one: an interval needs two."""
    if whole_number("tasks", tasks, at_least=0) == 1:
        raise refuse("tasks", 1, "a whole number of at least 2, or 0 for none")
    return tasks


@dataclass
class Validation(Periodic):
    """The score on ``tasks`` fixed validation tasks, every so many meta-steps; tasks=0: never. Raises ValueError."""

    every: int = 100
    tasks: int = 100

    keys: ClassVar = {
        "val/accuracy": "fraction of a validation task's query labels that it gets right, mean over tasks",
        "val/loss": "query loss there, mean over tasks",
        "time/train_s": "seconds in meta-steps until then",
        **WORK,
    }
    progress = ("val/accuracy", "val/loss")

    def __post_init__(self) -> None:
        whole_number("every", self.every)
        _count(self.tasks)

    def due(self, step: int, steps: int, ended: bool) -> bool:
        return self.tasks > 0 and super().due(step, steps, ended)

    def check(self, training: Training) -> None:
        if self.tasks:
            training.fixed("validation", self.tasks)

    def __call__(self, training: Training) -> Event:
        found = score(training, training.fixed("validation", self.tasks))
        return {
            "val/accuracy": found.accuracy,
            "val/loss": found.loss,
            "time/train_s": training.train_seconds,
            **worked(training.work),
        }


@dataclass
class MetaTest(Measurement):
    """The score on ``tasks`` fixed meta-test tasks, which every estimator and seed shares, once, at the very end;
    tasks=0: never. Raises ValueError."""

    tasks: int = 600

    keys: ClassVar = {
        "test/accuracy": "fraction of a meta-test task's query labels that it gets right, mean over tasks",
        "test/accuracy_ci95": "half width of its 95 % interval, 1.96 standard errors over tasks",
        "test/loss": "query loss there, mean over tasks",
    }
    results = ("test/accuracy", "test/accuracy_ci95", "test/loss")

    def __post_init__(self) -> None:
        _count(self.tasks)

    def due(self, step: int, steps: int, ended: bool) -> bool:
        return self.tasks > 0 and ended

    def check(self, training: Training) -> None:
        if self.tasks:
            training.fixed("test", self.tasks)

    def __call__(self, training: Training) -> Event:
        found = score(training, training.fixed("test", self.tasks))
        return {"test/accuracy": found.accuracy, "test/accuracy_ci95": found.accuracy_ci95, "test/loss": found.loss}

    def rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        accuracy = shown(summary, "test/accuracy", ".1f", 100)
        if summary["test/accuracy"] is not None:
            half = shown(summary, "test/accuracy_ci95", ".1f", 100)
            accuracy += " %" if summary["test/accuracy_ci95"] is None else f" ± {half} %"
        return [("meta-test accuracy", accuracy), ("meta-test loss", shown(summary, "test/loss", ".4f"))]

    def __str__(self) -> str:
        return f"{self.tasks} meta-test tasks"
