"""Time and peak memory of one meta-gradient, every estimator and several widths, into results/bench.csv.

5-way 5-shot 15-query MNIST-1D, 16 tasks, 10 inner steps. The estimators take turns, so that a slow spell of the machine
hits all alike; the rate of a large matrix product is measured between them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Forward, Reptile, Symmetric, chunk_size, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.learner import Learner
from fobmaml.measure import peak_bytes
from fobmaml.models import CNN1d
from fobmaml.provenance import provenance
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D

RESULTS = Path(__file__).parents[1] / "results"
TASKS = 16


def seconds(computation: Callable[[], object]) -> float:
    started = time.perf_counter()
    computation()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of one meta-gradient")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 32, 64, 128, 250])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    tasks = MNIST1D().sample("train", TASKS, torch.Generator().manual_seed(0)).to(dtype=torch.float32)
    solver = GradientDescent()
    estimators = {"forward": Forward(solver), "symmetric": Symmetric(solver), "central4": Central(solver),
                  "maml": MAML(solver), "fomaml": FOMAML(solver), "reptile": Reptile(solver), "imaml": IMAML(solver)}
    matrix = torch.randn(2048, 2048)
    rows = []
    for width in tqdm(arguments.widths, unit="width"):
        torch.manual_seed(0)
        learner = Learner(CNN1d((40,), 5, width=width), MNIST1D.loss_fn)
        theta = learner.theta()
        chunks = {name: chunk_size(TASKS, learner, e.rows_per_task) for name, e in estimators.items()}
        calls = {name: partial(estimate, e, learner, theta, tasks, chunks[name], diagnose=False)
                 for name, e in estimators.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        rates = []
        for repeat in range(arguments.repeats + 1):  # the first round warms up
            rate = 2 * 2048**3 / seconds(lambda: matrix @ matrix) / 1e9
            for name, call in calls.items():
                spent = seconds(call)
                if repeat:
                    times[name].append(spent)
            if repeat:
                rates.append(rate)
        for name, call in calls.items():
            low, _, high = statistics.quantiles(times[name], n=4)
            rows.append({
                "estimator": name, "width": width, "inner_steps": solver.steps, "tasks": TASKS,
                "tasks_at_once": chunks[name], "seconds_median": round(statistics.median(times[name]), 5),
                "seconds_q25": round(low, 5), "seconds_q75": round(high, 5), "peak_bytes": peak_bytes(call),
                "matrix_product_gflops": round(statistics.median(rates), 1)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write_csv(RESULTS / "bench.csv", rows)
    write_json(RESULTS / "bench.json", {"command": "make bench", "arguments": vars(arguments),
                                        "provenance": provenance()})


if __name__ == "__main__":
    main()
