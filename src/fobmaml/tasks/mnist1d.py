"""N-way k-shot tasks from MNIST-1D (Greydanus & Kobak 2024, arXiv:2011.14439)."""

import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fobmaml.arguments import one_of, whole_number
from fobmaml.tasks.cache import Arrays, cached
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.splits import Division

VALIDATION_EXAMPLES_PER_CLASS = 80
DIGITS = 10


def made_by_the_package(examples: int, seed: int, templates: NDArray[np.float64] | None = None) -> Arrays:
    """What the ``mnist1d`` package's pipeline makes, as published but for the number of ``examples`` and the ``seed``:
    x [4/5, 40], y [4/5], x_test [1/5, 40], y_test [1/5].

    ``templates`` [classes, points]: in place of the ten digits. The package seeds the global generators; they are put
    back as they were. Raises ModuleNotFoundError without it.
    """
    try:
        from mnist1d.data import get_dataset_args, get_templates, make_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "MNIST-1D is made by the package mnist1d, which is not installed: pip install 'fobmaml[run]'",
            name=error.name,
        ) from None

    settings, shapes = get_dataset_args(), get_templates()
    settings.num_samples, settings.seed = examples, seed
    if templates is not None:
        shapes |= {"x": templates, "y": np.arange(len(templates))}
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(settings, shapes)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    return {name: np.asarray(made[name]) for name in ("x", "y", "x_test", "y_test")}


def generate_arrays() -> Arrays:
    """The published arrays: x [4000, 40], y [4000], x_test [1000, 40], y_test [1000]."""
    return made_by_the_package(5000, 42)


def load_arrays(cache: Path | None = None) -> Arrays:
    """The arrays of ``generate_arrays``, from a file in the folder ``cache`` once they are made (``tasks.cache``)."""
    return cached("mnist1d.npz", generate_arrays, cache)


def held_out_digits(rotation: int) -> Division:
    """Six digits to train, two to validate, two to test; each of the three rotations 0, 1, 2 tests others."""
    digits = np.roll(np.arange(DIGITS), -4 * whole_number("rotation", rotation, at_least=0, at_most=2)).tolist()
    return {"train": digits[:6], "validation": digits[6:8], "test": digits[8:]}


class MNIST1D(FewShot):
    """Few-shot classification of MNIST-1D's ten digits.

    ``split_by``: ``example``: every split has all ten digits, so that the digits of test tasks were seen in training.
    Meta-test tasks come from the 1000 published test examples, meta-validation tasks from 80 training examples a digit
    (the last ones), meta-train tasks from the rest. ``class``: six digits to train, two each to validate and test (so
    ``ways=2``), with all of their examples; ``rotation``, 0, 1 or 2, says which.

    ``loss``: ``cross_entropy``, or ``mse``: the mean squared distance of the outputs to one-hot targets.
    ``cache``: the folder that keeps the arrays once they are made, in seconds (``tasks.cache``).
    Raises ValueError if a split has too few classes or examples.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        loss: str = "cross_entropy",
        cache: Path | None = None,
        split_by: str = "example",
        rotation: int = 0,
    ):
        whole_number("ways", ways, at_least=2, at_most=DIGITS)
        one_of("split_by", split_by, ("class", "example"))
        by_class = held_out_digits(rotation)
        arrays = load_arrays(cache)
        x, y = (np.concatenate([arrays[name], arrays[f"{name}_test"]]) for name in ("x", "y"))
        split = by_class if split_by == "class" else _published(y, len(arrays["y"]))
        super().__init__(x, y, ways, shots, queries, split_by, split, loss=loss)


def _published(y: NDArray[np.int64], training: int) -> Division:
    """Numbers of the examples of each split, of which the first ``training`` are published for training."""
    held_out = [np.flatnonzero(y[:training] == digit)[-VALIDATION_EXAMPLES_PER_CLASS:] for digit in range(DIGITS)]
    validation = np.concatenate(held_out)
    return {
        "train": np.delete(np.arange(training), validation).tolist(),
        "validation": validation.tolist(),
        "test": list(range(training, len(y))),
    }
