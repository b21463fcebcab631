"""What decides on a claim: rules that return one of four verdicts, and that noise never helps.

A number with its 95 % interval decides where the whole interval is on one side of a threshold; a threshold within it
leaves the claim undecided.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from drawing import Row
from scipy import stats
from statistics_of_runs import interval

MARGIN = 2.0
"""Points of accuracy, within which two methods are level."""


class Verdict(StrEnum):
    """On a claim."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    DOES_NOT = "does not hold"
    NOT_DECIDED = "not decided"


class Tables(Protocol):
    """Where claims read: the rows of a table, and what the jobs behind it had in common."""

    def rows(self, name: str, made_by: str | None = None) -> list[Row]:
        """Of a table. Raises Missing."""
        ...

    def settings(self, name: str) -> dict[str, Any]:
        """Of the jobs. Raises Missing."""
        ...


@dataclass(frozen=True)
class Finding:
    """What was measured, in words, and the verdict on the claim."""

    measured: str
    verdict: Verdict


def below(value: float, limit: float, half: float = 0.0) -> Verdict:
    """Whether ``value`` ± ``half`` is below ``limit``; not decided where ``half`` is not known."""
    if value + half < limit:
        return Verdict.HOLDS
    return Verdict.DOES_NOT if value - half > limit else Verdict.NOT_DECIDED


def above(value: float, limit: float, half: float = 0.0) -> Verdict:
    return below(-value, -limit, half)


def within(value: float, half: float, centre: float, margin: float) -> Verdict:
    """Whether ``value`` ± ``half`` is within ``centre`` ± ``margin``."""
    if abs(value - centre) + half < margin:
        return Verdict.HOLDS
    return Verdict.DOES_NOT if abs(value - centre) - half > margin else Verdict.NOT_DECIDED


def of_all(parts: Sequence[Verdict]) -> Verdict:
    """Of a claim of several parts: what they all are; holds in part where some hold; else not decided."""
    if len({*parts}) == 1:
        return parts[0]
    return Verdict.IN_PART if {Verdict.HOLDS, Verdict.IN_PART} & {*parts} else Verdict.NOT_DECIDED


def level(found: Sequence[float], margin: float, shared: float = 0.0) -> Verdict:
    """Whether paired differences are equivalent to zero: two one-sided t tests at 5 % that their mean is within ±
    ``margin``. Holds in part where only the lower one passes: no worse, and perhaps better. Does not hold where the
    95 % interval is below −``margin``. ``shared``: the variance of what they have in common (``interval``).

    Reference: Schuirmann 1987. Fewer than three differences decide nothing.
    """
    if len(found) < 3:
        return Verdict.NOT_DECIDED
    mean, half = interval(found, shared)
    one_sided = half * float(stats.t.ppf(0.95, len(found) - 1) / stats.t.ppf(0.975, len(found) - 1))
    if mean + half < -margin:
        return Verdict.DOES_NOT
    if mean - one_sided <= -margin:
        return Verdict.NOT_DECIDED
    return Verdict.HOLDS if mean + one_sided < margin else Verdict.IN_PART


def over_runs(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of one number a run: the points of a run are not independent. Infinite
    for a single run."""
    mean, half = interval(values)
    return mean, half if len(values) > 1 else math.inf
