"""Weights & Biases, kept at arm's length: whatever happens to it, the training goes on."""

import inspect
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fobmaml.arguments import one_of, refuse

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""A call into wandb that takes longer is given up: its service has died or hangs."""


MODES = ("offline", "online", "disabled")
KNOWN = {"mode", "project", "entity", "group", "tags"}
"""Arguments of ``wandb.init`` that configs/train.yaml lists; others may be added."""
TEXTS = {"project", "entity", "group", "name", "notes", "id", "job_type"}
"""Those that are text: name=2024 is one, too."""


def check_options(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that ``wandb.init`` does not take, or a value that it would refuse later."""
    if settings["mode"] is not None:
        one_of("wandb.mode", settings["mode"], MODES)
    tags = settings["tags"]
    if tags is not None and not isinstance(tags, list | tuple):
        raise refuse("wandb.tags", tags, "a list: [first,second]")
    added = {key: value for key, value in settings.items() if key not in KNOWN}
    if not added:  # the import can wait
        return
    import wandb

    takes = sorted(inspect.signature(wandb.init).parameters.keys() - {"config", "anonymous"})
    for key, value in added.items():
        if key not in takes:
            raise refuse(f"wandb.{key}", value, f"an argument of wandb.init: {', '.join(takes)}")
        try:
            if key == "settings":
                wandb.Settings(**value)
            elif key in wandb.Settings.model_fields:
                wandb.Settings(**{key: value})
        except (ValueError, TypeError) as error:
            reason = re.search(r"^  (.*?)(?: \[type=.*)?$", str(error), re.MULTILINE)  # pydantic's third line
            raise refuse(f"wandb.{key}", value, f"what wandb does ({reason[1] if reason else error})") from error


def options_of(settings: Mapping[str, Any], group: str | None, name: str, run_id: str | None) -> dict[str, Any]:
    """The arguments of ``wandb.init``: a run's settings, where they say nothing wandb's own variables, and where those
    are silent too, ``group``, ``name`` and this program's defaults. ``run_id``: of the run to continue."""
    said = os.environ.get
    options = {
        key: str(value) if key in TEXTS else list(map(str, value)) if key == "tags" else value
        for key, value in settings.items()
        if value is not None
    }
    disabled = (said("WANDB_DISABLED") or "").lower() in ("1", "true", "yes", "on")  # wandb itself has dropped it
    options.setdefault("mode", "disabled" if disabled else said("WANDB_MODE") or "offline")
    for key, value, variable in (
        ("project", "fobmaml", "PROJECT"),
        ("group", group, "RUN_GROUP"),
        ("name", name[:128], "NAME"),
    ):  # a longer one wandb refuses
        if value is not None and not said(f"WANDB_{variable}"):
            options.setdefault(key, value)
    if run_id is not None:
        options = {"id": run_id} | {k: v for k, v in options.items() if k not in ("fork_from", "resume_from")}
        if not said("WANDB_RESUME"):
            options.setdefault("resume", "allow")
    return options


class WandbRun:
    """One wandb run. The first call that raises or hangs is reported, and nothing more is sent; a run that cannot
    start online is kept offline."""

    def __init__(self, folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]):
        """``options``: as ``wandb.init`` takes them, with a mode (``options_of``)."""
        self._run: Any = None
        for mode in dict.fromkeys((options["mode"], "offline")):
            self._run = self._guarded(f"init ({mode})", partial(_start, folder, config, {**options, "mode": mode}))
            if self._run is not None:
                break

    @property
    def id(self) -> str | None:
        return None if self._run is None else self._run.id

    def write(self, step: int, event: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guarded("log", lambda: self._run.log({k: v for k, v in event.items() if v is not None}, step=step))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Closes the run, so that the next job of a sweep starts one of its own."""

        def close() -> None:
            self._run.summary.update({k: v for k, v in summary.items() if v is not None})
            self._run.finish(exit_code=exit_code)

        if self._run is not None:
            self._guarded("finish", close)
            self._run = None

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        # A log hands over to wandb's service at every step: not worth a thread.
        outcome = _attempt(call) if what == "log" else _attempt_patiently(call)
        if "value" not in outcome:
            reason = str(outcome.get("error") or f"no answer for {PATIENCE_S:.0f} s").strip().split("\n")[0]
            log.warning("wandb %s failed, and training goes on without it: %s", what, reason)
            self._run = None
            _attempt_patiently(_tear_down)
        return outcome.get("value")


def _attempt(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": call()}
    except Exception as error:
        return {"error": error}


def _attempt_patiently(call: Callable[[], Any]) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: outcome.update(_attempt(call)), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return dict(outcome)


def _start(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    import wandb

    said = os.environ
    settings = {
        key: value
        for key, value in (("console", "off"), ("silent", True), ("init_timeout", PATIENCE_S / 2))
        if f"WANDB_{key.upper()}" not in said
    }
    where = {} if "WANDB_DIR" in said else {"dir": str(folder)}
    return wandb.init(
        **{
            "reinit": "finish_previous",
            **where,
            **options,
            "config": dict(config),
            "settings": wandb.Settings(**settings | options.get("settings", {})),
        }
    )


def _tear_down() -> None:
    """Forgets a broken service, so that the next run starts a new one and the exit is quiet."""
    import wandb

    wandb.teardown()
