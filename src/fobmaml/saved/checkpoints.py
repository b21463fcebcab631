"""Checkpoints: whole, of the same configuration, and nothing in them is executed."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fobmaml.files import write_atomically

FORMAT = 3


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, cannot be read, or belongs to another configuration."""


def save_checkpoint(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """``config``: what a run must agree in to continue from here (see ``load_checkpoint``)."""
    buffer = io.BytesIO()  # a disk that fills up then fails in write_atomically, with an OSError
    torch.save({"format": FORMAT, "config": json.dumps(config, sort_keys=True), **state}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """``read_checkpoint``. Raises CheckpointError also if it was written under another configuration, naming what
    differs."""
    state = read_checkpoint(path)
    ours, written = json.loads(json.dumps(config)), state["config"]
    differing = sorted(key for key in ours.keys() | written.keys() if ours.get(key) != written.get(key))
    if differing:
        changes = ", ".join(f"{key}={ours.get(key)} (there {written.get(key)})" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"{path}: takes a checkpoint of the same configuration, and here {changes}{more}")
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, and as ``config`` that of its run. Nothing in the file is executed (``weights_only``).

    Raises CheckpointError if the file is missing or not a whole checkpoint.
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
        if not isinstance(written, dict):
            raise TypeError(f"its configuration is a {type(written).__name__}")
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
    ) as error:
        kind = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: takes a whole checkpoint of this program, and this file cannot be read as one ({kind})"
        ) from None
    if found != FORMAT:
        raise CheckpointError(f"{path}: takes a checkpoint of format {FORMAT}, and this one has format {found}")
    return {**state, "config": written}
