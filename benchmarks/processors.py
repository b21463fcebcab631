"""How busy other processes keep the processors while something is timed (Linux).

The rate of multiply-adds shows a slow processor, but not one that is shared: a short loop has a processor to itself.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/proc")


@dataclass(frozen=True)
class Spent:
    """Seconds of all processors together: by everybody, by this process and its children, and how many there were."""

    by_all: float
    by_us: float
    possible: float


def spent(system: Path = SYSTEM) -> Spent | None:
    """Until now, to a hundredth of a second; None where the system does not tell."""
    try:
        tick, own = os.sysconf("SC_CLK_TCK"), str(os.getpid())
        user, nice, kernel, _, _, interrupts, soft, *_ = map(int, (system / "stat").read_text().split()[1:9])
        ours = [own, *(system / own / "task" / own / "children").read_text().split()]
        by_us = 0
        for process in ours:
            fields = (system / process / "stat").read_text().rpartition(")")[2].split()
            by_us += int(fields[11]) + int(fields[12])
    except (OSError, ValueError, AttributeError):
        return None
    possible = time.perf_counter() * (os.cpu_count() or 1)
    return Spent((user + nice + kernel + interrupts + soft) / tick, by_us / tick, possible)


def others_share(before: Spent | None, after: Spent | None) -> float | None:
    """Of the processors' time between the two, the part that other processes took; 0 to 1."""
    if before is None or after is None or after.possible <= before.possible:
        return None
    others = (after.by_all - before.by_all) - (after.by_us - before.by_us)
    return min(max(others / (after.possible - before.possible), 0.0), 1.0)
