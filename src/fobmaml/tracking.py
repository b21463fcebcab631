"""Weights & Biases, kept at arm's length: whatever happens to it, the training goes on."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""A call into wandb that takes longer is given up: its service has died or hangs."""


class WandbRun:
    """One wandb run. A call that raises or hangs is reported once, and from then on nothing more is sent."""

    def __init__(self, folder: Path, config: Mapping[str, Any], mode: str, **options: Any):
        """``options``: project, entity, group, name, tags, id, as ``wandb.init`` takes them."""
        self._run: Any = None
        self._run = self._guarded("init", lambda: _start(folder, config, mode, options))

    @property
    def id(self) -> str | None:
        return None if self._run is None else self._run.id

    def write(self, step: int, event: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guarded("log", lambda: self._run.log({k: v for k, v in event.items() if v is not None}, step=step))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Closes the run, so that the next job of a sweep starts one of its own."""
        if self._run is None:
            return

        def close() -> None:
            self._run.summary.update({k: v for k, v in summary.items() if v is not None})
            self._run.finish(exit_code=exit_code)

        self._guarded("finish", close)
        self._run = None

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome["value"] = call()
            except BaseException as error:
                outcome["error"] = error

        if what == "log":  # hands over to wandb's service, at every step: not worth a thread
            work()
        else:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(PATIENCE_S)
        if "value" in outcome:
            return outcome["value"]
        reason = str(outcome.get("error") or f"no answer for {PATIENCE_S:.0f} s").strip().split("\n")[0]
        log.warning("wandb: %s failed, and this run goes on without it (%s)", what, reason)
        self._run = None
        return None


def _start(folder: Path, config: Mapping[str, Any], mode: str, options: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(console="off", silent=True, init_timeout=PATIENCE_S / 2)
    resume = "allow" if options.get("id") else None
    return wandb.init(dir=str(folder), config=dict(config), mode=mode, settings=settings, resume=resume,  # type: ignore[arg-type]
                      reinit="finish_previous", **options)
