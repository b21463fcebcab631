"""How labelled examples are divided into training, validation and test: by class or by example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fobmaml.arguments import one_of, refuse
from fobmaml.tasks.batch import Split

Division = Mapping[Split, Sequence[Any]] | Sequence[float]
Numbers = NDArray[np.int64]
SPLITS: tuple[Split, ...] = get_args(Split)
TAKES = "three fractions or three counts, of train, validation and test, or a mapping of these names to lists"


@dataclass(frozen=True)
class Pool:
    """The examples of a split, class by class: those of its class c are ``order[starts[c] : starts[c] + counts[c]]``.

    ``classes`` [C]: their numbers among all classes.
    """

    classes: Numbers
    order: Numbers
    starts: Numbers
    counts: Numbers

    def examples(self) -> list[Numbers]:
        """The numbers of each class's examples."""
        return np.split(self.order, self.starts[1:])


def pools(labels: Sequence[Any], numbers: Numbers, split_by: str, split: Division) -> dict[Split, Pool | None]:
    """What each split has of examples whose classes are ``labels[numbers[i]]``; None: nothing.

    ``split_by``: ``class``, so that no class is in two splits, or ``example``. ``split``: fractions or counts of the
    classes in their order, or of the examples of each class in theirs; what they leave belongs to none. Or a mapping:
    of classes by their labels, of examples by their numbers. Raises ValueError for a split that is none of these, takes
    more than there is, or something twice.
    """
    one_of("split_by", split_by, ("class", "example"))
    if isinstance(split, Mapping):
        if unknown := [name for name in split if name not in SPLITS]:
            raise refuse("split", f"{{{unknown[0]}: ...}}", TAKES)
        units = {label: i for i, label in enumerate(labels)} if split_by == "class" else range(len(numbers))
        of_unit = _listed(split, units, split_by)
    elif split_by == "class":
        of_unit = _shared_out(np.arange(len(labels)), np.full(len(labels), len(labels)), split, "classes")
    else:
        counts = np.bincount(numbers, minlength=len(labels))
        order = np.argsort(numbers, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        of_unit = _shared_out(place, counts[numbers], split, "examples of a class")
    of_example = of_unit[numbers] if split_by == "class" else of_unit
    return {name: _pool(numbers, np.flatnonzero(of_example == i)) for i, name in enumerate(SPLITS)}


def _listed(split: Mapping[Split, Sequence[Any]], units: Any, split_by: str) -> Numbers:
    """Of each unit, a class by its label or an example, the number of its split; −1: none."""
    what = "class" if split_by == "class" else "example"
    of_unit: Numbers = np.full(len(units), -1, dtype=np.int64)
    for i, name in enumerate(SPLITS):
        for unit in split.get(name, ()):
            unit = unit.item() if isinstance(unit, np.generic | Tensor) else unit
            if unit not in units:
                raise refuse("split", f"{{{name}: [{unit}]}}", f"what there is, and there is no such {what}")
            number: int = units[unit]
            if of_unit[number] >= 0:
                raise refuse("split", f"{{{name}: [{unit}]}}", f"each {what} once")
            of_unit[number] = i
    return of_unit


def _shared_out(place: Numbers, total: Numbers, split: Sequence[float], what: str) -> Numbers:
    """The number of the split of what has its ``place`` among ``total``; −1: none."""
    numbers = isinstance(split, Sequence) and not isinstance(split, str) and len(split) == 3
    if not numbers or not all(isinstance(n, Real) and not isinstance(n, bool) and n >= 0 for n in split):
        raise refuse("split", split, TAKES)
    ends = list(accumulate(split))
    if all(isinstance(n, Integral) for n in split):
        if ends[-1] > total.min():
            raise refuse("split", list(split), f"at most {total.min()} in all, the {what}")
        limits = [np.full_like(total, int(end)) for end in ends]
    else:
        if ends[-1] > 1.0 + 1e-9:
            raise refuse("split", list(split), "fractions whose sum is at most 1")
        limits = [np.rint(end * total).astype(np.int64) for end in ends]
    beyond = sum((place >= limit).astype(np.int64) for limit in limits)
    return np.where(beyond == 3, -1, beyond)


def _pool(numbers: Numbers, examples: Numbers) -> Pool | None:
    """Of the given examples, in their order."""
    if not len(examples):
        return None
    order = examples[np.argsort(numbers[examples], kind="stable")]
    classes, counts = np.unique(numbers[order], return_counts=True)
    return Pool(classes, order, np.cumsum(counts) - counts, counts)
