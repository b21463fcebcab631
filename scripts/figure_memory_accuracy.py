"""Draws memory_accuracy.png and .pdf: test accuracy against the peak memory of a meta-gradient, every run a point."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from drawing import Row, draw_alone, groups, legend_below, load, save, style
from figure_accuracy import by_error
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from statistics_of_runs import CHANCE
from tables import counted, stopped

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    rows = load(folder, "accuracy", columns=("memory/peak_bytes",))
    figure, (ax,) = new_figure(width_in=5.0, height_in=3.8)
    for name, found in groups(rows, "estimator").items():
        measured = [row["memory/peak_bytes"] / 1e6 for row in found if row["memory/peak_bytes"]]
        if measured:
            draw_accuracies(ax, name, fmean(measured), found)
            mean = fmean(map(counted, found))
            ax.plot([fmean(measured)], [mean], color=style(name)["color"], marker="_", markersize=14)
    ax.axhline(CHANCE, color="#777777", linewidth=0.8, linestyle=":", label="guessing")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("peak memory of a meta-gradient (MB)")
    by_error(ax, "y")
    ax.set_ylabel("meta-test accuracy (%)")
    ax.set_title("every run a point (×: stopped, counted at chance); bars: means", fontsize=8)
    legend_below(figure, [ax], 2)
    save(figure, folder, "memory_accuracy")


def draw_accuracies(ax: Axes, name: str, x: float, runs: Sequence[Row], **look: Any) -> None:
    """A point a run; a cross at chance where it stopped."""
    points = {"linestyle": "none", "markersize": 3.5} | look
    crosses = points | {"marker": "x", "markersize": 6, "label": None}
    for dead, shape in ((False, points), (True, crosses)):
        found = [counted(row) for row in runs if stopped(row) == dead]
        ax.plot([x] * len(found), found, **style(name, **shape))


if __name__ == "__main__":
    draw_alone(draw)
