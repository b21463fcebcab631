"""ν by measurement: where truncation and noise of a finite difference of solutions are in balance."""

import math
from collections.abc import Callable

from torch import Tensor

FIRST, LEAST = 0.1, 1e-6
"""ν that is tried first, and where trying ends."""
SMALL = 0.1
"""A change of the estimate from ν to ν/2, relative to it, at which the theory of small ν holds."""
HIDDEN = 2
"""Times what noise alone changes from ν to ν/2: a change below that is not seen."""
DROWNED = 32
"""Times the dtype's rounding: a ν so small that of the estimate little is left but noise."""


def balanced_nu(measured: Callable[[list[float]], list[Tensor]], order: int, eps: float, tasks: int) -> float:
    """ν* = (R / pC)^{1/(p+1)}, where C ν^p + R/ν is least: the error of a difference formula of order p.

    ``measured``: the meta-gradients g [T, P] of some tasks at each of some ν. C is measured by halving ν, as
    C = ‖ḡ(ν) − ḡ(ν/2)‖ / ν^p (1 − 2^−p) of the mean ḡ over them, since tasks differ in it a hundredfold and the mean
    has that of the hardest; from ν = 1/10 or, until the difference is small against ḡ, a quarter of that again and
    again, or, until it stands out of the noise, four times that, at most 1. R is measured by a ν at which g drowns in
    noise, as ν ‖g(ν) − g‖: rounding, and of a solver that goes on to a tolerance that part of its error in which
    solutions at different ν differ, far less than the whole. R is the geometric mean of the tasks' own, since a row
    that happens to stop a step early has a noise far above the others'. In a mean over ``tasks`` R averages out and C
    does not: R counts 1/√tasks. ν* is at most 1, where the query loss counts as much as the support loss.
    """
    nu, factor, larger = FIRST, 1 - 2.0**-order, False
    while True:
        at, half, drowned = measured([nu, nu / 2, DROWNED * eps])
        change = float((at - half).mean(0).norm())
        noise = DROWNED * eps * float((drowned - half).norm(dim=1).log().mean().exp())
        hidden = change < HIDDEN * math.sqrt(5 / len(at)) * noise / nu
        if hidden and FIRST <= nu < 1:
            nu, larger = min(4 * nu, 1.0), True
        elif change > SMALL * float(half.mean(0).norm()) and nu > LEAST and not larger:
            nu /= 4
        else:
            break
    truncation = change / factor / nu**order
    noise /= math.sqrt(tasks)
    balanced = (noise / (order * truncation)) ** (1 / (order + 1)) if truncation else 1.0
    return min(max(balanced, eps), 1.0) if math.isfinite(balanced) else nu
