"""Checks of arguments, so that every bad value gets the same kind of line: name, what it got, what it takes."""

import math
from numbers import Integral, Real


def refuse(name: str, value: object, takes: str) -> ValueError:
    """The error for a bad argument. The text starts with the name, so that a caller can prefix a group."""
    return ValueError(f"{name}={value!s}: takes {takes}")


def whole_number(name: str, value: object, at_least: int = 1, at_most: int | None = None) -> int:
    fits = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= at_least
    if not fits or (at_most is not None and int(value) > at_most):  # type: ignore[call-overload]
        upper = "" if at_most is None else f" and at most {at_most}"
        raise refuse(name, value, f"a whole number of at least {at_least}{upper}")
    return int(value)  # type: ignore[call-overload]


def number(name: str, value: object, above: float | None = None, at_least: float | None = None,
           below: float | None = None) -> float:
    takes = ["a finite number"]
    takes += [f"above {above:g}"] if above is not None else []
    takes += [f"of at least {at_least:g}"] if at_least is not None else []
    takes += [f"below {below:g}"] if below is not None else []
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refuse(name, value, " ".join(takes))
    x = float(value)
    if (not math.isfinite(x) or (above is not None and x <= above)
            or (at_least is not None and x < at_least) or (below is not None and x >= below)):
        raise refuse(name, value, " ".join(takes))
    return x


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise refuse(name, value, f"one of {', '.join(choices)}")
    return str(value)
