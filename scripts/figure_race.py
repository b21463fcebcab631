"""Draws race.png and .pdf: validation accuracy by example-gradients and by seconds, each method at its best."""

from pathlib import Path
from statistics import median

from drawing import Row, draw_alone, groups, legend_below, load, save, style
from matplotlib.ticker import StrMethodFormatter

from fobmaml.run.plotting import new_figure

GOALS = (90, 95, 97)


def draw(folder: Path) -> None:
    rows = [row for row in load(folder, "race_curves", "make race") if row["times"] == 1]
    widths = groups(rows, "width")
    figure, axes = new_figure(columns=2 * len(widths), width_in=7.0, height_in=3.0)
    for place, (width, found) in enumerate(sorted(widths.items())):
        for ax, column, unit in zip(
            axes[2 * place : 2 * place + 2],
            ("work", "seconds"),
            ("million example-gradients", "seconds of training"),
            strict=True,
        ):
            for name, runs in groups([row for row in found if row[column] is not None], "estimator").items():
                curve = [middle(at, column) for at in groups(runs, "number").values()]
                ax.plot(*zip(*curve, strict=True), **style(name, markevery=0.2))
            ax.set_xscale("log")
            ax.set_xlabel(unit)
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.set_ylim(50, 100)
            for goal in GOALS:
                ax.axhline(goal, color="#777777", linewidth=0.6, linestyle=":")
            ax.set_title(f"{width:.0f} channels", fontsize=8)
    axes[0].set_ylabel("validation accuracy (%)")
    legend_below(figure, axes, 4)
    save(figure, folder, "race")


def middle(rows: list[Row], column: str) -> tuple[float, float]:
    scale = 1e6 if column == "work" else 1.0
    return median(row[column] / scale for row in rows), 100 * median(row["accuracy"] for row in rows)


if __name__ == "__main__":
    draw_alone(draw)
