"""Signals that ask a run to stop."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fobmaml import distributed
from fobmaml.run.errors import Interrupted

log = logging.getLogger("train")


@dataclass
class StopRequest:
    """The name of the signal that asked for a stop, if one has."""

    requested: str | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask for a stop after the present step; a second one stops at once."""
    request = StopRequest()
    alone = distributed.size() == 1  # else torchrun repeats a terminal's signal, and kills who takes too long

    def ask(number: int, _: object) -> None:
        if request.requested and alone:
            raise Interrupted("stopped at once")
        if not request.requested:
            request.requested = signal.Signals(number).name
            log.warning("%s: stopping after this step%s", request.requested, " (once more: at once)" * alone)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        if alone:  # else to the end, so that torchrun's signal does not cut short what is said of a lost process
            for number, handler in before.items():
                signal.signal(number, handler)
