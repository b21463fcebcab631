"""Scores of adapted tasks: the loss, and metrics such as the accuracy, with the intervals of their means over tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.engine import Learner
from fobmaml.logged import WORK, worked
from fobmaml.measure.base import Event, Measurement, Metric, Periodic, RatioMetric, Training, shown
from fobmaml.measure.intervals import Ratios, mean_interval, same_examples
from fobmaml.precision import full_precision
from fobmaml.tasks import TaskBatch, TaskSource

IGNORED = -100
"""The label that torch's losses leave out by default."""


def ignored_label(loss_fn: Callable[..., Tensor]) -> int:
    """The label that a loss leaves out: its own ``ignore_index``, as of ``nn.CrossEntropyLoss`` or a ``partial``."""
    if isinstance(loss_fn, partial):
        return int(loss_fn.keywords.get("ignore_index", ignored_label(loss_fn.func)))
    return int(getattr(loss_fn, "ignore_index", IGNORED))


def task_accuracies(
    outputs: Tensor, targets: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor], mask: Tensor | None = None
) -> Tensor:
    """Of each task the part of its counted targets at which ``argmax`` of the outputs is right, [T]; NaN without any.

    ``targets``: classes [T, Q] or, several an example, [T, Q, L, ...], with ``outputs`` [T, Q, C], or [T, Q, C, L, ...]
    as for ``cross_entropy``, or [T, Q, L, ..., C]; or probabilities of classes, in the layout of ``outputs``. A label
    that is no class, or that the loss ignores, is not counted, nor is an example that ``mask`` [T, Q] leaves out.

    Raises ValueError where shapes do not fit.
    """
    right, counted = right_answers(outputs, targets, loss_fn, mask)
    return right.sum(1) / counted.sum(1)


def right_answers(
    outputs: Tensor, targets: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of each example, float64 [T, Q]: how many of its counted targets are right, and how many count. As in
    ``task_accuracies``. Raises ValueError."""
    dim = class_dim(outputs, targets, loss_fn)
    found = outputs.argmax(dim)
    if targets.is_floating_point():
        targets = targets.argmax(dim)
        counted = torch.ones_like(targets, dtype=torch.bool)
    else:
        counted = (targets >= 0) & (targets < outputs.shape[dim]) & (targets != ignored_label(loss_fn))
    if mask is not None:
        counted = counted & mask.view(*mask.shape, *[1] * (counted.dim() - 2))
    right = (found == targets) & counted
    return _of_examples(right), _of_examples(counted)


def _of_examples(targets: Tensor) -> Tensor:
    """Of targets [T, Q, ...], true or false, how many are true, [T, Q]."""
    return targets.double().view(*targets.shape[:2], -1).sum(2)


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


@dataclass(frozen=True)
class Score:
    """Means over tasks: the ``loss``, and of each metric by name its mean and the half width of its 95 % interval (1.96
    standard errors, clustered by task and, of a ``RatioMetric``, by example), None where there is none. A task whose
    labels are all ignored is in no mean. ``ratios``: of each such metric, example by example."""

    loss: float
    metrics: dict[str, tuple[float | None, float | None]]
    ratios: Mapping[str, Ratios] = field(default_factory=dict, compare=False)

    @property
    def accuracy(self) -> float | None:
        """A fraction, None where outputs are not classes."""
        return self.metrics.get("accuracy", (None, None))[0]

    @property
    def accuracy_ci95(self) -> float | None:
        return self.metrics.get("accuracy", (None, None))[1]


def score(training: Training, tasks: TaskBatch) -> Score:
    """On tasks adapted as ``training.adapting`` does, at the present parameters."""
    tasks, learner, theta = training.placed(tasks), training.learner, training.learner.theta()
    parts = []
    for part in tasks.split(training.chunk(tasks)):
        with full_precision(learner.device):
            phi = training.adapting.adapt(learner, theta, part).phi
            with torch.no_grad():
                outputs = learner.outputs(phi, part.query_x)
                parts.append(TaskScores.of(learner, training.source, outputs, part, training.metrics))
    losses, counted = (torch.cat([getattr(part, name) for part in parts]) for name in ("losses", "counted"))
    found = {name: mean_interval(torch.cat([part.values[name] for part in parts])) for name in parts[0].values}
    ratios = dict[str, Ratios]()
    if parts[0].ratios:
        examples = same_examples(tasks.query_x)
        for name in parts[0].ratios:
            above, below = (torch.cat([part.ratios[name][place] for part in parts]).cpu() for place in (0, 1))
            ratios[name] = Ratios(above, below, examples)
    found |= {name: ratio.mean_interval() for name, ratio in ratios.items()}
    return Score(float(losses[counted].mean()), found, ratios)


@dataclass(frozen=True)
class TaskScores:
    """Of each task, [T]: the loss, whether any label counted, and each metric's value, NaN where there is none; of a
    ``RatioMetric`` its parts instead, [T, Q]."""

    losses: Tensor
    counted: Tensor
    values: dict[str, Tensor]
    ratios: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls, learner: Learner, source: TaskSource, outputs: Tensor, tasks: TaskBatch, metrics: Sequence[Metric]
    ) -> "TaskScores":
        """Raises ValueError where outputs and targets do not fit a metric."""
        targets, mask, loss_fn = tasks.query_y, tasks.query_mask, learner.loss_fn
        losses = learner.losses(outputs, targets, mask).double()
        counted = torch.ones_like(losses, dtype=torch.bool)
        if source.classification:
            counted = ~task_accuracies(outputs, targets, loss_fn, mask).isnan()
        metrics = [metric for metric in metrics if source.classification or not metric.of_classes]
        ratios = {
            metric.name: metric.parts(outputs, targets, mask, loss_fn)
            for metric in metrics
            if isinstance(metric, RatioMetric)
        }
        values = {
            metric.name: metric(outputs, targets, mask, loss_fn) for metric in metrics if metric.name not in ratios
        }
        return cls(losses, counted, values, ratios)


def _count(tasks: int) -> int:
    """Of tasks to evaluate on. Raises ValueError for one: an interval needs two."""
    if whole_number("tasks", tasks, at_least=0) == 1:
        raise refuse("tasks", 1, "a whole number of at least 2, or 0 for none")
    return tasks


@dataclass
class Validation(Periodic):
    """The score on ``tasks`` fixed validation tasks, every so many meta-steps; tasks=0: never. Raises ValueError for
    one task, of which there is no interval."""

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
            **{f"val/{name}": mean for name, (mean, _) in found.metrics.items()},
        }


@dataclass
class MetaTest(Measurement):
    """The score on ``tasks`` fixed meta-test tasks, which every estimator and seed shares, once, at the very end;
    tasks=0: never. ``by_example``: also how often each example was right, for intervals of differences between runs.
    Raises ValueError for one task, of which there is no interval."""

    tasks: int = 600
    by_example: bool = False

    keys: ClassVar = {
        "test/accuracy": "fraction of a meta-test task's query labels that it gets right, mean over tasks",
        "test/accuracy_ci95": "half width of its 95 % interval, 1.96 standard errors, clustered by task and by example",
        "test/loss": "query loss there, mean over tasks",
        "test/right": "how often each example was right, in all tasks, where eval.by_example asks for it",
        "test/novel_classes": "whether training sees none of the test tasks' classes, where the data set says it",
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
        event: Event = {
            "test/accuracy": found.accuracy,
            "test/accuracy_ci95": found.accuracy_ci95,
            "test/loss": found.loss,
            "test/right": None,
            "test/novel_classes": getattr(training.source, "novel_classes", None),
        }
        for name, (mean, half) in found.metrics.items():
            event |= {f"test/{name}": mean, f"test/{name}_ci95": half}
        if self.by_example and "accuracy" in found.ratios:
            event["test/right"] = " ".join(f"{right:g}" for right in found.ratios["accuracy"].by_example().tolist())
        return event

    def rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        names = [key.removeprefix("test/") for key in summary if f"{key}_ci95" in summary]
        novel = summary.get("test/novel_classes")
        seen = "" if novel is None else ", new classes" if novel else ", classes seen in training"
        rows = [(name.replace("_", " "), _with_interval(summary, f"test/{name}")) for name in names]
        return [
            *((f"meta-test {name}", text + seen) for name, text in rows),
            ("meta-test loss", shown(summary, "test/loss", ".4f")),
        ]

    def __str__(self) -> str:
        return f"{self.tasks} meta-test tasks"


def _with_interval(summary: Mapping[str, Any], key: str) -> str:
    form, scale, unit = (".1f", 100, " %") if key.endswith("accuracy") else (".4g", 1, "")
    text, half = shown(summary, key, form, scale), summary[f"{key}_ci95"]
    if summary[key] is None:
        return text
    return text + (unit if half is None else f" ± {shown(summary, f'{key}_ci95', form, scale)}{unit}")
