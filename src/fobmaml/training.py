"""Meta-training: the loop, what is measured beside it, and what a checkpoint has to hold."""

import logging
import math
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fobmaml import distributed
from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.engine import ENGINES, Learner
from fobmaml.estimators import Estimator, chunk_size, estimate
from fobmaml.measure import Event, Measurement, peak_bytes
from fobmaml.measure.accuracy import task_scores
from fobmaml.tasks import Split, TaskBatch, TaskSource
from fobmaml.tasks.checks import check_members, check_repeats, failures_named, sample

log = logging.getLogger(__name__)

EVALUATION_SEED = 0
"""Seeds the fixed tasks, whatever the training seed."""
LINEAR = "linear/steps", "linear/relative_residual", "linear/negative_curvature"
"""What linear solves met, means over tasks; the last one is the share of the tasks in which it happened."""
A_FEW = 10
"""Tasks whose linear solve may meet negative curvature before it is said."""
RECENT = 1000
"""Meta-steps whose times are kept, for their median."""
KEYS = {
    "train/loss": "query loss of the meta-step's tasks, mean",
    "meta_gradient/norm": "of the mean over tasks",
    "inner/residual": "norm of the inner problem's gradient where the solver stopped, mean over tasks",
    "optimizer/lr": "step length, as scheduled",
    "time/meta_step_s": "seconds, median of recent meta-steps",
    "estimator/nu": "ν that estimator.nu=auto has chosen",
    "linear/steps": "Hessian products of a linear solve, mean over tasks as these",
    "linear/relative_residual": "of the linear solve",
    "linear/negative_curvature": "share of the tasks that met it",
    "model/parameters": "number that are trained",
    "loss/name": "of the data set's loss",
}
"""What is logged of training itself, each with what it is."""


class Diverged(RuntimeError):
    """A meta-gradient was not finite."""

    advice = "{error}; the last good checkpoint is {checkpoint}"


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know; the meaning of each is in configs/train.yaml. Raises ValueError."""

    steps: int = 600
    seed: int = 0
    meta_batch: int = 16
    fixed_tasks: bool = False
    task_chunk: int | str = "auto"
    memory_limit_mb: float | None = None
    engine: str = "auto"
    schedule: str = "cosine"
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("meta_batch", "log_every", "checkpoint_every"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, at_least=0, at_most=2**64 - 1)
        whole_number("steps", self.steps, at_least=0)
        if not isinstance(self.fixed_tasks, bool):
            raise refuse("fixed_tasks", self.fixed_tasks, "true or false")
        if self.task_chunk != "auto":
            try:
                whole_number("task_chunk", self.task_chunk)
            except ValueError as error:
                raise ValueError(f"{error}, or auto") from None
        if self.memory_limit_mb is not None:
            number("memory_limit_mb", self.memory_limit_mb, above=0.0)
            if self.task_chunk != "auto":
                raise refuse("memory_limit_mb", self.memory_limit_mb, "task_chunk=auto, which it limits")
        one_of("engine", self.engine, ENGINES)
        one_of("schedule", self.schedule, ("cosine", "constant"))


class MetaTraining:
    """The state of one meta-training run and the things that can be done with it.

    config → task batch → estimator(learner, θ, tasks) → meta-gradient → optimizer → θ. Every random choice of step t
    is a function of (seed, t), so that a run continued from a checkpoint is the uninterrupted run.
    """

    def __init__(
        self,
        model: nn.Module,
        source: TaskSource,
        estimator: Estimator,
        settings: Settings,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        measurements: Sequence[Measurement] = (),
    ):
        check_members(source)
        self.settings, self.source, self.estimator, self.measurements = settings, source, estimator, tuple(measurements)
        self.step, self.train_seconds, self.negative_curvature_tasks = 0, 0.0, 0.0
        self._in_turn = False
        self.learner = Learner(model, source.loss_fn, settings.engine)
        named = dict(model.named_parameters())
        self.parameters = {name: named[name] for name in self.learner.shapes}
        self.optimizer = make_optimizer(list(self.parameters.values()))
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if settings.meta_batch < distributed.size():
            raise refuse("meta_batch", settings.meta_batch, f"at least {distributed.size()}, a task for each process")
        self._check_source()
        _ = self._at_most  # a limit that is too low is refused here
        self.latest: Event = {"model/parameters": self.learner.parameter_count, "loss/name": loss_name(source.loss_fn)}
        self.step_seconds: deque[float] = deque(maxlen=RECENT)

    def _check_source(self) -> None:
        """Samples every split as it will be, so that a source that fails does so before the first step."""
        s = self.settings
        with torch.random.fork_rng(devices=[]):  # the run itself goes on as if nothing had been drawn
            tasks, again = (self.tasks("train", s.meta_batch, s.seed) for _ in range(2))
            check_repeats(tasks, again)
            for measurement in self.measurements:
                measurement.check(self)
            one, theta = self.placed(tasks[:1]), self.learner.theta()
            with failures_named(f"model: forward at examples {list(one.query_x.shape[1:])} of the data set"):
                outputs = self.learner.outputs(theta[None], one.query_x)
            with failures_named("dataset: loss_fn"):
                task_scores(self.learner, self.source, outputs, one.query_y)

    def _learning_rate_factor(self, step: int) -> float:
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * step / self.settings.steps))

    def tasks(self, split: Split, count: int, seed: int, step: int = 0) -> TaskBatch:
        """Tasks as a function of (split, seed, step), in float64 on the CPU; with ``fixed_tasks`` of count alone."""
        if self.settings.fixed_tasks:
            split, seed, step = "train", self.settings.seed, 0
        entropy = np.random.SeedSequence([seed, ("train", "validation", "test").index(split), step])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
        tasks = sample(self.source, split, count, generator)
        return tasks if tasks.keys is not None else tasks.keyed(generator)

    def fixed(self, split: Split, count: int, stream: int = 0) -> TaskBatch:
        return self.tasks(split, count, EVALUATION_SEED, stream)

    def placed(self, tasks: TaskBatch) -> TaskBatch:
        return tasks.to(self.learner.device, self.learner.dtype)

    def chunk(self, tasks: TaskBatch, estimator: Estimator | None = None) -> int:
        """Tasks solved at once, for meta-gradients by ``estimator`` or to adapt only."""
        if isinstance(self.settings.task_chunk, int):
            return min(self.settings.task_chunk, len(tasks))
        return min(chunk_size(self.learner, tasks, estimator), self._at_most)

    @cached_property
    def _at_most(self) -> int:
        """How many tasks ``memory_limit_mb`` has room for, from the peak storage of one task's meta-gradient."""
        limit = self.settings.memory_limit_mb
        if limit is None:
            return sys.maxsize
        one = self._peak_bytes(self.placed(self.tasks("train", 1, self.settings.seed)), 1)
        if one > 1e6 * limit:
            raise refuse("memory_limit_mb", limit, f"at least {math.ceil(one / 1e5) / 10}, what one task needs")
        return int(1e6 * limit // one)

    def _peak_bytes(self, tasks: TaskBatch, chunk: int) -> int:
        theta = self.learner.theta()
        return peak_bytes(
            lambda: estimate(self.estimator, self.learner, theta, tasks, chunk, diagnose=False), self.learner.device
        )

    def _meta_gradient(self, step: int, theta: Tensor, logged: bool) -> Tensor:
        """Of a meta-step's tasks, means: the gradient [P]; if ``logged``, behind it the query loss, the residual and ν;
        behind that what the linear solves met, where the estimator does some, in the order of ``LINEAR``.

        In the first process of several; each computes its share.
        """
        s = self.settings
        tasks = self.placed(distributed.share(self.tasks("train", s.meta_batch, s.seed, step)))
        result = estimate(
            self.estimator, self.learner, theta, tasks, self.chunk(tasks, self.estimator), diagnose=logged
        )
        values = result.gradient
        if result.query_loss is not None and result.residual is not None:
            nu = values.new_tensor([result.nu or 0.0])
            values = torch.cat([values, result.query_loss.mean()[None], result.residual.mean()[None], nu])
        if result.linear is not None:
            met = result.linear.steps, result.linear.relative_residual, result.linear.negative_curvature
            values = torch.cat([values, torch.stack([each.to(values).mean() for each in met])])
        return distributed.mean(values, len(tasks), s.meta_batch)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around all that the first process does: on exit the others' ``follow`` ends."""
        try:
            yield
        finally:
            if not self._in_turn:  # else this process failed in its share: the others learn it when it ends
                distributed.end(self.learner.device)

    def follow(self) -> None:
        """What the other processes of a run do until the first one is through: their shares (``distributed``)."""
        theta = self.learner.theta()
        for step, logged in distributed.turns(theta):
            self._meta_gradient(step, theta, logged)

    def train(self, stopping: Callable[[], object] = lambda: False) -> Iterator[Event]:
        """Meta-steps until ``settings.steps``, or until ``stopping()``, yielding what there is to log after each (often
        nothing).

        Raises Diverged, before the step is taken, if the meta-gradient is not finite.
        """
        s = self.settings
        while self.step < s.steps and not stopping():
            started = time.perf_counter()
            logged = (self.step + 1) % s.log_every == 0 or self.step + 1 in (1, s.steps)
            theta = self.learner.theta()
            self._in_turn = True
            distributed.announce(self.step, logged, theta)
            gradient, diagnosis, met = self._meta_gradient(self.step, theta, logged).tensor_split(
                [len(theta), len(theta) + 3 * logged]
            )
            self._in_turn = False
            norm = float(gradient.norm())
            if not math.isfinite(norm):
                raise Diverged(
                    f"the meta-gradient at step {self.step + 1} is not finite: try a smaller solver.lr or "
                    "optimizer.lr, or a larger estimator.lam"
                )
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._learning_rate_factor(self.step)
            for name, part in self.learner.unflatten(gradient).items():
                self.parameters[name].grad = part
            self.optimizer.step()
            self.step += 1
            spent = time.perf_counter() - started
            self.step_seconds.append(spent)
            self.train_seconds += spent
            linear = dict(zip(LINEAR, met.tolist(), strict=False))
            self._say_once_of_negative_curvature(s.meta_batch * linear.get("linear/negative_curvature", 0.0))
            event: Event = {}
            if logged:
                loss, residual, nu = diagnosis.tolist()
                event = {
                    "train/loss": loss,
                    "meta_gradient/norm": norm,
                    "inner/residual": residual,
                    "optimizer/lr": self.optimizer.param_groups[0]["lr"],
                    "time/meta_step_s": statistics.median(self.step_seconds),
                    **linear,
                    **({"estimator/nu": nu} if self.estimator.nu == "auto" else {}),
                }
            yield self._record(event)

    def _say_once_of_negative_curvature(self, tasks: float) -> None:
        before, self.negative_curvature_tasks = self.negative_curvature_tasks, self.negative_curvature_tasks + tasks
        if before <= A_FEW < self.negative_curvature_tasks:
            log.warning(
                "negative curvature stopped the conjugate gradients of %.0f tasks in %d meta-steps: their "
                "meta-gradients are cut short (linear/negative_curvature); a larger estimator.lam avoids it",
                self.negative_curvature_tasks,
                self.step,
            )

    def _record(self, event: Event) -> Event:
        self.latest.update(event)
        return event

    def due(self, ended: bool = False) -> list[Measurement]:
        """What is to be measured after the present step, at step 0 before the first; or when all have been taken."""
        return [each for each in self.measurements if each.due(self.step, self.settings.steps, ended)]

    def measure(self, ended: bool = False) -> Event:
        event = Event()
        for measurement in self.due(ended):
            event |= self._record(measurement(self))
        return event

    def peak_bytes(self) -> int:
        """Peak storage of one meta-gradient on a training meta-batch, or on one process's share of it."""
        s = self.settings
        tasks = self.placed(distributed.share(self.tasks("train", s.meta_batch, s.seed)))
        return self._peak_bytes(tasks, self.chunk(tasks, self.estimator))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {
            "step": self.step,
            "model": self.learner.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "latest": dict(self.latest),
            "engine": self.learner.used,
            "train_seconds": self.train_seconds,
            "negative_curvature_tasks": self.negative_curvature_tasks,
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.latest = state["step"], {**self.latest, **state["latest"]}
        self.negative_curvature_tasks = state["negative_curvature_tasks"]
        times = state["step_seconds"].tolist()
        self.step_seconds.clear()
        self.step_seconds.extend(times)
        self.train_seconds = state["train_seconds"]


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
