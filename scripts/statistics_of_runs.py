"""Intervals and slopes for the tables and figures."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95 % interval by Student's t; 0 for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def slope(x: Sequence[float], y: Sequence[float], logarithmic: bool = True) -> tuple[float, float, float]:
    """Slope, half width of its 95 % interval, and intercept of a least-squares line (of log10 of both)."""
    if logarithmic:
        x, y = [math.log10(v) for v in x], [math.log10(v) for v in y]
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr) if len(x) > 2 else math.nan
    return float(fit.slope), half, float(fit.intercept)
