"""Weights & Biases, kept at arm's length: whatever happens to it, the training goes on."""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""A call into wandb that takes longer is given up: its service has died or hangs."""


class WandbRun:
    """One wandb run. The first call that raises or hangs is reported, and nothing more is sent; a run that cannot
    start online is kept offline."""

    def __init__(self, folder: Path, config: Mapping[str, Any], mode: str, **options: Any):
        """``options``: project, entity, group, name, tags, id, as ``wandb.init`` takes them."""
        self._run: Any = None
        for attempt in dict.fromkeys((mode, "offline")):
            self._run = self._guarded(f"init ({attempt})", partial(_start, folder, config, attempt, options))
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


def _start(folder: Path, config: Mapping[str, Any], mode: str, options: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(console="off", silent=True, init_timeout=PATIENCE_S / 2)
    return wandb.init(dir=str(folder), config=dict(config), mode=mode, settings=settings,  # type: ignore[arg-type]
                      resume="allow" if options.get("id") else None, reinit="finish_previous", **options)


def _tear_down() -> None:
    """Forgets a broken service, so that the next run starts a new one and the exit is quiet."""
    import wandb

    wandb.teardown()
