"""How fast a processor can compute, measured while others are timed: what a time is compared with."""

import ctypes
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from fobmaml.engine.library import instructions

FOLDER = Path(__file__).parent
SECONDS = 0.005
"""Of one measurement, and half as long before it."""
MATRIX = 1024
REMEMBERED = 500
WIDER = {"avx2": ("avx2",), "avx512": ("avx2", "avx512")}
"""What a processor has by the set of instructions that torch uses."""
PRODUCT = "matrix product"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compiled(folder: Path = FOLDER) -> dict[str, Callable[[int, int], float]]:
    """The loops of multiply-adds that are there and that the processor can run, by instruction set: rate.c's
    ``multiply_add_rate(threads, times)``, in operations a second."""
    loops: dict[str, Callable[[int, int], float]] = {}
    for name in WIDER.get(instructions(), ()):
        for path in folder.glob(f"rate_{name}.*"):
            try:
                loop = ctypes.CDLL(str(path)).multiply_add_rate
            except (OSError, AttributeError):  # another system's
                continue
            loop.argtypes, loop.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_double
            loops[name] = loop
    return loops


class Limit:
    """The machine's rate of arithmetic in float32, in operations a second (two a multiply-add), by ``threads`` threads.

    ``name``: the instruction set whose fused multiply-adds are fastest, by a compiled loop of them (rate.c); or, where
    none is compiled, "matrix product", a large one by torch. ``rates``: of every instruction set when this was made.
    Torch's product may be far from the limit: it does not use all instructions of every processor.
    """

    def __init__(self, threads: int, folder: Path = FOLDER):
        self.threads = threads
        self.seen: deque[float] = deque(maxlen=REMEMBERED)
        self.matrix, self.product = torch.randn(MATRIX, MATRIX), torch.empty(MATRIX, MATRIX)
        self.loops = compiled(folder)
        self.times = {name: self._times(loop) for name, loop in self.loops.items()}
        self.rates = {name: statistics.median(self._multiply_adds(name) for _ in range(9)) for name in self.loops}
        self.name = max(self.rates, key=lambda name: self.rates[name], default=PRODUCT)
        for _ in range(9):
            self.rate()

    def rate(self) -> float:
        """Now."""
        found = self._multiply_adds(self.name) if self.loops else self.matrix_product()
        self.seen.append(found)
        return found

    def usual(self) -> float:
        """The median of the last REMEMBERED measurements of ``rate``."""
        return statistics.median(self.seen)

    def matrix_product(self) -> float:
        """The rate of torch's product of two square matrices, now."""
        return 2 * MATRIX**3 / seconds(lambda: torch.mm(self.matrix, self.matrix, out=self.product))

    def _multiply_adds(self, name: str) -> float:
        return self.loops[name](self.threads, self.times[name])

    def _times(self, loop: Callable[[int, int], float]) -> int:
        """How often the loop goes round in SECONDS."""
        some = 10**5
        least = min(seconds(lambda: loop(self.threads, some)) for _ in range(5)) / 1.5
        return max(1, round(some * SECONDS / least))
