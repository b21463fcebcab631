"""Sweeps that go on where they were: named after their command, with a list of the jobs that failed."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from fobmaml.files import CannotWrite, write_atomically
from fobmaml.run import folders
from fobmaml.run.errors import one_line
from fobmaml.run.settings import quoted
from fobmaml.saved.results import read_run, table

LIST = "failed.jsonl"
JOBS = "jobs.jsonl"
"""The jobs that have ended, and where."""
CONFIG = "multirun.yaml"
"""Hydra's copy of a sweep's settings; it tells whose folder it is."""

# The files in configs/hydra/launcher have the names of their plugins' own.
warnings.filterwarnings("ignore", message=r"\s*'hydra/(launcher|sweeper)/")


def name_of(arguments: Sequence[str]) -> str:
    """A name for the sweep of a command: the same for the same settings, however they are launched, and however many
    trials a search has."""
    given, rest = get_args_parser().parse_known_args(list(arguments))
    settings = sorted(
        a
        for a in given.overrides + rest
        if not a.startswith(("hydra/launcher=", "hydra.launcher.", "hydra.sweeper.n_"))
    )
    settings += [
        f"--{source}={value}"
        for source, value in (
            ("config-name", given.config_name),
            ("config-path", given.config_path),
            ("config-dir", given.config_dir),
        )
        if value is not None
    ]
    return hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]


class Failures(Callback):
    """Keeps the failed jobs of a sweep in its folder, in ``LIST``: jobs may run in other processes, and elsewhere."""

    listed: Path | None = None
    """Of the sweep that this process started."""
    settings_before: bytes | None = None
    """What ``CONFIG`` held before."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with folders.ending_the_program():
            folder = Path(config.hydra.sweep.dir).absolute()
            folders.refuse_foreign(folder, "hydra.sweep.dir", CONFIG, (LIST, JOBS, "optimization_results.yaml"))
        tell_jobs(config, folder)
        Failures.listed = folder / LIST
        with suppress(OSError, CannotWrite):  # Hydra meets it next, and its error is reported
            folders.make(folder)
            Failures.settings_before = (folder / CONFIG).read_bytes() if (folder / CONFIG).exists() else None
            folders.save(folder / CONFIG, config)  # not all of Hydra's sweepers do
            for name in (LIST, JOBS):
                (folder / name).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        sweep, overrides = Path(config.hydra.sweep.dir), list(job_return.overrides or ())
        where = os.path.relpath(config.hydra.runtime.output_dir, sweep)
        add_line(sweep / JOBS, {"number": config.hydra.job.num, "folder": where, "overrides": overrides})
        if job_return.status == JobStatus.FAILED:
            reason = one_line(job_return._return_value) or type(job_return._return_value).__name__
            add_line(sweep / LIST, {"job": " ".join(overrides), "reason": reason})


def add_line(path: Path, content: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")  # one write, so that jobs that end together do not mix


def tell_jobs(config: DictConfig, folder: Path) -> None:
    """Gives a sweep's jobs, which compose their configuration anew, its folder (whatever their working directory is,
    and whatever an experiment's file says), and names for their own that tell all that differs: a setting is left out
    only where its value, or the whole command's digest, names the folder of the sweep."""
    hydra = config.hydra
    given = [*hydra.overrides.task, *(f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items())]
    values = {
        o.key_or_group: None if o.is_sweep_override() else str(o.value())
        for o in OverridesParser.create().parse_overrides(given)
    }
    named = {os.environ.get("FOBMAML_SWEEP")} & set(folder.parts)
    left_out = [
        key
        for key in hydra.job.config.override_dirname.exclude_keys
        if (value := values.get(key, "")) is not None and (named or not value or value in folder.parts)
    ]
    with read_write(hydra):
        hydra.overrides.hydra.extend(
            [
                f"hydra.sweep.dir={quoted(str(folder))}",
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(left_out)}]",
            ]
        )


def undo() -> None:
    """After a command with which no job can be made: its settings do not take the place of those that were there."""
    if Failures.listed is None:
        return
    path, before = Failures.listed.with_name(CONFIG), Failures.settings_before
    with suppress(OSError, CannotWrite):
        if before is not None:
            write_atomically(path, lambda file: file.write(before))
        elif path.exists() and len(list(path.parent.iterdir())) == 1:
            path.unlink()


class Study(Callback):
    """Lets a search (configs/search) go on: ``n_trials`` are those of the whole study, and a trial that was cut short
    is asked for again with the same parameters, so that its job continues from its checkpoint."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        import optuna  # for searches alone
        from optuna.trial import TrialState

        sweeper = config.hydra.sweeper
        if "nu" not in config.estimator:  # of the parameters in configs/search the one that not every estimator has
            with read_write(config.hydra), open_dict(sweeper.params):
                sweeper.params.pop("estimator.nu", None)
        study = optuna.create_study(
            study_name=sweeper.study_name, storage=sweeper.storage, direction=sweeper.direction, load_if_exists=True
        )
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
    return _lines(LIST)


def results() -> str:
    """The jobs of that sweep, with the settings in which they differ and what they came to, as a table; or ''."""
    if Failures.listed is None:
        return ""
    sweep = Failures.listed.parent
    jobs = sorted(_lines(JOBS), key=lambda job: job["number"])
    rows = [
        read_run(sweep / job["folder"], sweep)
        or {"folder": job["folder"], "status": "failed", "overrides": job["overrides"]}
        for job in jobs
    ]
    return table(rows, folders=False) if rows else ""


def _lines(name: str) -> list[dict[str, Any]]:
    """Of a file of the sweep that this process has run."""
    if Failures.listed is None or not (path := Failures.listed.with_name(name)).exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
