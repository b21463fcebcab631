"""Time and memory of one meta-gradient: every estimator here and MAML by other libraries (make bench).

5-way 5-shot 15-query MNIST-1D, 16 tasks, by width and inner steps K. Three tables, into results/: bench.csv (by
estimator), bench_chunks.csv (by how many tasks are solved at once) and bench_loop.csv (what a training run spends
beside the meta-gradients). Gradients and Hessian products are the compiled kernel's, where it was compiled;
``symmetric_operators`` is by torch's operators. Whatever is compared takes turns, so that a slow spell of the machine
hits all alike, and the rate of a large matrix product is measured before and after every call, which solves as many
tasks as are solved at once. Counted are the multiply-adds of passes that keep their activations: what the kernel takes
again to keep less is not. A run that was stopped continues.
"""

import argparse
import contextlib
import gc
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peers import PEERS, in_our_layout, plain_network
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fobmaml.run
import fobmaml.training
from fobmaml import estimators
from fobmaml.engine import Learner
from fobmaml.estimators import Estimator, chunk_size, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.measure import Validation, peak_bytes
from fobmaml.models import CNN1d
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.provenance import provenance
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D, TaskBatch
from fobmaml.training import MetaTraining

ROOT = Path(__file__).parents[1]
TASKS = 16
INNER_LR, COMPARED_LR = 0.1, 0.01
SHORT, FEW = 10, 2
"""Up to SHORT inner steps all tasks are measured; beyond, FEW at most, to save time: memory a task is the same, and so
are seconds a task where task_chunk=auto is no more than FEW."""
CHUNKS = (1, 2, 4, 8, 16)
PATIENCE = 4.0
"""Chunks that at first take so many times as long as the best are not timed further."""
MATRIX = 2048
TOLERANCE = 1e-4
"""Of the relative distance between another library's MAML and ours."""
QUICK = {"widths": [25, 64], "inner_steps": [10], "repeats": 1, "repeats_long": 1, "loop_steps": 30}
ESTIMATORS: dict[str, Callable[[GradientDescent], Estimator]] = {
    "forward": estimators.Forward,
    "symmetric": estimators.Symmetric,
    "central4": estimators.Central,
    "maml": estimators.MAML,
    "maml_checkpoint": partial(estimators.MAML, checkpoint=True),
    "fomaml": estimators.FOMAML,
    "reptile": estimators.Reptile,
    "imaml": estimators.IMAML,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """``gradient(tasks)``, which holds ``at_once`` tasks in memory at a time."""

    gradient: Callable[[TaskBatch], Any]
    at_once: int
    learner: Learner | None = None
    """If it is ours."""

    def calls(self, tasks: TaskBatch) -> list[Callable[[], object]]:
        """One for each of the parts that are solved at once."""
        return [partial(self.gradient, part) for part in tasks.split(self.at_once)]


class Setting:
    """A width and a number of inner steps: the network, the tasks, and who computes the meta-gradient."""

    def __init__(self, width: int, steps: int, dtype: torch.dtype = torch.float32, lr: float = INNER_LR):
        self.steps, self.lr, source = steps, lr, MNIST1D()
        self.tasks = source.sample("train", TASKS, torch.Generator().manual_seed(0)).to(dtype=dtype)
        torch.manual_seed(0)
        self.model = CNN1d(source.input_shape, source.outputs, width).to(dtype)
        self.loss_fn = source.loss_fn

    def ours(self, name: str, chunk: int | None = None, engine: str = "auto") -> Candidate:
        """``chunk``: None for task_chunk=auto."""
        estimator = ESTIMATORS[name](GradientDescent(self.steps, self.lr))
        learner = Learner(self.model, self.loss_fn, engine)
        at_once, theta = chunk or chunk_size(learner, self.tasks, estimator), learner.theta()
        return Candidate(
            lambda part: estimate(estimator, learner, theta, part, at_once, diagnose=False).gradient, at_once, learner
        )

    def peer(self, name: str) -> Candidate:
        network = plain_network(self.model)
        return Candidate(lambda tasks: PEERS[name](network, tasks, self.steps, self.lr), at_once=1)


def gradient_error(name: str, width: int, steps: int) -> float:
    """Relative distance of a peer's meta-gradient, mean over two tasks, to our MAML's.

    In float64, and with inner steps short enough for the inner loop to settle: the derivative of 200 longer ones can
    magnify rounding until two orders of summation give different vectors.
    """
    setting = Setting(width, steps, torch.float64, COMPARED_LR)
    ours = setting.ours("maml").gradient(setting.tasks[:2])
    theirs = in_our_layout(setting.model, setting.peer(name).gradient(setting.tasks[:2]))
    error = float((theirs - ours).norm() / ours.norm())
    if not error <= TOLERANCE:
        raise AssertionError(f"{name} at width {width} and {steps} inner steps is {error:.1e} away from our MAML")
    return error


def take_turns(
    calls: Mapping[str, Sequence[Callable[[], object]]], repeats: int, patience: float = float("inf")
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of all of somebody's calls, and the rate (operations a second) of a matrix product meanwhile, by round.

    The rate is that before and after a call, averaged over the time of the calls. The first round warms up; whose calls
    take more than ``patience`` times the quickest's there drops out.
    """
    matrix, out = torch.randn(MATRIX, MATRIX), torch.empty(MATRIX, MATRIX)

    def rate() -> float:
        return 2 * MATRIX**3 / seconds(lambda: torch.mm(matrix, matrix, out=out))

    first = {name: sum(map(seconds, theirs)) for name, theirs in calls.items()}
    rate()
    measured: dict[str, list[tuple[float, float]]] = {
        name: [] for name, spent in first.items() if spent <= patience * min(first.values())
    }
    for _ in range(repeats):
        before = rate()
        for name, rounds in measured.items():
            gc.collect()  # not in somebody else's time
            total = possible = 0.0
            for call in calls[name]:
                spent = seconds(call)
                after = rate()
                total, possible, before = total + spent, possible + spent * (before + after) / 2, after
            rounds.append((total, possible / total))
    return measured


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> Row:
    low, middle, high = (round(float(q), 5) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"seconds_median": middle, "seconds_q25": low, "seconds_q75": high, "repeats": len(values)}


def by_estimator(width: int, steps: int, repeats: int) -> list[Row]:
    """The rows of bench.csv for one width and number of inner steps."""
    setting = Setting(width, steps)
    if steps > SHORT:
        setting.tasks = setting.tasks[:FEW]
    candidates = {
        **{name: setting.ours(name) for name in ESTIMATORS},
        "symmetric_operators": setting.ours("symmetric", engine="stacked"),
        **{name: setting.peer(name) for name in PEERS},
    }
    parts = {name: setting.tasks[: TASKS if steps <= SHORT else c.at_once] for name, c in candidates.items()}
    errors = {name: gradient_error(name, width, steps) for name in PEERS}
    measured = take_turns({name: c.calls(parts[name]) for name, c in candidates.items()}, repeats)
    rows = []
    for name, candidate in candidates.items():
        tasks, chunk = len(parts[name]), setting.tasks[: candidate.at_once]
        # The counter sees torch's operators only, so the same computation is counted there.
        counted = setting.ours(name, engine="stacked") if name in ESTIMATORS else candidate
        with FlopCounterMode(display=False) as counter:
            counted.gradient(chunk)
        multiply_adds = round(counter.get_total_flops() / 2 * tasks / len(chunk))
        times, rates = zip(*measured[name], strict=True)
        timing = spread(times)
        rows.append(
            {
                "estimator": name,
                "engine": candidate.learner.used if candidate.learner else "autograd",
                "width": width,
                "inner_steps": steps,
                "tasks": tasks,
                "tasks_at_once": len(chunk),
                **timing,
                f"seconds_{TASKS}_tasks": round(timing["seconds_median"] * TASKS / tasks, 5),
                "multiply_adds": multiply_adds,
                "matrix_product_gflops": round(statistics.median(rates) / 1e9, 1),
                "fraction_of_limit": round(statistics.median(2 * multiply_adds / t / r for t, r in measured[name]), 4),
                "peak_bytes": peak_bytes(partial(candidate.gradient, chunk)),
                "gradient_error": float(f"{errors[name]:.2e}") if name in errors else None,
            }
        )
    return rows


def by_chunk(width: int, name: str, repeats: int) -> list[Row]:
    """The rows of bench_chunks.csv for one width and estimator."""
    setting = Setting(width, SHORT)
    candidates = {"auto": setting.ours(name), **{str(chunk): setting.ours(name, chunk) for chunk in CHUNKS}}
    calls = {chunk: c.calls(setting.tasks) for chunk, c in candidates.items()}
    timings = {
        chunk: spread([spent for spent, _ in rounds]) for chunk, rounds in take_turns(calls, repeats, PATIENCE).items()
    }
    best = min(timing["seconds_median"] for chunk, timing in timings.items() if chunk != "auto")
    return [
        {
            "estimator": name,
            "width": width,
            "inner_steps": SHORT,
            "tasks": TASKS,
            "task_chunk": candidates[chunk].at_once,
            "auto": str(chunk == "auto").lower(),
            **timing,
            "ratio_to_best_fixed": round(timing["seconds_median"] / best, 3),
        }
        for chunk, timing in timings.items()
    ]


def by_part(steps: int) -> list[Row]:
    """The rows of bench_loop.csv: python train.py, with clocks in it and as little evaluation as it can do."""
    spent = {"gradient": 0.0, "validation": 0.0}
    loop: dict[str, float] = {}
    train = MetaTraining.train

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            spent[part] += time.perf_counter() - started
            return result

        return call

    def clocked_loop(training: MetaTraining, *arguments: Any) -> Iterator[Any]:
        before, started = dict(spent), time.perf_counter()
        yield from train(training, *arguments)
        loop.update({part: spent[part] - before[part] for part in spent}, all=time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"steps={steps}",
            "device=cpu",
            f"eval.every={steps}",
            "eval.tasks=2",
            "bias.every=0",
            "wandb.mode=offline",
            f"hydra.run.dir={folder}",
        )
        with (
            contextlib.redirect_stdout(io.StringIO()),
            patch.object(sys, "argv", ["train.py", *settings]),
            patch.object(fobmaml.training, "estimate", clocked("gradient", estimate)),
            patch.object(Validation, "__call__", clocked("validation", Validation.__call__)),
            patch.object(MetaTraining, "train", clocked_loop),
        ):
            fobmaml.run.main(ROOT / "configs")
    counted = loop["all"] - loop["validation"]
    parts = {"gradient": loop["gradient"], "rest": counted - loop["gradient"], "validation": loop["validation"]}
    return [
        {
            "part": part,
            "steps": steps,
            "seconds": round(value, 4),
            "share": None if part == "validation" else round(value / counted, 4),
        }
        for part, value in parts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of one meta-gradient")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 64, 128, 250])
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--repeats", type=int, default=7, help=f"of up to {SHORT} inner steps")
    parser.add_argument("--repeats-long", type=int, default=3, help="of more, and of bench_chunks.csv")
    parser.add_argument("--loop-steps", type=int, default=200, help="meta-steps of bench_loop.csv")
    parser.add_argument("--quick", action="store_true", help="a small run of its own, into outputs/bench-quick/")
    arguments = vars(parser.parse_args())
    arguments |= QUICK if arguments["quick"] else {}
    results = ROOT / ("outputs/bench-quick" if arguments["quick"] else "results")
    done = results / "groups" if arguments["quick"] else ROOT / "outputs" / "bench"
    done.mkdir(parents=True, exist_ok=True)
    made_with = {
        "command": "make bench",
        "arguments": arguments,
        "provenance": provenance(),
        "peers": {peer: version(peer) for peer in PEERS},
    }

    tables: dict[str, list[Row]] = {}
    with tqdm(groups(arguments), unit="group") as bar:
        for table, name, measure in bar:
            bar.set_postfix_str(name)
            tables.setdefault(table, []).extend(measured_once(done / f"{name}.json", measure, made_with))
    for table, rows in tables.items():
        write_csv(results / f"{table}.csv", rows)
    write_json(results / "bench.json", made_with)
    shutil.rmtree(done)


def groups(arguments: Row) -> list[tuple[str, str, Callable[[], list[Row]]]]:
    """What is measured together: (table, name, what returns its rows)."""
    short, long, widths = arguments["repeats"], arguments["repeats_long"], arguments["widths"]
    return [
        *(
            ("bench", f"{width}-{steps}", partial(by_estimator, width, steps, short if steps <= SHORT else long))
            for width, steps in product(widths, arguments["inner_steps"])
        ),
        *(
            ("bench_chunks", f"chunks-{width}-{name}", partial(by_chunk, width, name, long))
            for width, name in product(widths[:1] if arguments["quick"] else widths, ("symmetric", "maml"))
        ),
        ("bench_loop", "loop", partial(by_part, arguments["loop_steps"])),
    ]


def measured_once(path: Path, measure: Callable[[], list[Row]], made_with: Row) -> list[Row]:
    """What ``path`` holds, if the same command made it from the same clean commit; else measures and writes it."""
    if path.exists() and not made_with["provenance"]["dirty"]:
        found = json.loads(path.read_text())
        rows: list[Row] = found.pop("rows")
        if found == made_with:
            return rows
    rows = measure()
    write_json(path, {**made_with, "rows": rows})
    return rows


if __name__ == "__main__":
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
