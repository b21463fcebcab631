"""N-way k-shot tasks from MNIST-1D (Greydanus & Kobak 2024, arXiv:2011.14439)."""

import hashlib
import os
import random
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fobmaml.arguments import one_of, refuse, whole_number
from fobmaml.engine.losses import LossFn
from fobmaml.files import CannotWrite, write_atomically
from fobmaml.tasks.batch import Split, TaskBatch

VALIDATION_EXAMPLES_PER_CLASS = 80
Arrays = dict[str, NDArray[np.float64]]


def mean_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(outputs − one-hot targets)², the mean over examples and classes: [N, C], [N] -> scalar."""
    one_hot = targets.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=targets.device)
    return (outputs - one_hot.to(outputs.dtype)).square().mean()


LOSSES: dict[str, LossFn] = {"cross_entropy": F.cross_entropy, "mse": mean_squared_error}


def generate_arrays() -> Arrays:
    """The published arrays from the ``mnist1d`` package: x [4000, 40], y [4000], x_test [1000, 40], y_test [1000].

    The package seeds the global generators; they are put back as they were. Raises ModuleNotFoundError without it.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "MNIST-1D is made by the package mnist1d, which is not installed: pip install 'fobmaml[run]'",
            name=error.name,
        ) from None

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    return {name: np.asarray(made[name]) for name in ("x", "y", "x_test", "y_test")}


def load_arrays(cache: Path | None = None) -> Arrays:
    """The arrays of ``generate_arrays`` from a cache file, which is made, or made again if it is damaged.

    ``cache``: the folder, by default ``$XDG_CACHE_HOME/fobmaml``. No pickle is read or written, a digest guards the
    content, and the file appears whole or not at all; without a folder that can be written to it costs a second a run.
    """
    try:
        path = (cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fobmaml") / "mnist1d.npz"
    except RuntimeError:  # a user without a home
        return generate_arrays()
    arrays = _stored(path)
    if arrays is None:
        arrays = generate_arrays()
        with suppress(OSError, CannotWrite):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(_store, arrays))
    return arrays


def _stored(path: Path) -> Arrays | None:
    try:
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("x", "y", "x_test", "y_test")}
            return arrays if str(stored["digest"]) == _digest(arrays) else None
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


class MNIST1D:
    """Few-shot classification of MNIST-1D's ten digits.

    Each task takes ``ways`` digits in random label order, and of each digit ``shots`` support and ``queries`` query
    examples, all distinct. Meta-test tasks come from the 1000 published test examples, meta-validation tasks from 80
    training examples a digit (the last ones), meta-train tasks from the rest.

    ``loss``: ``cross_entropy``, or ``mse``: the mean squared distance of the outputs to one-hot targets.
    Raises ValueError if a split has too few classes or examples.
    """

    input_shape = (40,)
    classification = True

    def __init__(
        self, ways: int = 5, shots: int = 5, queries: int = 15, loss: str = "cross_entropy", cache: Path | None = None
    ):
        self.ways = self.outputs = whole_number("ways", ways, at_least=2, at_most=10)
        self.shots = whole_number("shots", shots)
        self.queries = whole_number("queries", queries)
        self.loss_fn: LossFn = LOSSES[one_of("loss", loss, tuple(LOSSES))]
        arrays = load_arrays(cache)
        held_out = VALIDATION_EXAMPLES_PER_CLASS
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
        train = [x[y == digit] for digit in range(10)]
        x, y = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
        self.examples = {
            "train": [digit[:-held_out] for digit in train],
            "validation": [digit[-held_out:] for digit in train],
            "test": [x[y == digit] for digit in range(10)],
        }
        fewest = min(len(digit) for split in self.examples.values() for digit in split)
        if shots + queries > fewest:
            name, value = ("shots", shots) if shots >= fewest else ("queries", queries)
            raise refuse(
                name,
                value,
                f"at most {fewest} with shots and queries together, the examples that the "
                f"smallest split has of a digit (shots={shots}, queries={queries})",
            )
        # One table a split, short digits padded, so that sampling is a handful of gathers.
        self._counts = {s: torch.tensor([len(d) for d in digits]) for s, digits in self.examples.items()}
        self._tables = {
            s: torch.nn.utils.rnn.pad_sequence(digits, batch_first=True) for s, digits in self.examples.items()
        }

    def sample(self, split: Split, count: int, generator: torch.Generator) -> TaskBatch:
        table, counts = self._tables[split], self._counts[split]
        take = self.shots + self.queries
        digits = torch.rand(count, 10, generator=generator).argsort(dim=1)[:, : self.ways]  # [T, ways]
        keys = torch.rand(count, self.ways, table.shape[1], generator=generator)
        keys[torch.arange(table.shape[1]) >= counts[digits].unsqueeze(-1)] = -1.0  # never take padding
        chosen = keys.topk(take, dim=-1).indices  # [T, ways, take], distinct
        x = table[digits.unsqueeze(-1), chosen]  # [T, ways, take, 40]
        labels = torch.arange(self.ways).view(1, self.ways, 1).expand(count, -1, take)
        x_s, x_q = x[:, :, : self.shots].flatten(1, 2), x[:, :, self.shots :].flatten(1, 2)
        y_s, y_q = labels[:, :, : self.shots].flatten(1, 2), labels[:, :, self.shots :].flatten(1, 2)
        return TaskBatch(x_s, y_s, x_q, y_q)
