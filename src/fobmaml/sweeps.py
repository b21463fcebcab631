"""Sweeps that go on where they were: named after their command, with a list of the jobs that failed."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

LIST = "failed.jsonl"

# The files in configs/hydra/launcher have the names of their plugins' own.
warnings.filterwarnings("ignore", message=r"\s*'hydra/(launcher|sweeper)/")


def name_of(arguments: Sequence[str]) -> str:
    """A name for the sweep of a command: the same for the same settings, however they are launched, and however many
    trials a search has."""
    settings = sorted(a for a in arguments if not a.startswith(("-", "hydra/launcher=", "hydra.launcher.",
                                                                "hydra.sweeper.n_")))
    return hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]


class Failures(Callback):
    """Keeps the failed jobs of a sweep in its folder, in ``LIST``: jobs may run in other processes."""

    listed: Path | None = None
    """Of the sweep that this process started."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Failures.listed = Path(config.hydra.sweep.dir) / LIST
        Failures.listed.parent.mkdir(parents=True, exist_ok=True)
        Failures.listed.unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status != JobStatus.FAILED or config.hydra.mode != RunMode.MULTIRUN:
            return
        reason = str(job_return._return_value).split("\n")[0] or type(job_return._return_value).__name__
        line = json.dumps({"job": " ".join(job_return.overrides or ()), "reason": reason})
        with (Path(config.hydra.sweep.dir) / LIST).open("a") as file:
            file.write(line + "\n")  # one write, so that jobs that end together do not mix


class Study(Callback):
    """Lets a search (configs/search) go on: ``n_trials`` are those of the whole study, and a trial that was cut short
    is asked for again with the same parameters, so that its job continues from its checkpoint."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        import optuna  # for searches alone
        from optuna.trial import TrialState

        sweeper = config.hydra.sweeper
        study = optuna.create_study(study_name=sweeper.study_name, storage=sweeper.storage, direction=sweeper.direction,
                                    load_if_exists=True)
        trials = study.get_trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                study.enqueue_trial(trial.params)
                study.tell(trial.number, state=TrialState.PRUNED)
        ended = sum(trial.state in (TrialState.COMPLETE, TrialState.FAIL) for trial in trials)
        with read_write(config.hydra):
            sweeper.n_trials = max(0, sweeper.n_trials - ended)


def failures() -> list[dict[str, str]]:
    """The failed jobs, each with its settings and the reason, of the sweep that this process has run."""
    if Failures.listed is None or not Failures.listed.exists():
        return []
    return [json.loads(line) for line in Failures.listed.read_text().splitlines()]
