"""N-way k-shot tasks from any number of classes of one-dimensional shapes, so that test classes are new."""

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fobmaml.arguments import refuse, whole_number
from fobmaml.tasks.cache import Arrays, cached
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.mnist1d import made_by_the_package
from fobmaml.tasks.splits import Division

POINTS = 12
"""Of a template, as MNIST-1D's have."""
APART = 1.3
"""Least distance of two templates of mean 0 and variance 1, whose norm is √12: that of the two closest digits."""
TRIES = 20_000


def templates(classes: int, seed: int) -> NDArray[np.float64]:
    """[classes, 12]: smooth random curves that end where they began, scaled as MNIST-1D's templates are, no two of them
    closer than ``APART``. Raises ValueError for more classes than are found so.

    White noise, smoothed by a Gaussian of standard deviation 1, has most nearly the spectrum of the ten digits.
    """
    random, kept, places = np.random.default_rng(seed), np.empty((0, POINTS)), np.arange(POINTS)
    smoothing = np.exp(-0.5 * (places[:, None] - places) ** 2)
    for _ in range(TRIES):
        curve = smoothing @ random.standard_normal(POINTS)
        curve -= np.linspace(curve[0], curve[-1], POINTS)
        shape = (curve - curve.mean()) / curve.std()
        if (np.linalg.norm(kept - shape, axis=1) >= APART).all():
            kept = np.concatenate([kept, shape[None]])
        if len(kept) == classes:
            return (kept - kept[:, :1]) / 6.0
    raise refuse("classes", classes, f"at most {len(kept)}, as many as differ enough")


def generate_shapes(classes: int, examples: int, seed: int) -> Arrays:
    """x [classes · examples, 40] and y, by the ``mnist1d`` package's own pipeline: padded, scaled, moved, sheared, with
    noise. Raises ModuleNotFoundError without the package."""
    made = made_by_the_package(classes * examples, seed, templates(classes, seed))
    return {name: np.concatenate([made[name], made[f"{name}_test"]]) for name in ("x", "y")}


class Shapes1D(FewShot):
    """Sequences of 40 values that show one of ``classes`` shapes, in the style of MNIST-1D (Greydanus & Kobak 2024):
    random templates in place of the ten digits, and the same pipeline.

    ``split``: by class; None: 64, 16 and 20 %. Test classes are new. ``examples`` of each class;
    ``seed``: of templates and examples. Made once, in seconds, and kept in the folder ``cache`` (``tasks.cache``).
    Raises ValueError as ``FewShot`` does.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        classes: int = 100,
        examples: int = 100,
        split: Division | None = None,
        seed: int = 0,
        loss: str = "cross_entropy",
        cache: Path | None = None,
    ):
        whole_number("classes", classes)
        whole_number("examples", examples)
        whole_number("seed", seed, at_least=0, at_most=2**32 - 1)
        make = partial(generate_shapes, classes, examples, seed)
        arrays = cached(f"shapes1d-{classes}-{examples}-{seed}.npz", make, cache)
        super().__init__(arrays["x"], arrays["y"], ways, shots, queries, "class", split, loss=loss)
