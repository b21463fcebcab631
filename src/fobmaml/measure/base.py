"""What a measurement is: it looks on from the side, says when it is due and what it writes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fobmaml.arguments import whole_number
from fobmaml.engine import Learner, Work
from fobmaml.estimators import Estimator
from fobmaml.tasks import Split, TaskBatch, TaskSource

Event = dict[str, float | int | str | None]
"""What was measured at a step: each key with its value, None where there is none."""


class Training(Protocol):
    """What a measurement sees of a meta-training run (``fobmaml.training.MetaTraining``)."""

    learner: Learner
    """The network at its present parameters, ``learner.theta()`` [P], and the loss."""
    estimator: Estimator
    adapting: Estimator
    """The same, whose ``adapt`` is that of validation and meta-test tasks."""
    source: TaskSource
    step: int
    train_seconds: float
    work: Work
    """Of all meta-steps so far."""
    metrics: Sequence["Metric"]
    """What is measured on validation and meta-test tasks beside the loss."""

    def fixed(self, split: Split, count: int, stream: int = 0) -> TaskBatch:
        """The same ``count`` tasks whatever the run's seed, in float64; another ``stream``, other tasks."""

    def placed(self, tasks: TaskBatch) -> TaskBatch:
        """On the network's device, in its dtype."""

    def chunk(self, tasks: TaskBatch, estimator: Estimator | None = None) -> int:
        """How many tasks to solve at once, for meta-gradients by ``estimator`` or to adapt only."""

    def peak_bytes(self) -> int:
        """Peak storage of one meta-gradient of a meta-batch, of this process's share of it."""


class Metric(ABC):
    """A number of each task's predictions. To add one, subclass it, and write a file in configs/metrics."""

    name: ClassVar[str]
    """It is logged as ``val/NAME``, ``test/NAME`` and ``test/NAME_ci95``."""
    of_classes: ClassVar[bool] = False
    """Whether it takes outputs that are classes; of a source that has others there is none."""

    @abstractmethod
    def __call__(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Of each task, [T], NaN where there is none: ``outputs`` [T, Q, ...], ``targets`` [T, Q, ...]; ``mask``
        [T, Q]: the examples that there are, None: all. ``loss_fn``: the data set's, which may ignore a label."""


class RatioMetric(Metric):
    """A metric that is, of each task, a sum over its examples divided by another: its interval knows then which tasks
    share examples."""

    @abstractmethod
    def parts(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of each example what is summed, and what the sum is divided by, float64 [T, Q]."""

    def __call__(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        parts, of = self.parts(outputs, targets, mask, loss_fn)
        return parts.sum(1) / of.sum(1)


class Measurement(ABC):
    """To add one, subclass it, or ``Periodic``, and write a file in configs/measure that names it."""

    keys: ClassVar[Mapping[str, str]] = {}
    """All that it writes: of each key what it is, with the unit."""
    results: ClassVar[Sequence[str]] = ()
    """The keys that head every summary, null where nothing was measured."""
    progress: ClassVar[Sequence[str]] = ()
    """The keys that follow there, behind training's own."""

    @abstractmethod
    def due(self, step: int, steps: int, ended: bool) -> bool:
        """Whether to measure after meta-step ``step`` of ``steps``, at 0 before the first; ``ended``: at the very end,
        once the last step has been measured."""

    @abstractmethod
    def __call__(self, training: Training) -> Event:
        """Measures at the present parameters. Values of ``keys``, None where there is none."""

    def check(self, training: Training) -> None:  # noqa: B027
        """Before the first step. Raises ValueError where it could not be measured of this run."""

    def rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Its lines, label and text, in the table that ends a run."""
        return []

    def __str__(self) -> str:
        return type(self).__name__


@dataclass
class Periodic(Measurement):
    """Due every so many meta-steps, and at the end of training. Raises ValueError unless ``every`` ≥ 0; 0: never."""

    every: int = 0

    def __post_init__(self) -> None:
        whole_number("every", self.every, at_least=0)

    def due(self, step: int, steps: int, ended: bool) -> bool:
        return self.every > 0 and not ended and (step % self.every == 0 or step == steps)


@dataclass
class OnValidationTasks(Periodic):
    """Measured on ``tasks`` fixed validation tasks, those of its ``stream``. Raises ValueError unless tasks ≥ 1."""

    tasks: int = 4
    stream: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("tasks", self.tasks)

    def sample(self, training: Training) -> TaskBatch:
        return training.fixed("validation", self.tasks, self.stream)

    def check(self, training: Training) -> None:
        if self.every:
            self.sample(training)


def shown(summary: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    """A number of a summary as tables show it."""
    return "not available" if summary[key] is None else format(scale * summary[key], form)
