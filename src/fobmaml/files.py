"""Files that are whole or absent, whatever happens: checkpoints, summaries, event logs, tables."""

import csv
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, cannot be read, or belongs to another configuration."""


class CannotWrite(RuntimeError):
    """The disk is full, or the folder cannot be written."""


class FolderInUse(RuntimeError):
    """Another process works in a run's folder."""


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"{path}: cannot be written ({error.strerror}); what was written before is whole")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """``write(file)`` to a temporary neighbour, flushed to disk, which then takes the place of ``path``.

    Raises CannotWrite, and leaves ``path`` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _failures_named(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Holds a folder until the end, however it comes. Raises FolderInUse if another process does, CannotWrite."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:  # an OSError, too
        raise FolderInUse(f"hydra.run.dir={folder}: takes a folder in which no other process works") from None
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def plain(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({key: plain(value) for key, value in content.items()}, indent=2, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with the keys of the first row as its header; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_checkpoint(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """``config``: what a run must agree in to continue from here (see ``load_checkpoint``)."""
    buffer = io.BytesIO()  # a disk that fills up then fails in write_atomically, with an OSError
    torch.save({"format": FORMAT, "config": json.dumps(config, sort_keys=True), **state}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint. Nothing in the file is executed (``weights_only``).

    Raises CheckpointError, naming what differs, if the file is missing, not a whole checkpoint, or was written under
    another configuration.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: takes a checkpoint file, and there is none")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        found, written = state["format"], json.loads(state["config"])
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, TypeError,
            ValueError, IndexError, AttributeError) as error:
        kind = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path}: takes a whole checkpoint of this program, and this file cannot be read as one "
                              f"({kind})") from None
    if found != FORMAT:
        raise CheckpointError(f"{path}: takes a checkpoint of format {FORMAT}, and this one has format {found}")
    ours = json.loads(json.dumps(config))
    differing = sorted(key for key in ours.keys() | written.keys() if ours.get(key) != written.get(key))
    if differing:
        changes = ", ".join(f"{key}={ours.get(key)} (there {written.get(key)})" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"{path}: takes a checkpoint of the same configuration, and here {changes}{more}")
    return dict(state)


class EventLog:
    """``metrics.jsonl``: one JSON object a line, each with ``step``; written line by line."""

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]] = ()):
        """``kept``: the events that it begins with, of ``events_until``."""
        text = "".join(json.dumps(event) + "\n" for event in kept)
        write_atomically(path, lambda file: file.write(text.encode()))
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, step: int, event: Mapping[str, Any]) -> None:
        line = json.dumps({"step": step, **{k: plain(v) for k, v in event.items()}}, allow_nan=False) + "\n"
        with _failures_named(self._path):
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
