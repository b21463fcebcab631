"""Draws memory.png and .pdf: peak memory of one task's meta-gradient by width, inner steps and depth, on one scale."""

from pathlib import Path

from drawing import draw_alone, groups, label_ends, load, logarithmic, save, style

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    panels = [
        (f"{steps:g} inner steps", "width", "channels", rows)
        for steps, rows in sorted(groups(load(folder, "memory", columns=("solver.steps",)), "solver.steps").items())
    ]
    panels.append(("64 channels", "solver.steps", "inner steps", load(folder, "memory_steps")))
    panels.append(("10 inner steps", "depth", "convolutions of 64", load(folder, "memory_depth")))
    figure, axes = new_figure(columns=len(panels), width_in=7.0, height_in=3.2, sharey=True)
    for ax, letter, (title, key, label, rows) in zip(axes, "abcdefgh", panels, strict=False):
        for name, found in groups(rows, "estimator").items():
            found = sorted(found, key=lambda row: row[key])
            ax.plot([row[key] for row in found], [row["memory/peak_bytes"] / 1e6 for row in found], **style(name))
        logarithmic(ax, [row[key] for row in rows], y=True, apart=0.25)
        ax.set_title(f"({letter}) {title}", fontsize=8)
        ax.set_xlabel(label)
    axes[0].set_ylabel("peak memory, one task (MB)")
    label_ends(figure, axes[-1])
    save(figure, folder, "memory")


if __name__ == "__main__":
    draw_alone(draw)
