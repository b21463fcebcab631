"""Where the time of a symmetric meta-gradient goes, into results/bench_breakdown.csv.

5-way 5-shot 15-query MNIST-1D, 16 tasks, 10 inner steps, task_chunk=auto: with the compiled kernel by what is spent in
it and around it; without, by kind of operator. The profiler itself costs a few microseconds an operator, which are
counted as outside operators; ``total_seconds`` is without it.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from meta_gradient import Setting
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fobmaml.allocator import keep_freed_memory
from fobmaml.files import write_csv, write_json
from fobmaml.models.fused import FusedGradient
from fobmaml.provenance import provenance

KINDS = {"matrix products": ("aten::bmm", "aten::baddbmm"), "activations": ("aten::silu", "aten::silu_backward"),
         "copies and sums": ("aten::copy_", "aten::add_", "aten::add", "aten::fill_")}
STEPS = 10


def shares(width: int, compiled: bool, repeats: int) -> list[dict[str, object]]:
    """Medians over ``repeats`` of each kind's seconds, and of the rate at which its multiply-adds are done."""
    setting = Setting(width, STEPS)
    candidate, measure = setting.ours("symmetric", compiled=compiled), in_kernel if compiled else by_operator
    with FlopCounterMode(display=False) as counter:
        setting.ours("symmetric", compiled=False).gradient(setting.tasks)
    matrix = torch.randn(2048, 2048)
    spent: dict[str, list[float]] = {}
    rates, totals = [], []
    candidate.gradient(setting.tasks)
    for _ in range(repeats):
        started = time.perf_counter()
        _ = matrix @ matrix
        rates.append(2 * 2048**3 / (time.perf_counter() - started))
        started = time.perf_counter()
        candidate.gradient(setting.tasks)
        totals.append(time.perf_counter() - started)
        for kind, seconds in measure(lambda: candidate.gradient(setting.tasks)).items():
            spent.setdefault(kind, []).append(seconds)
    medians = {kind: statistics.median(values) for kind, values in spent.items()}
    return [{"width": width, "compiled": str(compiled).lower(), "tasks_at_once": candidate.at_once, "kind": kind,
             "total_seconds": round(statistics.median(totals), 5), "seconds": round(seconds, 5), "share": round(seconds / sum(medians.values()), 4),
             "gflops": round(counter.get_total_flops() / seconds / 1e9, 1) if kind in ("kernel", "matrix products")
             else None, "matrix_product_gflops": round(statistics.median(rates) / 1e9, 1)}
            for kind, seconds in medians.items()]


def in_kernel(compute: Any) -> dict[str, float]:
    """Seconds of a call in the compiled kernel and outside it."""
    inside, add = 0.0, FusedGradient.add

    def clocked(*args: Any) -> None:
        nonlocal inside
        started = time.perf_counter()
        add(*args)
        inside += time.perf_counter() - started

    with patch.object(FusedGradient, "add", clocked):
        started = time.perf_counter()
        compute()
        seconds = time.perf_counter() - started
    return {"kernel": inside, "outside the kernel": seconds - inside}


def by_operator(compute: Any) -> dict[str, float]:
    """Seconds of a call by kind of operator, and outside all."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compute()
        seconds = time.perf_counter() - started
    found = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()
             if event.key.startswith("aten::")}
    spent = {kind: sum(found.pop(name, 0.0) for name in names) for kind, names in KINDS.items()}
    spent["other operators"] = sum(found.values())
    return {**spent, "outside operators": seconds - sum(spent.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description="where the time of a symmetric meta-gradient goes")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 64, 128, 250])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "results")
    arguments = parser.parse_args()
    made_with = provenance()  # before this writes results
    rows = [row for width in arguments.widths for compiled in (True, False)
            for row in shares(width, compiled, arguments.repeats)]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.folder / "bench_breakdown.csv", rows)
    write_json(arguments.folder / "bench_breakdown.json", {
        "command": "python benchmarks/breakdown.py", "arguments": {**vars(arguments), "folder": arguments.folder.name},
        "provenance": made_with})


if __name__ == "__main__":
    keep_freed_memory()
    main()
