"""Draws memory.png and .pdf: peak memory of one task's meta-gradient by width, inner steps and depth."""

from pathlib import Path

from drawing import draw_alone, groups, legend_below, load, logarithmic, save, style

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    width, steps, depth = load(folder, "memory"), load(folder, "memory_steps"), load(folder, "memory_depth")
    longest = max((row["solver.steps"] for row in width if "solver.steps" in row), default=None)
    width = [row for row in width if row.get("solver.steps") == longest]
    figure, axes = new_figure(columns=3, width_in=7.0, height_in=3.4)
    for ax, rows, key in zip(axes, (width, steps, depth), ("width", "solver.steps", "depth"), strict=True):
        for name, found in groups(rows, "estimator").items():
            found = sorted(found, key=lambda row: row[key])
            ax.plot([row[key] for row in found], [row["memory/peak_bytes"] / 1e6 for row in found], **style(name))
        logarithmic(ax, [row[key] for row in rows] if key != "depth" else None, y=True)
    axes[0].set_xlabel("channels")
    axes[0].set_title(f"(a) {longest or 10:.0f} inner steps", fontsize=8)
    axes[1].set_xlabel("inner steps")
    axes[1].set_title("(b) 64 channels", fontsize=8)
    axes[2].set_xlabel("convolutions")
    axes[2].set_xticks(sorted({row["depth"] for row in depth}))
    axes[2].xaxis.set_major_formatter("{x:g}")
    axes[2].set_title("(c) 64 channels, 10 inner steps", fontsize=8)
    axes[0].set_ylabel("peak memory, one task (MB)")
    legend_below(figure, axes, 3)
    save(figure, folder, "memory")


if __name__ == "__main__":
    draw_alone(draw)
