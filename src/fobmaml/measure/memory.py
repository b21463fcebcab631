"""How much tensor storage a computation needs at its peak."""

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.autograd.profiler import profile

from fobmaml.measure.base import Event, Measurement, Training, shown


def peak_bytes(computation: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensor storage on ``device`` alive at once during ``computation``, above what was alive before
    it.

    On CUDA from the caching allocator's counters; on the CPU from every allocation and release that the allocator
    reports to the profiler, temporaries inside an operator included. Not counted: workspaces that a kernel library
    allocates by itself. Costs one run of ``computation``, on the CPU a few per cent slower than usual.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = computation()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    with profile(use_kineto=True, profile_memory=True) as profiler:
        result = computation()
        del result
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


class MemoryMeasurement(Measurement):
    """``peak_bytes`` of one meta-gradient, once, when training has ended."""

    keys: ClassVar = {
        "memory/peak_bytes": "bytes of tensor storage alive at once in one meta-gradient, above those before it",
    }
    results = ("memory/peak_bytes",)

    def due(self, step: int, steps: int, ended: bool) -> bool:
        return ended

    def __call__(self, training: Training) -> Event:
        return {"memory/peak_bytes": training.peak_bytes()}

    def rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [("memory of a meta-gradient", shown(summary, "memory/peak_bytes", ".1f", 1e-6) + " MB")]

    def __str__(self) -> str:
        return "memory"
