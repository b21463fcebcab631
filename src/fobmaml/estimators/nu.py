"""ν by measurement: where truncation and rounding of a finite difference of solutions are in balance."""

import math
from collections.abc import Callable

from torch import Tensor

FIRST, LEAST = 0.1, 1e-6
"""ν that is tried first, and where trying ends."""
SMALL = 0.1
"""A change of the estimate from ν to ν/2, relative to it, at which the theory of small ν holds."""
DROWNED = 32
"""Times the dtype's rounding: a ν so small that of the estimate little is left but noise."""


def balanced_nu(
    measured: Callable[[list[float]], tuple[list[Tensor], float]], order: int, eps: float, tasks: int
) -> float:
    """ν* = (R / pC)^{1/(p+1)}, where C ν^p + R/ν is least: the error of a difference formula of order p.

    ``measured``: of one task, the meta-gradient g [1, P] at each of some ν, and what is known of R. C is measured by
    halving ν, C = ‖g(ν) − g(ν/2)‖ / ν^p (1 − 2^−p), from ν = 1/10 or, until the difference is small against g, a
    quarter of that again and again; R by a ν at which g drowns in rounding, R = ν ‖g(ν) − g‖. In a mean over ``tasks``
    R averages out and C does not: R counts 1/√tasks. Above 1/10 it is an underestimate, since rounding hides C there.
    At most 1, where the query loss counts as much as the support loss.
    """
    nu, factor = FIRST, 1 - 2.0**-order
    while True:
        (at, half, drowned), known = measured([nu, nu / 2, DROWNED * eps])
        change = float((at - half).norm())
        if change <= SMALL * float(half.norm()) or nu <= LEAST:
            break
        nu /= 4
    rounding = max(DROWNED * eps * float((drowned - half).norm()), known) / math.sqrt(tasks)
    truncation = change / factor / nu**order
    balanced = (rounding / (order * truncation)) ** (1 / (order + 1)) if truncation else 1.0
    return min(max(balanced, eps), 1.0) if math.isfinite(balanced) else nu
