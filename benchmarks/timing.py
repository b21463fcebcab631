"""Timing by turns: everybody once a round, so that a slow spell of the machine hits all alike, and what was disturbed
again."""

import argparse
import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from processors import others_share, spent
from rate import Limit, seconds

DISTURBED = 0.1
"""A call is measured again if the machine's rate before or after it is off the usual by more. The rate of an idle
machine varies by less, and what is compared differs by more."""
AGAIN = 3
"""Times at most."""

Row = dict[str, Any]
Calls = Sequence[Callable[[], object]]
Key = TypeVar("Key", bound=Hashable)


def existing_folder(path: str) -> Path:
    """What a command line takes for the folder of its tables: it is there before anything is measured."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: takes a folder that exists")
    return Path(path)


@dataclass(frozen=True)
class Clocked:
    """Time of a call, the machine's ``rate`` meanwhile (the mean of before and after), how often the call was
    ``repeated``, and whether it was ``disturbed`` every time."""

    seconds: float
    rate: float
    repeated: int
    disturbed: bool


@dataclass(frozen=True)
class Round:
    """All of somebody's calls, one after another: their time, the ``rate`` of the machine meanwhile and that of a
    matrix product just before, calls that were ``repeated`` and those that were ``disturbed`` every time, and the
    share of the processors' time that other processes took (None where the system does not tell)."""

    seconds: float
    rate: float
    matrix_product: float
    repeated: int
    disturbed: int
    others_share: float | None


def clocked(call: Callable[[], object], rate: Callable[[], float], usual: Callable[[], float]) -> Clocked:
    """A call between two measurements of the machine's ``rate``.

    Again, AGAIN times at most, while one of the two is more than DISTURBED off the ``usual`` one. Of several calls that
    all were disturbed, the one with the rate least off counts, and not the quickest.
    """
    tried: list[tuple[float, Clocked]] = []
    for repeated in range(AGAIN + 1):
        before = rate()
        took = seconds(call)
        after = rate()
        off = max(abs(found / usual() - 1) for found in (before, after))
        tried.append((off, Clocked(took, (before + after) / 2, repeated, off > DISTURBED)))
        if off <= DISTURBED:
            break
    least = min(tried, key=lambda one: one[0])[1]
    return Clocked(least.seconds, least.rate, len(tried) - 1, least.disturbed)


def one_round(calls: Calls, limit: Limit) -> Round:
    gc.collect()  # not in somebody else's time
    product, began = limit.matrix_product(), spent()
    parts = [clocked(call, limit.rate, limit.usual) for call in calls]
    total = sum(part.seconds for part in parts)
    return Round(
        total,
        sum(part.rate * part.seconds for part in parts) / total,
        product,
        sum(part.repeated for part in parts),
        sum(part.disturbed for part in parts),
        others_share(began, spent()),
    )


def take_turns(calls: Mapping[Key, Calls], repeats: int, limit: Limit) -> dict[Key, list[Round]]:
    """So many rounds of everybody's calls, which have been warmed up."""
    measured: dict[Key, list[Round]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, rounds in measured.items():
            rounds.append(one_round(calls[name], limit))
    return measured


def first_round(calls: Mapping[Key, Calls]) -> dict[Key, float]:
    """Seconds of everybody's calls, which are warm then."""
    return {name: sum(map(seconds, theirs)) for name, theirs in calls.items()}


def not_far_behind(found: Mapping[Key, float], factor: float) -> list[Key]:
    """Who takes no more than ``factor`` times the least, the least first; nobody whose time is infinite."""
    within = [name for name, spent in found.items() if spent <= factor * min(found.values()) < float("inf")]
    return sorted(within, key=lambda name: found[name])


def spread(values: Sequence[float]) -> Row:
    low, middle, high = (round(float(q), 5) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"seconds_median": middle, "seconds_q25": low, "seconds_q75": high, "repeats": len(values)}
