"""Checks of arguments, so that every bad value gets the same kind of line: name, what it got, what it takes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any


def refuse(name: str, value: object, takes: str) -> ValueError:
    """The error for a bad argument. The text starts with the name, so that a caller can prefix a group."""
    return ValueError(f"{name}={value!s}: takes {takes}")


def whole_number(name: str, value: Any, at_least: int = 1, at_most: int | None = None) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise refuse(name, value, f"a whole number of at least {at_least}{upper}")
    return int(value)


def number(
    name: str, value: Any, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> float:
    takes = "a finite number"
    takes += f" above {above:g}" if above > -math.inf else ""
    takes += f" of at least {at_least:g}" if at_least > -math.inf else ""
    takes += f" below {below:g}" if below < math.inf else ""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not (above < value < below and at_least <= value):
        raise refuse(name, value, takes)
    return float(value)


@contextmanager
def or_auto() -> Iterator[None]:
    """Around the check of a number in whose place ``auto`` may stand: its error says so."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}, or auto") from None


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise refuse(name, value, f"one of {', '.join(choices)}")
    return str(value)
