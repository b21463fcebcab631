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
    figure, axes = new_figure(len(steps), 7.0, 1.4 * len(by_size) + 0.6, rows=len(by_size), sharex=True, sharey=True)
    for line, size in enumerate(sorted(by_size)):
        beside = axes[len(steps) * line : len(steps) * (line + 1)]
        for ax, at in zip(beside, steps, strict=True):
            _panel(ax, [row for row in by_size[size] if row["solver.steps"] == at], x)
        beside[0].set_ylabel(title.format(*(size if isinstance(size, tuple) else [size])))
    for ax, at in zip(axes, steps, strict=False):
        ax.set_title(f"{at:g} inner steps", fontsize=8)
    for ax in axes[-len(steps) :]:
        ax.set_xlabel(label)
    figure.supylabel("peak memory, one task (MB)", fontsize=8)
    legend_below(figure, axes, 5)
    save(figure, folder, name)


def _panel(ax: Axes, rows: Sequence[Row], x: str) -> None:
    for name, found in groups(rows, "estimator").items():
        found = sorted(found, key=lambda row: row[x])
        ax.plot([row[x] for row in found], [row["memory/peak_bytes"] / 1e6 for row in found], **style(name))
    logarithmic(ax, [row[x] for row in rows], y=True)


if __name__ == "__main__":
    draw_alone(draw)
