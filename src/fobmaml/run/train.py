"""One job: a run in its own folder, from its settings to its last number."""

import logging
import signal
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fobmaml import distributed
from fobmaml.run import folders
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.build import build
from fobmaml.run.console import make_lasting
from fobmaml.run.errors import EXPECTED, ConfigError, Interrupted, one_line
from fobmaml.run.record import Record
from fobmaml.run.report import report
from fobmaml.run.resume import Start, resume
from fobmaml.run.settings import read_numbers
from fobmaml.run.signals import StopRequest, stop_requests
from fobmaml.training import MetaTraining

log = logging.getLogger("train")


def job(cfg: DictConfig) -> float | None:
    """Returns the last validation accuracy, for sweepers."""
    keep_freed_memory()
    make_lasting()  # in a job's process, too
    hydra_config = HydraConfig.get()
    try:
        read_numbers(cfg)
        with distributed.processes():
            if distributed.rank() == 0:
                return run(cfg, Path(hydra_config.runtime.output_dir))
            follow(cfg)
            return None
    except EXPECTED as error:
        if hydra_config.mode == RunMode.MULTIRUN:  # a sweep goes on, and ends with the error
            raise
        raise SystemExit(f"error: {one_line(error)}") from error
    finally:
        folders.remove_empty()


def follow(cfg: DictConfig) -> None:
    """A process that is not the first of its run."""
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)  # the first one stops after its step, and then this one
    try:
        distributed.everywhere(lambda: build(cfg)).follow()
    except (ConfigError, distributed.ProcessLost):
        sys.exit(1)  # the first process says it


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Build, continue if there is a checkpoint, meta-train, measure, report."""
    training = distributed.everywhere(lambda: build(cfg))
    with training.leading():
        resume(cfg, training, folder)  # for its errors: nothing is written before all is known to fit
        with folders.sole_user(folder):
            start = resume(cfg, training, folder)  # again: another process may have gone on until now
            if start.summary:
                log.info("%s is complete: nothing to do", folder)
                summary = start.summary
            else:
                summary = lead(cfg, training, folder, start)
            report(summary, folder, training.measurements)
            return cast(float | None, summary.get("val/accuracy"))


def lead(cfg: DictConfig, training: MetaTraining, folder: Path, start: Start) -> dict[str, object]:
    """From ``start`` to the end, all of it recorded. Returns the summary."""
    folders.write_settings(folder, cfg)
    if start.state:
        log.info("continuing %s at step %d", start.source, training.step)
    record = Record(cfg, training, folder, start)
    with record.kept(), stop_requests() as stop:
        meta_train(training, start, record, stop)
        if last := training.due(ended=True):
            log.info("measuring %s", " and ".join(map(str, reversed(last))))
        record.event(training.measure(ended=True))
    return record.summary


def meta_train(training: MetaTraining, start: Start, record: Record, stop: StopRequest) -> None:
    """The loop: meta-steps, and after each what is due; what is due at the start, if it continues no checkpoint."""
    s, first = training.settings, training.step + 1
    if start.state is None:
        record.event(training.measure())
        record.checkpoint()
    on_terminal = sys.stderr.isatty()
    with (
        logging_redirect_tqdm() if on_terminal else nullcontext(),
        tqdm(
            total=s.steps if s.budget is None else None,
            initial=training.step,
            unit="step",
            disable=not on_terminal,
            dynamic_ncols=True,
            desc="meta-training",
        ) as bar,
    ):
        for event in training.train(lambda: stop.requested):
            measured = training.measure()
            event |= measured
            record.event(event)
            if training.step % s.checkpoint_every == 0 or training.ended:
                record.checkpoint()
            if training.step == first:
                say_what_computes(training)
            if start.state and training.step == first:
                say_if_another_engine(start.state.get("engine", ""), training.learner.used)
            bar.set_postfix(progress(training), refresh=False)
            bar.update()
            if measured and not on_terminal:
                log.info(
                    "step %d%s, %s, %.0f s left",
                    training.step,
                    f"/{s.steps}" if s.budget is None else f", {100 * training.fraction:.0f} % of the budget",
                    ", ".join(f"{key} {value}" for key, value in progress(training).items()),
                    training.step * (1 / training.fraction - 1) * statistics.median(training.step_seconds),
                )
    if stop.requested:
        record.checkpoint()
        raise Interrupted(f"stopped by {stop.requested} at step {training.step}")


def say_what_computes(training: MetaTraining) -> None:
    used, untraced = training.learner.used, training.learner.untraced
    log.info(
        "gradients are computed by engine %s, %s of %d tasks at once%s",
        used,
        training.at_once,
        training.settings.meta_batch,
        f"; none by hand, for the model has {untraced}"
        if untraced and {"autograd", "loop"} & {*used.split("+")}
        else "",
    )


def say_if_another_engine(before: str, now: str) -> None:
    if before and set(now.split("+")) - set(before.split("+")):
        log.warning(
            "gradients are computed by engine %s, and up to this checkpoint by %s: the run may differ from an "
            "uninterrupted one by rounding",
            now,
            before,
        )


def progress(training: MetaTraining) -> dict[str, str]:
    shown = {"loss": "train/loss", "val accuracy": "val/accuracy", "val loss": "val/loss"}
    return {name: f"{training.latest[key]:.3f}" for name, key in shown.items() if training.latest.get(key) is not None}
