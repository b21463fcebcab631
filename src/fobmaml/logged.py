"""What meta-training logs of itself, and what a plot calls its loss."""

import re
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fobmaml.engine import Work

LINEAR = "linear/steps", "linear/relative_residual", "linear/negative_curvature"
"""What linear solves met, means over tasks; the last one is the share of the tasks in which it happened."""
WORK = {
    "work/example_gradients": "gradients of one example that meta-steps took until then; a forward pass is a third",
    "work/hessian_products": "Hessian products of one example in them",
}
KEYS = {
    "train/loss": "query loss of the meta-step's tasks, mean",
    "meta_gradient/norm": "of the mean over tasks, before clip",
    "meta_gradient/clipped": "share of the tasks whose meta-gradient task_clip shortened",
    "inner/residual": "norm of the inner problem's gradient where the solver stopped, mean over tasks",
    "optimizer/lr": "step length, as scheduled",
    "time/meta_step_s": "seconds, median of recent meta-steps",
    **WORK,
    "estimator/nu": "ν that estimator.nu=auto has chosen",
    "linear/steps": "Hessian products of a linear solve, mean over tasks as these",
    "linear/relative_residual": "of the linear solve",
    "linear/negative_curvature": "share of the tasks that met it",
    "model/parameters": "number that are trained",
    "loss/name": "of the data set's loss",
}
"""What is logged of training itself, each with what it is."""


def worked(work: Work) -> dict[str, float | int | str | None]:
    """As it is logged."""
    return {"work/example_gradients": work.example_gradients, "work/hessian_products": work.hessian_products}


LOSS_NAMES = {
    **dict.fromkeys(("cross_entropy", "cross_entropy_loss"), "cross-entropy (nats)"),
    "nll_loss": "negative log-likelihood (nats)",
    "mse_loss": "mean squared error",
    "l1_loss": "mean absolute error",
}
"""Of torch's functions and modules, where their own is not what a plot says."""


def loss_name(loss_fn: Callable[..., Tensor]) -> str:
    """What a plot calls a loss: its own name, in words."""
    if isinstance(loss_fn, partial):
        return loss_name(loss_fn.func)
    if isinstance(loss_fn, nn.Module) or not hasattr(loss_fn, "__name__"):
        name = re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(loss_fn).__name__).lower()
    else:
        name = loss_fn.__name__
    return LOSS_NAMES.get(name, "loss" if name in ("<lambda>", "loss_fn") else name.strip("_").replace("_", " "))
