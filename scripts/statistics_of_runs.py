"""Intervals and slopes for the tables and figures."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

CHANCE = 20.0
"""Per cent, of five classes: at which a run counts that diverged."""


def interval(values: Sequence[float], shared: float = 0.0) -> tuple[float, float]:
    """The mean and the half width of its 95 % interval by Student's t; 0 for a single value. ``shared``: the variance
    of what all values have in common, their test examples (``of_examples``)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    deviation = math.sqrt(statistics.variance(values) / len(values) + shared)
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * deviation


def of_examples(parts: Sequence[float]) -> float:
    """Variance of a sum of which each test example gave a part, over sets of as many examples."""
    return len(parts) * statistics.variance(parts)


def slope(x: Sequence[float], y: Sequence[float], logarithmic: bool = True) -> tuple[float, float, float]:
    """Slope, half width of its 95 % interval, and intercept of a least-squares line (of log10 of both)."""
    if logarithmic:
        x, y = [math.log10(v) for v in x], [math.log10(v) for v in y]
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr) if len(x) > 2 else math.nan
    return float(fit.slope), half, float(fit.intercept)
