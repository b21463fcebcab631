"""Meta-training: the loop, what is measured beside it, and what a checkpoint has to hold."""

import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fobmaml import distributed
from fobmaml.arguments import refuse
from fobmaml.engine import Learner, Work
from fobmaml.estimators import Adaptation, Estimator, MeanEstimate, chunk_size, estimate
from fobmaml.logged import LINEAR, loss_name, worked
from fobmaml.measure import Accuracy, Event, Measurement, Metric, peak_bytes
from fobmaml.measure.accuracy import TaskScores
from fobmaml.outer import Outer
from fobmaml.settings import Settings
from fobmaml.stages import Stage, Stages
from fobmaml.tasks import Split, Stream, TaskBatch, TaskSource
from fobmaml.tasks.ahead import Ahead
from fobmaml.tasks.checks import check_members, check_repeats, failures_named, sample, samples_each

log = logging.getLogger(__name__)

EVALUATION_SEED = 0
"""Seeds the fixed tasks, whatever the training seed."""
A_FEW = 10
"""Tasks whose linear solve may meet negative curvature before it is said."""
RECENT = 1000
"""Meta-steps whose times are kept, for their median."""


class Diverged(RuntimeError):
    """A meta-gradient was not finite."""

    advice = "{error}; the last good checkpoint is {checkpoint}"


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
        adaptation: Adaptation | None = None,
        stages: Sequence[Stage] = (),
        metrics: Sequence[Metric] = (Accuracy(),),
    ):
        """``adaptation``: of validation and meta-test tasks, by default as in training, without ``stages``.
        ``metrics``: what is measured there beside the loss."""
        check_members(source)
        self.settings, self.source, self.estimator, self.measurements = settings, source, estimator, tuple(measurements)
        self.stages, self.metrics = Stages(estimator, stages), metrics
        self.step, self.train_seconds, self.negative_curvature_tasks, self.work = 0, 0.0, 0.0, Work()
        self._in_turn = False
        self.at_once: int | None = None  # tasks solved together in the latest meta-step
        support_loss = getattr(source, "support_loss", None)
        self.learner = Learner(model, source.loss_fn, settings.engine, settings.adapt, support_loss)
        self.outer = Outer(self.learner, estimator)
        self.adapting = estimator.adapting(adaptation or Adaptation())  # behind outer, to share its variables
        self.optimizer = self.outer.optimizer(make_optimizer)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if settings.meta_batch < distributed.size():
            raise refuse("meta_batch", settings.meta_batch, f"at least {distributed.size()}, a task for each process")
        if settings.prefetch and isinstance(source, Stream):
            raise refuse("prefetch", True, "false for a stream, whose place is that of the step")
        self._ahead = Ahead(
            lambda steps: [*map(distributed.share, self.each("train", settings.meta_batch, settings.seed, steps))],
            settings.steps,
            together=samples_each(source) and not settings.prefetch,
        )
        self._check_source()
        _ = self._at_most  # a limit that is too low is refused here
        self.latest: Event = {
            "model/parameters": self.learner.parameter_count,
            "loss/name": loss_name(source.loss_fn),
            **worked(self.work),
        }
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
                TaskScores.of(self.learner, self.source, outputs, one, self.metrics)

    @property
    def _ends(self) -> list[tuple[float, float]]:
        """What there is of each thing that ends a run, and at how much it does."""
        s = self.settings
        return [(done, of) for done, of in ((self.step, s.steps), (self.work.total, s.budget)) if of is not None]

    @property
    def ended(self) -> bool:
        """Whether all meta-steps have been taken: ``steps``, or the first one that reaches ``budget``."""
        return any(done >= of for done, of in self._ends)

    @property
    def fraction(self) -> float:
        """Of the way to whichever end comes first."""
        return min(max(done / of if of else 1.0 for done, of in self._ends), 1.0)

    def _ends_at_next(self) -> bool:
        """Whether the next meta-step is the last one, if it takes what they took on average."""
        return any(done * (self.step + 1) >= of * self.step > 0 for done, of in self._ends)

    def _learning_rate_factor(self) -> float:
        over = self.fraction
        factors = {"constant": 1.0, "linear": 1.0 - over, "cosine": 0.5 * (1.0 + math.cos(math.pi * over))}
        return factors[self.settings.schedule]

    def tasks(self, split: Split, count: int, seed: int, step: int = 0) -> TaskBatch:
        """Tasks as a function of (split, seed, step), as the source makes them; with ``fixed_tasks`` of count alone."""
        return self.each(split, count, seed, [step])[0]

    def each(self, split: Split, count: int, seed: int, steps: Sequence[int]) -> list[TaskBatch]:
        """``tasks`` of some steps; of several, only where the source ``samples_each``."""
        if self.settings.fixed_tasks:
            split, seed, steps = "train", self.settings.seed, [0] * len(steps)
        generators = []
        for step in steps:
            entropy = np.random.SeedSequence([seed, ("train", "validation", "test").index(split), step])
            generators.append(torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1))
        if split == "train" and isinstance(self.source, Stream):
            self.source.seek(steps[0] * count)
        tasks = sample(self.source, split, count, generators)
        if tasks.keys is None:
            tasks = tasks.keyed(*generators)
        return [tasks] if len(steps) == 1 else [*tasks.split(count)]

    def fixed(self, split: Split, count: int, stream: int = 0) -> TaskBatch:
        return self.tasks(split, count, EVALUATION_SEED, stream)

    def placed(self, tasks: TaskBatch) -> TaskBatch:
        self.learner.take(tasks.layout)
        return tasks.to(self.learner.device, self.learner.dtype)

    def chunk(self, tasks: TaskBatch, estimator: Estimator | None = None) -> int:
        """Tasks solved at once, for meta-gradients by ``estimator`` or to adapt only."""
        alone = distributed.size() == 1  # several processes would not choose the same engine
        fast = chunk_size(self.learner, tasks, estimator, measure=alone and estimator is not None)
        if isinstance(self.settings.task_chunk, int):
            return min(self.settings.task_chunk, len(tasks))
        return min(fast, self._at_most)

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

    def _peak_bytes(self, tasks: TaskBatch, chunk: int | None = None) -> int:
        """Of the stage of training that needs the most."""
        theta, peaks = self.learner.theta(), []
        for _ in self.stages.each():
            at_once = chunk or self.chunk(tasks, self.estimator)
            call = partial(self._estimate, theta, tasks, at_once, diagnose=False)
            peaks.append(peak_bytes(call, self.learner.device))
        return max(peaks)

    def _estimate(self, theta: Tensor, tasks: TaskBatch, chunk: int, diagnose: bool) -> MeanEstimate:
        return estimate(self.estimator, self.learner, theta, tasks, chunk, diagnose, self.settings.task_clip)

    def _meta_gradient(self, step: int, fraction: float, theta: Tensor, logged: bool) -> tuple[Tensor, Work, int]:
        """Of a meta-step's tasks, means: the gradient, as ``outer``; if ``logged``, behind it the query loss, the
        residual and ν; behind that what the linear solves met, where the estimator does some, in the order of
        ``LINEAR``. Then what it took, and of how many tasks the meta-gradient was clipped.

        In the first process of several; each computes its share.
        """
        s = self.settings
        self.stages.enter(fraction)
        tasks = self.placed(self._ahead.take(step))
        self.at_once = self.chunk(tasks, self.estimator)
        with self._ahead.meanwhile(step + 1) if s.prefetch else nullcontext():
            result = self._estimate(theta, tasks, self.at_once, logged)
        values = torch.cat([result.gradient, *(each.flatten() for each in result.variables.values())])
        if result.query_loss is not None and result.residual is not None:
            nu = values.new_tensor([result.nu or 0.0])
            values = torch.cat([values, result.query_loss.mean()[None], result.residual.mean()[None], nu])
        if result.linear is not None:
            met = result.linear.steps, result.linear.relative_residual, result.linear.negative_curvature
            values = torch.cat([values, torch.stack([each.to(values).mean() for each in met])])
        clipped = 0 if result.clipped is None else int(result.clipped.sum())
        *took, clipped = distributed.total((*astuple(result.work), clipped))
        return distributed.mean(values, len(tasks), s.meta_batch), Work(*took), clipped

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
        outer = self.outer.vector()
        for step, fraction, logged in distributed.turns(outer):
            self._meta_gradient(step, fraction, self.outer.take(outer), logged)

    def train(self, stopping: Callable[[], object] = lambda: False) -> Iterator[Event]:
        """Meta-steps until they have ``ended``, or until ``stopping()``, yielding what there is to log after each (if
        anything).

        Raises Diverged, before the step is taken, if the meta-gradient is not finite.
        """
        s = self.settings
        while not self.ended and not stopping():
            started = time.perf_counter()
            logged = (self.step + 1) % s.log_every == 0 or self.step == 0 or self._ends_at_next()
            outer = self.outer.vector()
            self._in_turn = True
            distributed.announce(self.step, self.fraction, logged, outer)
            values, took, clipped = self._meta_gradient(self.step, self.fraction, self.learner.theta(), logged)
            self._in_turn = False
            gradient, diagnosis, met = values.tensor_split([len(outer), len(outer) + 3 * logged])
            norm = float(gradient.norm())
            if not math.isfinite(norm):
                raise Diverged(
                    f"the meta-gradient at step {self.step + 1} is not finite: try a smaller solver.lr or "
                    "optimizer.lr, or a larger estimator.lam"
                )
            if s.clip is not None and norm > s.clip:
                gradient = gradient * (s.clip / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._learning_rate_factor()
            self.outer.set_gradients(gradient)
            self.optimizer.step()
            self.step += 1
            self.work += took
            work = self._record(worked(self.work))
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
                    **work,
                    **linear,
                    **({"estimator/nu": nu} if self.estimator.nu == "auto" else {}),
                }
                if s.task_clip is not None:
                    event["meta_gradient/clipped"] = clipped / s.meta_batch
            yield self._record(event)

    def _say_once_of_negative_curvature(self, tasks: float) -> None:
        before, self.negative_curvature_tasks = self.negative_curvature_tasks, self.negative_curvature_tasks + tasks
        if before <= A_FEW < self.negative_curvature_tasks:
            log.warning(
                "negative curvature met by linear solves of %.0f tasks in %d meta-steps (linear/negative_curvature): "
                "estimator.linear=cg cuts their meta-gradients short, minres goes on; a larger estimator.lam avoids it",
                self.negative_curvature_tasks,
                self.step,
            )

    def _record(self, event: Event) -> Event:
        self.latest.update(event)
        return event

    def due(self, ended: bool = False) -> list[Measurement]:
        """What is to be measured after the present step, at step 0 before the first; or when all have been taken."""
        last = self.step if self.ended else self.settings.steps or sys.maxsize
        return [each for each in self.measurements if each.due(self.step, last, ended)]

    def measure(self, ended: bool = False) -> Event:
        event = Event()
        for measurement in self.due(ended):
            self.stages.enter(self.fraction)
            event |= self._record(measurement(self))
        return event

    def peak_bytes(self) -> int:
        """Peak storage of one meta-gradient on a training meta-batch, or on one process's share of it."""
        s = self.settings
        return self._peak_bytes(self.placed(distributed.share(self.tasks("train", s.meta_batch, s.seed))))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {
            "step": self.step,
            **self.outer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "latest": dict(self.latest),
            "engine": self.learner.used,
            "measured": dict(self.learner.measured),
            "train_seconds": self.train_seconds,
            "work": astuple(self.work),
            "negative_curvature_tasks": self.negative_curvature_tasks,
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            **({"stream": self.source.state_dict()} if isinstance(self.source, Stream) else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.source, Stream):
            self.source.load_state_dict(state["stream"])
        self.learner.measured = dict(state.get("measured", {}))
        self.outer.load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.latest = state["step"], {**self.latest, **state["latest"]}
        self.negative_curvature_tasks = state["negative_curvature_tasks"]
        times = state["step_seconds"].tolist()
        self.step_seconds.clear()
        self.step_seconds.extend(times)
        self.train_seconds, self.work = state["train_seconds"], Work(*state["work"])
