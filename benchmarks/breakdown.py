"""Where the time of a symmetric meta-gradient goes, by kind of operator, into results/bench_breakdown.csv.

5-way 5-shot 15-query MNIST-1D, 16 tasks, 10 inner steps, task_chunk=auto. The profiler itself costs a few microseconds
an operator, which are counted as outside operators.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fobmaml.allocator import keep_freed_memory
from fobmaml.estimators import Symmetric, chunk_size, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.learner import Learner
from fobmaml.models import CNN1d
from fobmaml.provenance import provenance
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D

KINDS = {"matrix products": ("aten::bmm", "aten::baddbmm"), "activations": ("aten::silu", "aten::silu_backward"),
         "copies and sums": ("aten::copy_", "aten::add_", "aten::add", "aten::fill_")}


def shares(width: int, repeats: int) -> list[dict[str, object]]:
    """Medians over ``repeats`` of each kind's seconds, and of the rate of the matrix products."""
    source = MNIST1D()
    tasks = source.sample("train", 16, torch.Generator().manual_seed(0)).to(dtype=torch.float32)
    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 5, width=width), source.loss_fn)
    estimator, theta = Symmetric(GradientDescent()), learner.theta()
    chunk = chunk_size(learner, tasks, estimator)

    def compute() -> None:
        estimate(estimator, learner, theta, tasks, chunk, diagnose=False)

    with FlopCounterMode(display=False) as counter:
        compute()
    matrix = torch.randn(2048, 2048)
    spent: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "other operators", "outside operators")}
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        _ = matrix @ matrix
        rates.append(2 * 2048**3 / (time.perf_counter() - started))
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            compute()
            seconds = time.perf_counter() - started
        by_operator = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()
                       if event.key.startswith("aten::")}
        rest = sum(by_operator.values())
        for kind, names in KINDS.items():
            spent[kind].append(sum(by_operator.get(name, 0.0) for name in names))
            rest -= spent[kind][-1]
        spent["other operators"].append(rest)
        spent["outside operators"].append(seconds - sum(by_operator.values()))
    medians = {kind: statistics.median(values) for kind, values in spent.items()}
    in_products = counter.get_total_flops() / medians["matrix products"]
    return [{"width": width, "tasks_at_once": chunk, "kind": kind, "seconds": round(seconds, 5),
             "share": round(seconds / sum(medians.values()), 4),
             "gflops": round(in_products / 1e9, 1) if kind == "matrix products" else None,
             "matrix_product_gflops": round(statistics.median(rates) / 1e9, 1)} for kind, seconds in medians.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="where the time of a symmetric meta-gradient goes")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 64, 128, 250])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "results")
    arguments = parser.parse_args()
    rows = [row for width in arguments.widths for row in shares(width, arguments.repeats)]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.folder / "bench_breakdown.csv", rows)
    write_json(arguments.folder / "bench_breakdown.json", {
        "command": "python benchmarks/breakdown.py", "arguments": {**vars(arguments), "folder": arguments.folder.name},
        "provenance": provenance()})


if __name__ == "__main__":
    keep_freed_memory()
    main()
