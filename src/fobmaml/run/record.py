"""What a run leaves behind: its events, a checkpoint, the wandb run, the summary, a picture."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fobmaml.files import CannotWrite, write_json
from fobmaml.measure import Event
from fobmaml.run.events import EventLog, read_events
from fobmaml.run.plotting import learning_curve
from fobmaml.run.provenance import provenance
from fobmaml.run.report import summary_keys
from fobmaml.run.resume import Start
from fobmaml.run.settings import choices, overrides, plain_config, same_run, sweep_name
from fobmaml.run.tracking import WandbRun, options_of
from fobmaml.saved.checkpoints import save_checkpoint
from fobmaml.training import MetaTraining


class Record:
    """Of one run, in its ``folder``, from ``start`` on. ``summary`` is there once ``kept`` has ended."""

    def __init__(self, cfg: DictConfig, training: MetaTraining, folder: Path, start: Start):
        self._training, self._folder = training, folder
        self._config, self._same_run = plain_config(cfg), same_run(cfg)
        self._told = {"choices": choices(), "overrides": overrides()}
        self._events = EventLog(folder / "metrics.jsonl", start.history)
        own = start.state is not None and start.source is not None and start.source.parent == folder
        self._wandb = WandbRun(
            folder,
            {**self._config, "choices": self._told["choices"]},
            options_of(
                self._config["wandb"],
                sweep_name(),
                "-".join(folder.parts[-2:]),
                start.state["wandb_id"] if start.state and own else None,
            ),
        )
        self.summary: dict[str, Any] = {}

    def event(self, event: Event) -> None:
        if event:
            self._events.write(self._training.step, event)
            self._wandb.write(self._training.step, event)

    def checkpoint(self) -> None:
        save_checkpoint(
            self._folder / "checkpoint.pt",
            {**self._training.state_dict(), "wandb_id": self._wandb.id, **self._told},
            self._same_run,
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """However what is inside ends, the summary says it, and all is closed. An error gets its own ``advice``, where
        it has some, with what that asks for put in."""
        end, started = {"status": "completed"}, time.time()
        try:
            yield
        except BaseException as error:
            end = {"status": getattr(error, "status", "failed"), "reason": str(error) or type(error).__name__}
            if advice := getattr(error, "advice", None):
                where = "" if sweep_name() else f" with hydra.run.dir={self._folder}"
                error.args = (
                    advice.format(
                        error=error,
                        step=self._training.step + 1,
                        again=f"the same command{where}",
                        checkpoint=self._folder / "checkpoint.pt",
                    ),
                )
            raise
        finally:
            self._close(end, time.time() - started)
        if self.summary.get("val/loss") is not None:
            learning_curve(
                read_events(self._folder / "metrics.jsonl"), self.summary, self._folder / "learning_curve.png"
            )

    def _close(self, end: dict[str, str], seconds: float) -> None:
        training, learner = self._training, self._training.learner
        measured = {
            "step": training.step,
            "engine": learner.used,
            "task_chunk": training.at_once,
            **dict.fromkeys(summary_keys(training.measurements)),
            **training.latest,
        }
        self.summary = {
            **end,
            **measured,
            **self._told,
            "seconds": round(seconds, 1),
            "provenance": provenance(learner.device, learner.used),
            "config": self._config,
        }
        self._events.close()
        try:
            with suppress(CannotWrite) if "reason" in end else nullcontext():  # the first error is the one to say
                write_json(self._folder / "summary.json", self.summary)
        finally:
            self._wandb.finish(measured, exit_code=0 if end["status"] == "completed" else 1)
