"""Time and memory of one meta-gradient of 16 tasks on a GPU: results/bench_gpu.csv.

5-way 5-shot 15-query MNIST-1D in float32 without TF32, all tasks at once, by width and inner steps K. Estimators take
turns; the limit is the rate of a large matrix product in the same run, also without TF32.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import existing_folder
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fobmaml.engine import Learner
from fobmaml.estimators import FOMAML, IMAML, MAML, Estimator, Symmetric, Tangent, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.measure import peak_bytes
from fobmaml.models import CNN1d
from fobmaml.precision import full_precision
from fobmaml.run.provenance import provenance
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D

TASKS, MATRIX = 16, 8192
ESTIMATORS: dict[str, Callable[[GradientDescent], Estimator]] = {
    "symmetric": Symmetric,
    "tangent": Tangent,
    "maml": MAML,
    "maml_checkpoint": partial(MAML, checkpoint=True),
    "fomaml": FOMAML,
    "imaml": IMAML,
}


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def rate() -> float:
    """Of multiply-adds a second."""
    matrix = torch.randn(MATRIX, MATRIX, device="cuda")
    with full_precision("cuda"):
        return MATRIX**3 / statistics.median([seconds(lambda: matrix @ matrix) for _ in range(4)][1:])


def measured(width: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    source = MNIST1D()
    tasks = source.sample("train", TASKS, torch.Generator().manual_seed(0)).to("cuda", torch.float32)
    torch.manual_seed(0)
    learner = Learner(CNN1d(source.input_shape, source.outputs, width).cuda(), source.loss_fn)
    calls = {
        name: partial(estimate, make(GradientDescent(steps)), learner, learner.theta(), tasks, diagnose=False)
        for name, make in ESTIMATORS.items()
    }
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:  # warms up, too
            call()
        rows.append(
            {
                "estimator": name,
                "width": width,
                "inner_steps": steps,
                "tasks": TASKS,
                "multiply_adds": round(counter.get_total_flops() / 2),
            }
        )
    rounds = [[seconds(call) for call in calls.values()] for _ in range(repeats)]
    limit = rate()
    for row, times, call in zip(rows, zip(*rounds, strict=True), calls.values(), strict=True):
        row["seconds_median"] = float(f"{statistics.median(times):.4g}")
        row["repeats"] = repeats
        row["fraction_of_limit"] = round(row["multiply_adds"] / row["seconds_median"] / limit, 4)
        row["peak_bytes"] = peak_bytes(call, "cuda")
        row["matrix_product_gflops"] = round(2 * limit / 1e9)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of one meta-gradient on a GPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 64, 128, 250])
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=existing_folder, default=Path(__file__).parents[1] / "results")
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    settings = [(width, steps) for width in arguments["widths"] for steps in arguments["inner_steps"]]
    rows = [
        row for width, steps in tqdm(settings, unit="setting") for row in measured(width, steps, arguments["repeats"])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "bench_gpu.csv", rows)
    write_json(
        folder / "bench_gpu.json",
        {"command": "python benchmarks/gpu.py", "arguments": arguments, "provenance": provenance("cuda")},
    )


if __name__ == "__main__":
    main()
