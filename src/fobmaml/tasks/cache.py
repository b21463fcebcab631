"""Arrays that take a while to make, kept in a file from one run to the next."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fobmaml.files import CannotWrite, write_atomically

Arrays = dict[str, NDArray[Any]]


def cached(name: str, make: Callable[[], Arrays], folder: Path | None = None) -> Arrays:
    """What ``make`` returns, from the file ``name`` in ``folder``, which is made, or made again if it is damaged.

    ``folder``: by default ``$XDG_CACHE_HOME/fobmaml``. No pickle is read or written, a digest guards the content, and
    the file appears whole or not at all; without a folder that can be written to, every run makes the arrays again.
    """
    try:
        path = (folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fobmaml") / name
    except RuntimeError:  # a user without a home
        return make()
    arrays = stored(path)
    if arrays is None:
        arrays = make()
        with suppress(OSError, CannotWrite):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(_store, arrays))
    return arrays


def stored(path: Path) -> Arrays | None:
    """The arrays of a file that ``cached`` has written, None if it is not there or damaged."""
    try:
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "digest"}
            return arrays if str(file["digest"]) == _digest(arrays) else None
    except Exception:  # a damaged file ends in an error of any of the parsers in between
        return None


def _store(arrays: Arrays, file: BinaryIO) -> None:
    np.savez(file, allow_pickle=False, digest=np.array(_digest(arrays)), **arrays)


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
