"""The part of a task's predictions that is right, and the interval of its mean over tasks."""

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

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
        fitting = [dim for dim in dict.fromkeys((2, last))
                   if last >= 2 and shape[:dim] + shape[dim + 1 :] == targets.shape]
    if not fitting or shape[fitting[0]] < 2:
        raise ValueError(f"outputs {list(shape)}: takes classes, two or more, as [T, Q, C], [T, Q, C, ...] or "
                         f"[T, Q, ..., C], for an accuracy at targets {list(targets.shape)}")
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
