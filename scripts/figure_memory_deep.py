"""Draws memory_deep.png and .pdf: peak memory of one task's meta-gradient by depth, width and inner steps together,
every panel on one scale."""

from collections.abc import Sequence
from pathlib import Path

from drawing import Row, draw_alone, groups, legend_below, load, logarithmic, save, style
from matplotlib.axes import Axes

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    draw_panels(folder, "memory_deep", ("depth",), "width", "channels", "{:g} convolutions")


def draw_panels(folder: Path, name: str, sizes: tuple[str, ...], x: str, label: str, title: str) -> None:
    """A panel for each of ``sizes`` and each number of inner steps, one below and beside the other."""
    rows = load(folder, name)
    by_size, steps = groups(rows, *sizes), sorted({row["solver.steps"] for row in rows})
    count = len(by_size)
    figure, _ = new_figure(columns=0, width_in=7.0, height_in=1.5 * count + 0.6)
    grid = figure.subplots(count, len(steps), sharex=True, sharey=True, squeeze=False)
    for line, size in zip(grid, sorted(by_size), strict=True):
        for ax, at in zip(line, steps, strict=True):
            _panel(ax, [row for row in by_size[size] if row["solver.steps"] == at], x)
        line[0].set_ylabel(title.format(*(size if isinstance(size, tuple) else [size])) + "\nMB", fontsize=8)
    for ax, at in zip(grid[0], steps, strict=True):
        ax.set_title(f"{at:g} inner steps", fontsize=8)
    for ax in grid[-1]:
        ax.set_xlabel(label, fontsize=8)
    legend_below(figure, list(grid.flat), 3)
    save(figure, folder, name)


def _panel(ax: Axes, rows: Sequence[Row], x: str) -> None:
    for name, found in groups(rows, "estimator").items():
        found = sorted(found, key=lambda row: row[x])
        ax.plot([row[x] for row in found], [row["memory/peak_bytes"] / 1e6 for row in found], **style(name))
    logarithmic(ax, [row[x] for row in rows], y=True)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3, linewidth=0.5)


if __name__ == "__main__":
    draw_alone(draw)
