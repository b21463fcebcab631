"""Writes the README's tables from results/: python scripts/tables.py (--check: only says whether they are)."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from drawing import RESULTS, Missing, Row, groups, load, settings
from statistics_of_runs import interval

from fobmaml.files import read_csv, write_atomically
from fobmaml.run.plotting import method

README = Path(__file__).parents[1] / "README.md"


def accuracy(folder: Path) -> str:
    rows = load(folder, "accuracy")
    common = settings(folder, "accuracy")
    lines = [
        f"MNIST-1D, 5-way 5-shot 15-query, CNN of width {common['width']}, {common['steps']} meta-steps of "
        f"{common['meta_batch']} tasks, {common['solver.steps']} inner steps, {common['eval.tasks']} "
        f"meta-test tasks; mean and 95 % interval over seeds; settings chosen by the same trials for each method "
        "on validation tasks.",
        "",
        "| method | seeds | meta-test accuracy | outer steps |",
        "|---|---|---|---|",
    ]
    for name, found in groups(rows, "estimator").items():
        cells = [
            method(name).label,
            str(len(found)),
            percent(found),
            f"{found[0]['optimizer']}, lr {found[0]['optimizer.lr']:g}; inner lr "
            f"{found[0].get('solver.lr', common.get('solver.lr')):g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(rows: Sequence[Row]) -> str:
    """Mean test accuracy and its interval over the runs that ended, and how many did not."""
    values = [100 * row["test/accuracy"] for row in rows if row["test/accuracy"] is not None]
    failed = f" ({len(rows) - len(values)} of {len(rows)} runs diverged)" if len(values) < len(rows) else ""
    if not values:
        return failed.strip()
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f} %{failed}"


def speed(folder: Path) -> str:
    load(folder, "bench", "make bench")  # says so where it is missing
    rows = read_csv(folder / "bench.csv")
    widths, steps = ([*dict.fromkeys(int(row[key]) for row in rows)] for key in ("width", "inner_steps"))
    long = steps[1:]  # with as many tasks alive: some of the kernel's memory is the threads', not the tasks'
    cells = {(row["estimator"], int(row["width"]), int(row["inner_steps"])): row for row in rows}

    def seconds(name: str, width: int) -> str:
        row = cells[name, width, steps[0]]
        return f"{1e3 * float(row['seconds_16_tasks']):.0f} ms, {100 * float(row['fraction_of_limit']):.0f} %"

    def megabytes(name: str, count: int) -> str:
        row = cells[name, widths[-1], count]
        return f"{float(row['peak_bytes']) / float(row['tasks_at_once']) / 1e6:.0f}"

    header = [
        f"one meta-gradient of 16 tasks, {steps[0]} inner steps",
        *(f"{width} channels" for width in widths),
        f"MB a task alive, {widths[-1]} channels, {' / '.join(map(str, long))} inner steps",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        lines.append(
            " | ".join(
                [
                    f"| {method(name).label}",
                    *(seconds(name, width) for width in widths),
                    " / ".join(megabytes(name, count) for count in long) + " |",
                ]
            )
        )
    return "\n".join(lines)


def gpu(folder: Path) -> str:
    rows = load(folder, "bench_gpu", "python benchmarks/gpu.py")
    device = json.loads((folder / "bench_gpu.json").read_text())["provenance"]["device"]
    widths, steps = ([*dict.fromkeys(row[key] for row in rows)] for key in ("width", "inner_steps"))
    cells = {(row["estimator"], row["width"], row["inner_steps"]): row for row in rows}
    header = [
        f"the same on one {device}",
        *(f"{width:g} channels" for width in widths),
        f"GB, {widths[-1]:g} channels, {' / '.join(f'{count:g}' for count in steps)} inner steps",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        times = [
            f"{1e3 * row['seconds_median']:.1f} ms, {100 * row['fraction_of_limit']:.0f} %"
            for row in (cells[name, width, steps[0]] for width in widths)
        ]
        memory = " / ".join(f"{cells[name, widths[-1], count]['peak_bytes'] / 1e9:.2f}" for count in steps)
        lines.append(" | ".join([f"| {method(name).label}", *times, memory + " |"]))
    return "\n".join(lines)


TABLES = {"accuracy": accuracy, "speed": speed, "gpu": gpu}


def page(folder: Path) -> str:
    """The README with its tables as they are in ``folder``."""
    text = README.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- table:{name} -->\n", "<!-- end -->"
        before, rest = text.split(begin)
        text = before + begin + table(folder) + "\n" + end + rest.split(end, 1)[1]
    return text


def write(folder: Path) -> None:
    text = page(folder)
    write_atomically(README, lambda file: file.write(text.encode()))


def main() -> None:
    try:
        if "--check" not in sys.argv:
            write(RESULTS)
        elif page(RESULTS) != README.read_text():
            sys.exit("error: README.md differs from results/: make figures")
    except Missing as missing:
        sys.exit(f"error: {missing}")


if __name__ == "__main__":
    main()
