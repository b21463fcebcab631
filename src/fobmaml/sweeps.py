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
from omegaconf import DictConfig

LIST = "failed.jsonl"

# The files in configs/hydra/launcher have the names of their plugins' own.
warnings.filterwarnings("ignore", message=r"\s*'hydra/(launcher|sweeper)/")


def name_of(arguments: Sequence[str]) -> str:
    """A name for the sweep of a command: the same for the same settings, however they are launched."""
    settings = sorted(a for a in arguments if not a.startswith(("-", "hydra/launcher=", "hydra.launcher.")))
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


def failures() -> list[dict[str, str]]:
    """The failed jobs, each with its settings and the reason, of the sweep that this process has run."""
    if Failures.listed is None or not Failures.listed.exists():
        return []
    return [json.loads(line) for line in Failures.listed.read_text().splitlines()]
