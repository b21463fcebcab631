"""Meta-training: the loop, evaluation on fixed tasks, and what a checkpoint has to hold."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fobmaml import distributed
from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.estimators import Estimator, chunk_size, estimate
from fobmaml.learner import ENGINES, Learner
from fobmaml.measure import bias, curvature, peak_bytes, smoothness
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import Split, TaskBatch, TaskSource

EVALUATION_SEED = 0
"""Seeds the validation and test tasks, whatever the training seed."""

Event = dict[str, float | int | str | None]


class Diverged(RuntimeError):
    """A meta-gradient was not finite."""


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know; the meaning and default of each is in configs/train.yaml. Raises ValueError."""

    steps: int
    seed: int
    meta_batch: int
    fixed_tasks: bool
    task_chunk: int | str
    memory_limit_mb: float | None
    engine: str
    schedule: str
    log_every: int
    checkpoint_every: int
    eval_every: int
    eval_tasks: int
    eval_validation_tasks: int
    bias_every: int
    bias_at_start: bool
    bias_tasks: int
    bias_tol: float
    smoothness_every: int
    smoothness_tasks: int
    smoothness_radius: float
    curvature_every: int
    curvature_tasks: int

    def __post_init__(self) -> None:
        for name in ("meta_batch", "log_every", "checkpoint_every", "eval_every", "bias_tasks", "smoothness_tasks",
                     "curvature_tasks"):
            whole_number(name, getattr(self, name))
        for name in ("steps", "seed", "eval_tasks", "eval_validation_tasks", "bias_every", "smoothness_every",
                     "curvature_every"):
            whole_number(name, getattr(self, name), at_least=0)
        for name in ("eval_tasks", "eval_validation_tasks"):  # an interval needs two
            if getattr(self, name) == 1:
                raise refuse(name, 1, "a whole number of at least 2, or 0 for none")
        for name in ("fixed_tasks", "bias_at_start"):
            if not isinstance(getattr(self, name), bool):
                raise refuse(name, getattr(self, name), "true or false")
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
        number("bias_tol", self.bias_tol, above=0.0)
        number("smoothness_radius", self.smoothness_radius, above=0.0)


@dataclass(frozen=True)
class Score:
    """Means over the tasks of a split. ``accuracy`` and the half width of its 95 % interval (1.96 standard errors over
    tasks) are fractions, None where outputs are not classes."""

    loss: float
    accuracy: float | None
    accuracy_ci95: float | None


class MetaTraining:
    """The state of one meta-training run and the things that can be done with it.

    config → task batch → estimator(learner, θ, tasks) → meta-gradient → optimizer → θ. Every random choice of step t
    is a function of (seed, t), so that a run continued from a checkpoint is the uninterrupted run.
    """

    def __init__(self, model: nn.Module, source: TaskSource, estimator: Estimator, settings: Settings,
                 make_optimizer: Callable[[list[nn.Parameter]], Optimizer]):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # differences need all digits
        self.settings, self.source, self.estimator = settings, source, estimator
        self.learner = Learner(model, source.loss_fn, settings.engine)
        named = dict(model.named_parameters())
        self.parameters = {name: named[name] for name in self.learner.shapes}
        self.optimizer = make_optimizer(list(self.parameters.values()))
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if settings.meta_batch < distributed.size():
            raise refuse("meta_batch", settings.meta_batch, f"at least {distributed.size()}, a task for each process")
        _ = self._at_most  # a limit that is too low is refused here
        if settings.curvature_every and not (isinstance(estimator.solver, GradientDescent)
                                             and estimator.solver.momentum == 0.0):
            raise refuse("curvature_every", settings.curvature_every, "solver=gd without momentum, or 0 for never")
        self.step = 0
        self.latest: Event = {"model/parameters": self.learner.parameter_count}
        self.step_seconds: list[float] = []

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
        return self.source.sample(split, count, generator)

    def _placed(self, tasks: TaskBatch) -> TaskBatch:
        return tasks.to(self.learner.device, self.learner.dtype)

    def _chunk(self, tasks: TaskBatch, estimator: Estimator | None = None) -> int:
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
        one = self._peak_bytes(self._placed(self.tasks("train", 1, self.settings.seed)), 1)
        if one > 1e6 * limit:
            raise refuse("memory_limit_mb", limit, f"at least {math.ceil(one / 1e5) / 10}, what one task needs")
        return int(1e6 * limit // one)

    def _peak_bytes(self, tasks: TaskBatch, chunk: int) -> int:
        theta = self.learner.theta()
        return peak_bytes(lambda: estimate(self.estimator, self.learner, theta, tasks, chunk, diagnose=False),
                          self.learner.device)

    def _meta_gradient(self, step: int, theta: Tensor, logged: bool) -> Tensor:
        """Of a meta-step's tasks: the mean gradient [P]; if ``logged``, behind it the mean query loss and residual.

        In the first process of several; each computes its share.
        """
        s = self.settings
        tasks = self._placed(distributed.share(self.tasks("train", s.meta_batch, s.seed, step)))
        result = estimate(self.estimator, self.learner, theta, tasks, self._chunk(tasks, self.estimator),
                          diagnose=logged)
        values = result.gradient
        if result.query_loss is not None and result.residual is not None:
            values = torch.cat([values, result.query_loss.mean()[None], result.residual.mean()[None]])
        return distributed.mean(values, len(tasks), s.meta_batch)

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
            distributed.announce(self.step, logged, theta)
            gradient, diagnosis = self._meta_gradient(self.step, theta, logged).split_with_sizes(
                [len(theta), 2 * logged])
            norm = float(gradient.norm())
            if not math.isfinite(norm):
                raise Diverged(f"the meta-gradient at step {self.step + 1} is not finite: try a smaller solver.lr or "
                               "optimizer.lr, or a larger estimator.lam")
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._learning_rate_factor(self.step)
            for name, part in self.learner.fold(gradient).items():
                self.parameters[name].grad = part
            self.optimizer.step()
            self.step += 1
            self.step_seconds.append(time.perf_counter() - started)
            event: Event = {}
            if logged:
                loss, residual = diagnosis.tolist()
                event = {"train/loss": loss, "meta_gradient/norm": norm, "inner/residual": residual,
                         "optimizer/lr": self.optimizer.param_groups[0]["lr"],
                         "time/meta_step_s": statistics.median(self.step_seconds)}
            yield self._record(event)

    def _record(self, event: Event) -> Event:
        self.latest.update(event)
        return event

    def evaluate(self, split: Split, count: int) -> Score:
        """The score on ``count`` fixed tasks of a split, adapted with the estimator's own inner problem."""
        tasks = self._placed(self.tasks(split, count, EVALUATION_SEED))
        theta, chunk = self.learner.theta(), self._chunk(tasks)
        losses, accuracies = [], []
        for part in tasks.split(chunk):
            loss, outputs = _query(self.learner, self.estimator.adapt(self.learner, theta, part).phi, part)
            losses.append(loss)
            if self.source.classification:
                accuracies.append((outputs.argmax(-1) == part.query_y).double().mean(1))
        mean_loss = float(torch.cat(losses).double().mean())
        if not accuracies:
            return Score(mean_loss, None, None)
        accuracy = torch.cat(accuracies)
        return Score(mean_loss, float(accuracy.mean()), 1.96 * float(accuracy.std()) / math.sqrt(count))

    def validate(self) -> Event:
        score = self.evaluate("validation", self.settings.eval_validation_tasks)
        return self._record({"val/accuracy": score.accuracy, "val/loss": score.loss,
                             "time/train_s": math.fsum(self.step_seconds)})

    def measure_bias(self) -> Event:
        """The bias at the present θ on fixed validation tasks."""
        s = self.settings
        tasks = self.tasks("validation", s.bias_tasks, EVALUATION_SEED, step=1).to(self.learner.device)
        b = bias(self.estimator, self.learner, tasks, s.bias_tol)
        return self._record({"bias/relative_error": b.relative_error, "bias/cosine": b.cosine,
                             "bias/reference": b.reference, "bias/reason": b.reason,
                             "bias/exact_norm": b.exact_norm})

    def measure_smoothness(self) -> Event:
        """The local smoothness of the estimator's F at the present θ on fixed validation tasks."""
        s = self.settings
        tasks = self._placed(self.tasks("validation", s.smoothness_tasks, EVALUATION_SEED, step=2))
        found = smoothness(self.estimator, self.learner, tasks, s.smoothness_radius)
        return self._record({"smoothness/local": found.local, "smoothness/gradient_norm": found.gradient_norm})

    def measure_curvature(self) -> Event:
        """The support loss's curvature at the present θ on fixed validation tasks, and FO-MAML's error there."""
        tasks = self._placed(self.tasks("validation", self.settings.curvature_tasks, EVALUATION_SEED, step=3))
        solver = self.estimator.solver
        assert isinstance(solver, GradientDescent)
        found = curvature(self.learner, tasks, solver)
        return self._record({f"curvature/{name}": value for name, value in asdict(found).items()})

    def measure(self, first: bool = False) -> Event:
        """What is due after the present step, or at the start: ``first``."""
        s, event = self.settings, Event()
        bias_every = 0 if first and s.steps and not s.bias_at_start else s.bias_every
        for every, measurement in ((s.eval_every if s.eval_validation_tasks else 0, self.validate),
                                   (bias_every, self.measure_bias), (s.smoothness_every, self.measure_smoothness),
                                   (s.curvature_every, self.measure_curvature)):
            if every and (first or self.step % every == 0 or self.step == s.steps):
                event |= measurement()
        return event

    def test(self) -> Event:
        """The score on the meta-test tasks, which every estimator and seed shares. Look at it once."""
        if not self.settings.eval_tasks:
            return {}
        score = self.evaluate("test", self.settings.eval_tasks)
        return self._record({"test/accuracy": score.accuracy, "test/accuracy_ci95": score.accuracy_ci95,
                             "test/loss": score.loss})

    def measure_memory(self) -> Event:
        """Peak storage of one meta-gradient on a training meta-batch, or on one process's share of it."""
        s = self.settings
        tasks = self._placed(distributed.share(self.tasks("train", s.meta_batch, s.seed)))
        return self._record({"memory/peak_bytes": self._peak_bytes(tasks, self._chunk(tasks, self.estimator))})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {"step": self.step, "model": self.learner.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "latest": dict(self.latest), "engine": self.learner.used,
                "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.latest = state["step"], dict(state["latest"])
        self.step_seconds = state["step_seconds"].tolist()


@torch.no_grad()
def _query(learner: Learner, phi: Tensor, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
    outputs = learner.outputs(phi, tasks.query_x)
    return learner.losses(outputs, tasks.query_y), outputs
