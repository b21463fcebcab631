"""One meta-gradient of Conv4, the few-shot backbone, against loops over tasks by torch's autograd: bench_conv4.csv.

Four blocks of a 3 × 3 convolution of 64 channels, GroupNorm, ReLU and pooling, and a linear layer, on 28 × 28 grey
images; 5-way 1-shot, 5 queries a class, 8 and 16 tasks, K = 5 inner steps. ``symmetric`` is ours, by the compiled
kernel for images where it was compiled; others are peers.py's: a loop over tasks and offsets, a loop of MAML, and
higher's MAML. Everybody takes turns, with one thread and with all of torch's. Where other processes take a share of the
processors (``others_share``), the time by the clock is longer by chance: the processors' own time, all threads
together, is less disturbed, and ``gflops`` are by it. Counted are the multiply-adds of plain convolutions, two
operations each: the kernel does fewer, by Winograd's algorithm, so that its share of the rate of fused multiply-adds
(rate.py) may pass 1.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import higher_maml, loop_maml, loop_symmetric
from processors import others_share, spent
from rate import Limit, seconds
from timing import Row, existing_folder, spread
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fobmaml.engine import Learner
from fobmaml.estimators import Symmetric, chunk_size, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.measure import peak_bytes
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.provenance import provenance
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import TaskBatch

ROOT = Path(__file__).parents[1]
WAYS, SHOTS, QUERIES, TASKS, STEPS, WIDTH = 5, 1, 5, (8, 16), 5, 64
LR, LAM, NU = 0.1, 0.5, 0.05
LONG = 50  # inner steps, for memory
RATES = 20  # measured before each call: the highest of all is the machine's, where others share it


def conv4(width: int) -> nn.Sequential:
    blocks = [
        (nn.Conv2d(width if block else 1, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2))
        for block in range(4)
    ]
    return nn.Sequential(*itertools.chain(*blocks), nn.Flatten(), nn.Linear(width, WAYS))


def random_tasks(count: int) -> TaskBatch:
    x = torch.randn(count, WAYS * (SHOTS + QUERIES), 1, 28, 28)
    y = torch.arange(WAYS).repeat(count, SHOTS + QUERIES)
    first = WAYS * SHOTS
    return TaskBatch(x[:, :first], y[:, :first], x[:, first:], y[:, first:])


class Ours:
    """Our symmetric meta-gradient, without a training run's diagnosis."""

    def __init__(self, model: nn.Module, tasks: TaskBatch, steps: int = STEPS):
        self.learner, self.tasks = Learner(model, F.cross_entropy), tasks
        self.estimator = Symmetric(GradientDescent(steps, LR), LAM, NU)

    def __call__(self) -> Tensor:
        chunk = chunk_size(self.learner, self.tasks, self.estimator)
        theta = self.learner.theta()
        return estimate(self.estimator, self.learner, theta, self.tasks, chunk, diagnose=False).gradient


def calls(model: nn.Module, tasks: TaskBatch) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {
        "symmetric": Ours(model, tasks),
        "loop_symmetric": partial(loop_symmetric, model, tasks, STEPS, LR, LAM, NU),
        "loop_maml": partial(loop_maml, model, tasks, STEPS, LR),
    }
    if find_spec("higher"):
        found["higher_maml"] = partial(higher_maml, model, tasks, STEPS, LR)
    return found


def flops_of_an_example(model: nn.Module) -> int:
    """Of a gradient: three times a forward pass, but for the inputs' derivative."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
        forward = counter.get_total_flops()
    return 3 * forward - 2 * 28 * 28 * 9 * WIDTH


def distance(found: Tensor, model: nn.Module, tasks: TaskBatch) -> float:
    """From the same by the loop, in float64: ReLU and pooling have kinks, at which roundings decide."""
    wanted = loop_symmetric(copy.deepcopy(model).double(), tasks.to(dtype=torch.float64), STEPS, LR, LAM, NU)
    exact = torch.cat([part.flatten() for part in wanted])
    return float((found - exact).norm() / exact.norm())


def measured(threads: int, count: int, repeats: int) -> list[Row]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, tasks, limit = conv4(WIDTH), random_tasks(count), Limit(threads)
    everybody = calls(model, tasks)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in everybody}
    began = spent()
    for _ in range(repeats + 1):
        for name, call in everybody.items():
            for _ in range(RATES):
                limit.rate()
            before = time.process_time()
            times[name].append((seconds(call), time.process_time() - before))
    others = others_share(began, spent())
    flops = 2 * STEPS * count * WAYS * (SHOTS + QUERIES) * flops_of_an_example(model)
    rows: list[Row] = []
    for name, theirs in times.items():
        clock, own = zip(*theirs[1:], strict=True)  # the first warms up
        row: Row = {"method": name, "threads": threads, "tasks": count} | spread(clock)
        row["cpu_seconds_median"] = round(statistics.median(own), 5)
        for column in ("seconds_median", "cpu_seconds_median"):
            row[f"{column}_over_ours"] = round(row[column] / (rows[0] if rows else row)[column], 2)
        if name.endswith("symmetric"):
            rate = flops * threads / row["cpu_seconds_median"]
            row |= {"gflops": round(rate / 1e9, 1), "share_of_rate": round(rate / max(limit.seen), 3)}
        rows.append(row | {"rate_gflops": round(max(limit.seen) / 1e9, 1), "others_share": others and round(others, 3)})
    ours, loop = Ours(model, tasks), loop_symmetric(model, tasks, STEPS, LR, LAM, NU)
    rows[0] |= {"distance": distance(ours(), model, tasks), "engine": ours.learner.used}
    rows[1]["distance"] = distance(torch.cat([part.flatten() for part in loop]), model, tasks)
    for steps in (STEPS, LONG):
        rows[0][f"peak_bytes_{steps}_steps"] = peak_bytes(Ours(model, tasks, steps), torch.device("cpu"))
    return rows


def version_of(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    settings = list(itertools.product(dict.fromkeys((1, torch.get_num_threads())), TASKS))
    bar = tqdm(settings, unit="setting", disable=None)
    rows = [row for threads, count in bar for row in measured(threads, count, arguments.repeats)]
    columns = dict.fromkeys(name for row in rows for name in row)
    write_csv(arguments.folder / "bench_conv4.csv", [{name: row.get(name, "") for name in columns} for row in rows])
    write_json(
        arguments.folder / "bench_conv4.json",
        {
            "command": "python benchmarks/conv4.py",
            "ways": WAYS,
            "shots": SHOTS,
            "queries": QUERIES,
            "tasks": TASKS,
            "inner_steps": STEPS,
            "width": WIDTH,
            "repeats": arguments.repeats,
            "peers": {"higher": version_of("higher")},
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    keep_freed_memory()
    main()
