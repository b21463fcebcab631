"""What is measured of a task's predictions beside the loss: a number a task, and an interval of the mean over tasks."""

from collections.abc import Callable

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.measure.accuracy import right_answers
from fobmaml.measure.base import Metric, RatioMetric


class Accuracy(RatioMetric):
    """Part of a task's counted targets at which ``argmax`` of the outputs is right (``task_accuracies``)."""

    name = "accuracy"
    of_classes = True

    def parts(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        return right_answers(outputs, targets, loss_fn, mask)


class TokenAccuracy(Accuracy):
    """The same of sequences, [T, Q, L, ...]: part of all of a task's tokens, those aside that the loss ignores.

    Raises ValueError for targets that are not sequences.
    """

    name = "token_accuracy"

    def parts(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if targets.dim() < 3 or targets.is_floating_point():
            raise refuse(
                "metrics", self.name, f"targets [T, Q, L, ...] of classes, and these are {list(targets.shape)}"
            )
        return super().parts(outputs, targets, mask, loss_fn)


class MeanSquaredError(RatioMetric):
    """Mean of (outputs − targets)² over a task's examples and their values.

    Raises ValueError for targets of another shape than the outputs'.
    """

    name = "mse"

    def parts(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        squares, there = _squares(self.name, outputs, targets, mask)
        return squares.sum(2), there.squeeze(2) * squares.shape[2]


def _squares(name: str, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the errors, [T, Q, values], zero where there is no example; and where there is one, [T, Q, 1]."""
    if outputs.shape != targets.shape or not targets.is_floating_point():
        takes = f"targets like the outputs, {list(outputs.shape)}, and these are {list(targets.shape)}"
        raise refuse("metrics", name, takes)
    there = targets.new_ones(targets.shape[:2]) if mask is None else mask
    there = there.double().unsqueeze(-1)
    return (outputs.double() - targets.double()).flatten(2).square() * there, there


class R2(Metric):
    """1 − Σ(targets − outputs)² / Σ(targets − their mean)² of a task's examples, each value's mean over them; none
    where all targets are equal. 1 is perfect, 0 as good as the mean of the query targets, which nobody knows before.
    Of tasks with few examples it is skewed, and the interval of the mean too narrow.

    Raises ValueError for targets of another shape than the outputs'.
    """

    name = "r2"

    def __call__(
        self, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        squares, there = _squares(self.name, outputs, targets, mask)
        values = targets.double().flatten(2)
        mean = (values * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        total = ((values - mean).square() * there).sum((1, 2))
        return torch.where(total > 0, 1.0 - squares.sum((1, 2)) / total, torch.nan)
