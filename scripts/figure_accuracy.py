"""Draws accuracy.png and .pdf: test accuracy of every run with as many meta-steps and with as much work, and validation
accuracy by work, every method."""

import statistics
from pathlib import Path
from typing import Literal

import numpy as np
from drawing import Row, draw_alone, groups, load, save, style
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from statistics_of_runs import CHANCE
from tables import Comparison, accuracy_interval, comparisons, points, stopped, work

from fobmaml.run.plotting import method, new_figure

CURVES = ("accuracy_curves", "accuracy_budget_curves")
MEAN: Row = {"color": "#D62728", "capsize": 2.5, "elinewidth": 1.0, "marker": "|", "markersize": 9, "zorder": 3}
"""Of the bars of means and their intervals."""


def draw(folder: Path) -> None:
    compared = comparisons(folder)
    names = list(reversed(compared[0].methods()))
    figure, (*axes, right) = new_figure(columns=len(compared) + 1, width_in=7.0, height_in=3.4)
    for ax, each in zip(axes, compared, strict=True):
        each_run(ax, each, names)
        ax.set_title(each.heading, fontsize=8)
        ax.set_yticks(range(len(names)), [method(name).label for name in names] if ax is axes[0] else [])
    along_the_way(right, load(folder, CURVES[len(compared) - 1], columns=("work/example_gradients",)))
    right.set_title("median run by its work so far", fontsize=8)
    save(figure, folder, "accuracy")


def each_run(ax: Axes, compared: Comparison, names: list[str]) -> None:
    """A point a run; a bar for the mean and its interval."""
    for name, found in compared.methods().items():
        place = names.index(name)
        every_run(ax, found, place)
        mean, half = accuracy_interval(found, compared.examples)
        ax.errorbar(mean, place, xerr=half, **MEAN)
    ax.axvline(CHANCE, color="#777777", linewidth=0.8, linestyle=":")
    by_error(ax, "x")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel("test accuracy (%)")


def every_run(ax: Axes, rows: list[Row], place: float) -> None:
    """A point a run of one method, at heights about ``place`` by its seed; a cross at chance for one that stopped."""
    look = method(rows[0]["estimator"])
    accuracies, whole = points(rows), {row["seed"]: not stopped(row) for row in rows}
    for number, (seed, accuracy) in enumerate(sorted(accuracies.items())):
        ax.plot(
            accuracy,
            place + 0.3 * (2 * number / max(len(accuracies) - 1, 1) - 1),
            marker=look.marker if whole[seed] else "x",
            color=look.colour,
            markersize=3.0 if whole[seed] else 5.0,
            alpha=0.6 if whole[seed] else 1.0,
            markeredgewidth=0.6 if whole[seed] else 1.2,
            linestyle="none",
        )


def by_error(ax: Axes, which: Literal["x", "y"]) -> None:
    """An axis of accuracies in per cent, by the logarithm of their error: 90 is as far from 80 as 95 is from 90."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    scale, limits = (ax.set_xscale, ax.set_xlim) if which == "x" else (ax.set_yscale, ax.set_ylim)
    scale("function", functions=(lambda of: -np.log(np.maximum(100.0 - of, 1e-3)), lambda to: 100.0 - np.exp(-to)))
    limits(10.0, 98.5)
    axis.set_major_locator(FixedLocator([20, 60, 80, 90, 95, 98]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def along_the_way(ax: Axes, rows: list[Row]) -> None:
    """The median of the runs at each validation; one that diverged is at chance from then on."""
    for name, found in groups([row for row in rows if row["val/accuracy"] is not None], "estimator").items():
        runs, curve = len(groups(found, "run")), []
        for step, at in sorted(groups(found, "step").items()):
            known = [100 * row["val/accuracy"] for row in at]
            middle = statistics.median([*known, *[CHANCE] * (runs - len(known))])
            if step:  # no zero on a logarithmic axis
                curve.append((statistics.median(map(work, at)) / 1e6, middle))
        ax.plot(*zip(*curve, strict=True), **style(name, markevery=0.2, markersize=3.0))
    ax.axhline(CHANCE, color="#777777", linewidth=0.8, linestyle=":")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    by_error(ax, "y")
    ax.set_xlabel("million example-gradients")
    ax.set_ylabel("validation accuracy (%)")


if __name__ == "__main__":
    draw_alone(draw)
