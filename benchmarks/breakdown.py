"""Where the time of a symmetric meta-gradient goes, with the compiled kernel and without: bench_breakdown.csv.

5-way 5-shot 15-query MNIST-1D, 16 tasks, 10 inner steps, task_chunk=auto: with the compiled kernel
by what is spent in it and around it; without, by kind of operator. The profiler itself costs a few microseconds an
operator, which are counted as outside operators; ``total_seconds`` is without it.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from candidates import Ours, Setting
from rate import Limit
from timing import existing_folder, first_round, take_turns
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fobmaml.engine import library
from fobmaml.engine.fused import FusedGradient
from fobmaml.files import write_csv, write_json
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.provenance import provenance

KINDS = {
    "matrix products": ("aten::bmm", "aten::baddbmm"),
    "activations": ("aten::silu", "aten::silu_backward"),
    "copies and sums": ("aten::copy_", "aten::add_", "aten::add", "aten::fill_"),
}
STEPS = 10


def shares(width: int, repeats: int, limit: Limit) -> list[dict[str, object]]:
    """Medians over ``repeats``: of the whole, with the kernel and without in turns, and of each kind's part of it."""
    setting = Setting(width, STEPS)
    used = ("stacked",) if library.kernel() is None else ("fused", "stacked")
    ways = {engine: Ours(setting, "symmetric", limit.threads, engine) for engine in used}
    with FlopCounterMode(display=False) as counter:
        ways["stacked"].gradient(setting.tasks)
    operations = counter.get_total_flops()
    calls = {engine: way.calls(setting.tasks) for engine, way in ways.items()}
    first_round(calls)  # warms up
    whole = take_turns(calls, repeats, limit)
    rows: list[dict[str, object]] = []
    for engine, way in ways.items():
        spent: dict[str, list[float]] = {}
        for _ in range(repeats):
            found = (in_kernel if engine == "fused" else by_operator)(partial(way.gradient, setting.tasks))
            for kind, part in found.items():
                spent.setdefault(kind, []).append(part)
        medians = {kind: statistics.median(parts) for kind, parts in spent.items()}
        for kind, median in medians.items():
            gflops = operations / median / 1e9 if kind in ("kernel", "matrix products") else None
            rows.append(
                {
                    "width": width,
                    "engine": engine,
                    "tasks_at_once": way.at_once,
                    "total_seconds": round(statistics.median(found.seconds for found in whole[engine]), 5),
                    "fraction_of_limit": round(
                        statistics.median(operations / found.seconds / found.rate for found in whole[engine]), 4
                    ),
                    "multiply_add_gflops": round(statistics.median(found.rate for found in whole[engine]) / 1e9, 1),
                    "kind": kind,
                    "seconds": round(median, 5),
                    "share": round(median / sum(medians.values()), 4),
                    "gflops": gflops and round(gflops, 1),
                }
            )
    return rows


def in_kernel(compute: Any) -> dict[str, float]:
    """Seconds of a call in the compiled kernel and outside it."""
    inside, add = 0.0, FusedGradient.add

    def clocked(*args: Any, **options: Any) -> None:
        nonlocal inside
        started = time.perf_counter()
        add(*args, **options)
        inside += time.perf_counter() - started

    with patch.object(FusedGradient, "add", clocked):
        started = time.perf_counter()
        compute()
        total = time.perf_counter() - started
    return {"kernel": inside, "outside the kernel": total - inside}


def by_operator(compute: Any) -> dict[str, float]:
    """Seconds of a call by kind of operator, and outside all."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compute()
        total = time.perf_counter() - started
    found = {
        event.key: event.self_cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.key.startswith("aten::")
    }
    spent = {kind: sum(found.pop(name, 0.0) for name in names) for kind, names in KINDS.items()}
    spent["other operators"] = sum(found.values())
    return {**spent, "outside operators": total - sum(spent.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description="where the time of a symmetric meta-gradient goes")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 64, 128, 250])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=existing_folder, default=Path(__file__).parents[1] / "results")
    arguments = parser.parse_args()
    made_with = provenance()  # before this writes results
    limit = Limit(torch.get_num_threads())
    rows = [row for width in arguments.widths for row in shares(width, arguments.repeats, limit)]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.folder / "bench_breakdown.csv", rows)
    write_json(
        arguments.folder / "bench_breakdown.json",
        {
            "command": "python benchmarks/breakdown.py",
            "arguments": {**vars(arguments), "folder": arguments.folder.name},
            "provenance": made_with,
        },
    )


if __name__ == "__main__":
    keep_freed_memory()
    main()
