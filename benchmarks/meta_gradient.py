"""Time and memory of one meta-gradient: every estimator here and others' MAML and symmetric (make bench).

5-way 5-shot 15-query MNIST-1D, 16 tasks, by width and inner steps K. Two tables, into results/: bench.csv (by
estimator) and bench_chunks.csv (by how many tasks are solved at once). Gradients and Hessian products are the compiled
kernel's, where it was compiled; ``symmetric_operators`` is by torch's operators. Others are higher, TorchOpt, JAX, and
loops with torch's autograd (candidates.py). Counted are the multiply-adds of passes that keep their activations: not
what the kernel takes again to keep less.

Everybody is tried with one thread and with all of torch's, JAX in several ways; the quickest is quoted
(comparisons.py). Whatever is compared takes turns, and what the machine disturbed is measured again (timing.py). A time
is compared with the rate of fused multiply-adds of all threads, measured before and after every call (rate.py), which
solves as many tasks as are solved at once. A run that was stopped continues.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
from candidates import names
from comparisons import SHORT, Bench, by_chunk, by_estimator
from rate import Limit
from timing import Row
from tqdm import tqdm

from fobmaml.files import write_csv, write_json
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.provenance import provenance

ROOT = Path(__file__).parents[1]
QUICK = {"widths": [25, 64], "inner_steps": [10], "repeats": 1, "repeats_long": 1}
LIBRARIES = ("higher", "torchopt", "jax", "jaxlib")


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of one meta-gradient")
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 64, 128, 250])
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--repeats", type=int, default=7, help=f"of up to {SHORT} inner steps")
    parser.add_argument("--repeats-long", type=int, default=3, help="of more, and of bench_chunks.csv")
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
        "peers": {library: found for library in LIBRARIES if (found := version_of(library))},
    }
    bench = Bench(Limit(torch.get_num_threads()), names(), quick=arguments["quick"], report=tqdm.write)

    tables: dict[str, list[Row]] = {}
    try:
        with tqdm(groups(arguments, bench), unit="group") as bar:
            for table, name, measure in bar:
                bar.set_postfix_str(name)
                tables.setdefault(table, []).extend(measured_once(done / f"{name}.json", measure, made_with))
    finally:
        bench.workers.stop()
    for table, rows in tables.items():
        write_csv(results / f"{table}.csv", rows)
    limit = {name: round(rate / 1e9, 1) for name, rate in bench.limit.rates.items()}
    write_json(results / "bench.json", {**made_with, "multiply_add_gflops": limit})
    shutil.rmtree(done)


def groups(arguments: Row, bench: Bench) -> list[tuple[str, str, Callable[[], list[Row]]]]:
    """What is measured together: (table, name, what returns its rows)."""
    short, long, widths = arguments["repeats"], arguments["repeats_long"], arguments["widths"]
    return [
        *(
            ("bench", f"{width}-{steps}", partial(by_estimator, width, steps, short if steps <= SHORT else long, bench))
            for width, steps in product(widths, arguments["inner_steps"])
        ),
        *(
            ("bench_chunks", f"chunks-{width}-{name}", partial(by_chunk, width, name, long, bench))
            for width, name in product(widths[:1] if arguments["quick"] else widths, ("symmetric", "maml"))
        ),
    ]


def version_of(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


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
