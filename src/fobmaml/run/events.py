"""The event log of a run, ``metrics.jsonl``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fobmaml.files import failures_named, plain, write_text
from fobmaml.saved.checkpoints import CheckpointError


class EventLog:
    """``metrics.jsonl``: one JSON object a line, each with ``step``; written line by line."""

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]] = ()):
        """``kept``: the events that it begins with, of ``events_until``."""
        text = "".join(json.dumps(event) + "\n" for event in kept)
        write_text(path, text)
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, step: int, event: Mapping[str, Any]) -> None:
        line = json.dumps({"step": step, **{k: plain(v) for k, v in event.items()}}, allow_nan=False) + "\n"
        with failures_named(self._path):
            self._file.write(line.encode())

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    events = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return events


def events_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The events that a run continued at ``step`` keeps. Raises CheckpointError if what it drops is not a line cut
    short at the end, or there are events of another kind."""
    try:
        events = read_events(path)
        lines = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
        if lines - len(events) > 1:
            raise ValueError(f"line {len(events) + 1} is none")
        return [event for event in events if event["step"] <= step and "test/loss" not in event]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: takes an event of this program's a line ({error})") from None
