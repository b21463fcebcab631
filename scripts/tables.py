"""Writes tables of the README and of docs/ from results/: python scripts/tables.py (--check: only says if they are).

They stand between ``<!-- table:NAME -->`` and ``<!-- end -->``, so that who reads the files alone sees them, too.
"""

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drawing import RESULTS, Missing, Row, groups, load, parse, settings
from statistics_of_runs import CHANCE, interval, of_examples
from verdicts import MARGIN, Verdict, level

from fobmaml.engine import Work
from fobmaml.files import read_csv, write_text
from fobmaml.run.plotting import METHODS, method

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("choose.md", "performance.md", "data.md")))
MARK = re.compile(r"<!-- table:(\w+) -->\n.*?<!-- end -->", re.DOTALL)
PRODUCT = "matrix product"
"""The limit that times are compared with, where no loop of multiply-adds was compiled."""


@dataclass(frozen=True)
class Comparison:
    """Runs of every method that end alike: after as many meta-steps, or as much work. ``examples``: what each test
    example gives to a method's mean accuracy."""

    heading: str
    rows: list[Row]
    examples: list[Row]
    budget: float | None

    def methods(self) -> dict[str, list[Row]]:
        return groups(self.rows, "estimator")


def comparisons(folder: Path) -> list[Comparison]:
    """By meta-steps, and, where it was measured, by work. Raises Missing."""
    found = []
    for name in ("accuracy", "accuracy_budget"):
        if name == "accuracy" or (folder / f"{name}.csv").exists():
            common = settings(folder, name)
            budget = common.get("budget")
            heading = f"{common.get('steps')} meta-steps of {common.get('meta_batch')} tasks"
            if budget:
                heading = f"{budget / 1e6:g} million example-gradients"
            found.append(Comparison(heading, load(folder, name), load(folder, f"{name}_examples"), budget))
    return found


def accuracy(folder: Path) -> str:
    """At equal meta-steps and at equal work."""
    common, compared = settings(folder, "accuracy"), comparisons(folder)
    header = ["method"]
    for each in compared:
        header += [each.heading, "diverged", *["work, million example-gradients"] * (not each.budget)]
    lines = [
        f"MNIST-1D, 5-way 5-shot 15-query, CNN of width {common['width']}, {common['eval.tasks']} meta-test tasks; "
        "mean and 95 % interval over seeds and test examples, a run that diverged counted at chance "
        f"({CHANCE:g} %); settings chosen by the same trials for each method on validation tasks. The test classes "
        "were seen in training, the test examples were not.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for name in compared[0].methods():
        cells = [method(name).label]
        for each in compared:
            found = each.methods().get(name, [])
            cells += [percent(found, each.examples), diverged(found)] if found else ["–", "–"]
            cells += [work_of(found)] * (not each.budget)
        lines.append(f"| {' | '.join(cells)} |")
    said = [f"With {each.heading}, {the_best(each.rows, each.examples)}." for each in compared]
    return "\n".join([*lines, "", " ".join([*said, unsolved(compared[0].rows)])])


def unsolved(rows: Sequence[Row]) -> str:
    """How far the estimates of symmetric are from the exact meta-gradient where they are trained with."""
    biases = [row["bias/relative_error"] for row in rows if row["estimator"] == "symmetric" and not stopped(row)]
    return (
        f"The bias of {in_words('symmetric')} at the end of these runs is "
        f"{statistics.median(biases):.2f} of the exact meta-gradient's norm: its inner steps do not solve the inner "
        "problem, and what it trains with is a weighted sum of query gradients along them."
    )


def the_best(rows: Sequence[Row], examples: Sequence[Row]) -> str:
    """Which method of three seeds or more has the highest mean, which are level with it and which not told from it."""
    scores = {name: points(found) for name, found in groups(rows, "estimator").items() if len(found) > 2}
    best = max(scores, key=lambda name: statistics.fmean(scores[name].values()))
    level_with, not_told = [], []
    for name in scores:
        if name == best:
            continue
        differences = [scores[best][seed] - value for seed, value in scores[name].items() if seed in scores[best]]
        shared = of_examples([row[best] - row[name] for row in examples])
        mean, half = interval(differences, shared)
        if level(differences, MARGIN, shared) == Verdict.HOLDS:
            level_with.append(in_words(name))
        elif mean <= half:
            not_told.append(in_words(name))
    said = f"{in_words(best)} has the highest mean"
    if level_with:
        said += f", level with it (within {MARGIN:g} points): {', '.join(level_with)}"
    if not_told:
        said += f"; {', '.join(not_told)} cannot be told from it"
    return said


def in_words(name: str) -> str:
    """A method's label within a sentence."""
    return method(name).label.replace(",", "")


def points(rows: Sequence[Row]) -> dict[float, float]:
    """Of each seed the test accuracy in per cent; a run that stopped is at chance."""
    return {row["seed"]: counted(row) for row in rows}


def counted(row: Row, chance: float = CHANCE) -> float:
    """A run's test accuracy in per cent; chance, where it stopped."""
    return chance if stopped(row) else 100 * row["test/accuracy"]


def accuracy_interval(rows: Sequence[Row], examples: Sequence[Row]) -> tuple[float, float]:
    """Of a method's runs: mean test accuracy in per cent, and half width of its interval over seeds and examples."""
    return interval([*points(rows).values()], of_examples([row[rows[0]["estimator"]] for row in examples]))


def percent(rows: Sequence[Row], examples: Sequence[Row]) -> str:
    """Mean test accuracy and its interval over seeds and test examples."""
    mean, half = accuracy_interval(rows, examples)
    return f"{mean:.1f} ± {half:.1f} %" if len(rows) > 1 else f"{mean:.1f} %, one seed"


def stopped(row: Row) -> bool:
    """Whether a run ended before its last step."""
    return row["test/accuracy"] is None or row["status"] != "completed"


def diverged(rows: Sequence[Row]) -> str:
    return f"{sum(map(stopped, rows))} of {len(rows)}"


def work_of(rows: Sequence[Row]) -> str:
    """In millions, the median of the runs that came to their ends."""
    found = [work(row) / 1e6 for row in rows if not stopped(row)]
    return f"{statistics.median(found):.1f}" if found else "–"


def work(row: Row) -> float:
    """Of a run, in example-gradients."""
    return Work(gradients=row["work/example_gradients"], hessian_products=row["work/hessian_products"]).total


def speed(folder: Path) -> str:
    load(folder, "bench", "make bench")  # says so where it is missing
    rows: list[Row] = [{key: parse(value) for key, value in row.items()} for row in read_csv(folder / "bench.csv")]
    widths, steps = ([*dict.fromkeys(int(row[key]) for row in rows)] for key in ("width", "inner_steps"))
    long = steps[1:]  # with as many tasks alive: some of the kernel's memory is the threads', not the tasks'
    cells = {(row["estimator"], row["width"], row["inner_steps"]): row for row in rows}
    short = [row for row in rows if row["inner_steps"] == steps[0] and row["seconds_median"] is not None]
    threads = max(float(row.get("threads") or 1) for row in rows)

    def seconds(name: str, width: int) -> str:
        row = cells.get((name, width, steps[0]))
        if row is None:
            return "–"
        if row["seconds_median"] is None:
            return "took too long"
        alone = " (1 thread)" if threads > 1 == row.get("threads") else ""
        return f"{1e3 * row['seconds_16_tasks']:.0f} ms, {100 * row['fraction_of_limit']:.0f} %{alone}"

    def megabytes(name: str, count: int) -> str:
        row = cells.get((name, widths[-1], count), {})
        return f"{row['peak_bytes'] / row['tasks_at_once'] / 1e6:.0f}" if row.get("peak_bytes") else "–"

    def product(width: int) -> str:
        fractions = [
            row["matrix_product_gflops"] / row["multiply_add_gflops"] for row in short if row["width"] == width
        ]
        return f"{100 * statistics.median(fractions):.0f} %"

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
    if any(row.get("limit", PRODUCT) == PRODUCT for row in short):
        return "\n".join([*lines, "", "The percentage is of the rate of a large float32 matrix product by torch."])
    lines.append(" | ".join(["| a large matrix product by torch", *map(product, widths), " |"]))
    rate = statistics.median(row["multiply_add_gflops"] for row in short)
    said = (
        f"The percentage is of the rate of fused multiply-adds by all threads ({threads:.0f}), {rate:.0f} GFLOP/s. "
        "What is quicker with one thread is shown with one, and of several ways to write it the quickest."
    )
    return "\n".join([*lines, "", said])


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


def race(folder: Path) -> str:
    rows = load(folder, "race", "make race")
    goals = sorted(int(key.removeprefix("work_to_")) for key in rows[0] if key.startswith("work_to_"))
    header = ["method", *(f"to {goal} %, {width:.0f} channels" for width in groups(rows, "width") for goal in goals)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, found in groups(rows, "estimator").items():
        cells = [
            reached([row for row in found if row["width"] == width], goal)
            for width in groups(rows, "width")
            for goal in goals
        ]
        lines.append(f"| {' | '.join([method(name).label, *cells])} |")
    return "\n".join(lines)


def reached(rows: Sequence[Row], goal: int) -> str:
    """Medians over seeds of work and seconds, from the runs of the least budget in which half got there."""
    for _, runs in sorted(groups(rows, "times").items()):
        works, seconds = (
            sorted(math.inf if row[f"{what}_to_{goal}"] is None else row[f"{what}_to_{goal}"] for row in runs)
            for what in ("work", "seconds")
        )
        if works[len(runs) // 2] < math.inf:
            took = seconds[len(runs) // 2]
            return f"{works[len(runs) // 2] / 1e6:.1f} M" + (f", {took:.1f} s" if took < math.inf else "")
    return "–"


def novel(folder: Path) -> str:
    """Accuracy on classes that training has not seen."""
    lines = [
        "| 5-way 5-shot on classes that training has not seen | | meta-test accuracy | processor time |",
        "|---|---|---|---|",
    ]
    for table, data in (("novel_classes", "shapes1d"), ("novel_omniglot", "Omniglot, Conv4")):
        for row in load(folder, table, "python benchmarks/novel_classes.py"):
            told = str(row["method"])
            if "untrained" in told:
                continue
            name = method(told).label if told in METHODS else "the support set alone"
            took = f"{row['cpu_seconds']:.0f} s" if row["steps"] else "–"
            accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_ci95']:.1f} %"
            lines.append(f"| {data} | {name} | {accuracy} | {took} |")
    return "\n".join(lines)


UNSEEN = {
    "novel_shapes1d": "shapes1d, 5-way",
    "novel_mnist1d": "MNIST-1D, 2-way",
    "novel_digits": "handwritten digits, 2-way",
}


def unseen(folder: Path) -> str:
    """Accuracy on classes that training has not seen, at settings that were tuned for others; of the data sets that
    were measured. Raises Missing where none was."""
    there = [name for name in UNSEEN if (folder / f"{name}.csv").exists()] or [next(iter(UNSEEN))]
    found = {name: groups(load(folder, name), "estimator") for name in there}
    header = " | ".join(UNSEEN[name] for name in there)
    lines = [f"| 5-shot, classes that training has not seen | {header} |", "|---" * (len(there) + 1) + "|"]
    for name in found[there[0]]:
        cells = [
            over_choices(settings(folder, table)["dataset.ways"], rows[name]) if name in rows else "–"
            for table, rows in found.items()
        ]
        lines.append(f"| {method(name).label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_choices(ways: int, rows: list[Row]) -> str:
    """Mean accuracy of one method and its interval over rotations of classes, where there are some, else over seeds; a
    run that stopped counts at chance."""
    by_choice = groups(rows, "dataset.rotation" if "dataset.rotation" in rows[0] else "seed")
    means = [statistics.fmean(counted(row, 100 / ways) for row in each) for each in by_choice.values()]
    mean, half = interval(means)
    ended = sum(map(stopped, rows))
    said = f"{mean:.1f} ± {half:.1f} %" if len(means) > 1 else f"{mean:.1f} %, one seed"
    return said + f" ({ended} of {len(rows)} stopped)" * bool(ended)


def conv4(folder: Path) -> str:
    """Time of Conv4's meta-gradients, by the kernel and by loops."""
    rows = load(folder, "bench_conv4", "python benchmarks/conv4.py")
    about = json.loads((folder / "bench_conv4.json").read_text())
    rows = [{"tasks": about["tasks"]} | row for row in rows]
    labels = {
        "symmetric": "symmetric, this library",
        "loop_symmetric": "symmetric, a loop over tasks by torch's autograd",
        "loop_maml": "MAML, a loop over tasks by torch's autograd",
        "higher_maml": "MAML by higher, a loop over tasks",
    }
    counts = [*groups(rows, "tasks")]
    header = [f"{count:.0f} tasks, processor time | times ours" for count in counts]
    lines = [
        f"| one meta-gradient, Conv4 of 64 channels | {' | '.join(header)} |",
        "|---" * (2 * len(counts) + 1) + "|",
    ]
    for name, found in groups([row for row in rows if row["threads"] == 1], "method").items():
        cells = [
            f"{1000 * row['cpu_seconds_median']:.0f} ms | {row['cpu_seconds_median_over_ours']:.2f}" for row in found
        ]
        lines.append(f"| {labels[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(folder: Path) -> str:
    """Accuracy by estimator, λ, clip of each task's meta-gradient, and outer optimizer."""
    found = at_the_better_rate(parts_of(folder))
    common = settings(folder, f"parts_{next(iter(OPTIMIZERS))}")
    lines = [
        f"Mean test accuracy and 95 % interval over seeds, in per cent, after {common['steps']} meta-steps of "
        f"{common['meta_batch']} tasks, {common['solver.steps']} inner steps on all examples; a run that stopped is at "
        f"{CHANCE:g}, how many did is in brackets.",
        "",
        f"| | {' | '.join(PANELS.values())} |",
        "|---" * (len(PANELS) + 1) + "|",
    ]
    for name, lam in kinds(found):
        cells = []
        for optimizer, clip in PANELS:
            rows = found[optimizer, clip, name, lam]
            mean, half = interval([*points(rows).values()])
            ended = sum(map(stopped, rows))
            cells.append(f"{mean:.1f} ± {half:.1f}" + f" ({ended} of {len(rows)})" * bool(ended))
        lines.append(f"| {method(name).label}, λ = {lam:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


OPTIMIZERS = {"sngdm": "SNGDM", "adam": "Adam"}
CLIPS = {None: "", 1.0: ", tasks clipped"}
PANELS = {(optimizer, clip): OPTIMIZERS[optimizer] + CLIPS[clip] for optimizer in OPTIMIZERS for clip in CLIPS}
PARTS = ("", "_zero", "_damped")
Setting = tuple[str, float | None, str, float]
"""Outer optimizer, clip, estimator and λ."""


def parts_of(folder: Path) -> list[Row]:
    """The runs of estimators by optimizers, from their tables; iMAML with its authors' damping, where it was measured,
    by a name of its own. Raises Missing."""
    damped = all((folder / f"parts_{name}_damped.csv").exists() for name in OPTIMIZERS)
    return [
        row | {"estimator": row["estimator"] + "_damped" * (part == "_damped")}
        for name in OPTIMIZERS
        for part in PARTS[: 2 + damped]
        for row in load(folder, f"parts_{name}{part}")
    ]


def at_the_better_rate(rows: list[Row]) -> dict[Setting, list[Row]]:
    """Of each setting the runs with the outer rate whose mean validation accuracy is higher; one that stopped is at
    chance."""
    found: dict[Setting, list[Row]] = groups(rows, "optimizer", "task_clip", "estimator", "estimator.lam")

    def validation(tried: list[Row]) -> float:
        return statistics.fmean(CHANCE / 100 if stopped(row) else row["val/accuracy"] for row in tried)

    return {setting: max(groups(tried, "optimizer.lr").values(), key=validation) for setting, tried in found.items()}


def kinds(found: Iterable[Setting]) -> list[tuple[str, float]]:
    """Estimators in the order of methods, each by its λ."""
    order = list(METHODS)
    return sorted({(name, lam) for *_, name, lam in found}, key=lambda kind: (order.index(kind[0]), kind[1]))


TABLES = {
    "accuracy": accuracy,
    "race": race,
    "speed": speed,
    "gpu": gpu,
    "novel": novel,
    "unseen": unseen,
    "conv4": conv4,
    "parts": parts,
}


def pages(folder: Path) -> dict[Path, str]:
    """Files that have tables between marks, with their tables as they are in ``folder``."""
    return {path: MARK.sub(lambda found: _marked(found[1], folder), path.read_text("utf-8")) for path in FILES}


def _marked(name: str, folder: Path) -> str:
    return f"<!-- table:{name} -->\n{TABLES[name](folder)}\n<!-- end -->"


def write(folder: Path) -> None:
    for path, text in pages(folder).items():
        write_text(path, text)


def main() -> None:
    try:
        if "--check" not in sys.argv:
            write(RESULTS)
        elif wrong := [path for path, text in pages(RESULTS).items() if text != path.read_text("utf-8")]:
            sys.exit(f"error: {', '.join(map(os.path.relpath, wrong))} differs from results/: make figures")
    except Missing as missing:
        sys.exit(f"error: {missing}")


if __name__ == "__main__":
    main()
