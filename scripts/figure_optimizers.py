"""Draws optimizers.png and .pdf: final validation loss by learning rate of each outer optimizer, every run a point, and
those that stopped."""

import math
from pathlib import Path
from statistics import median

from drawing import LABEL_PT, draw_alone, groups, load, logarithmic, save

from fobmaml.run.plotting import new_figure

LOOKS = {
    "sgd": ("SGD", "#E69F00", "^"),
    "clipped_sgd": ("clipped SGD", "#009E73", "D"),
    "sngdm": ("SNGDM", "#0072B2", "o"),
    "adam": ("Adam", "#000000", "s"),
}
NEAR = 0.15
"""How far from the least loss of all a run may end for its learning rate to count."""
STOPPED = 1.75
"""Where a run that stopped is drawn."""


def draw(folder: Path) -> None:
    rows = load(folder, "optimizers", columns=("optimizer", "optimizer.lr"))
    by_optimizer = groups(rows, "optimizer")
    least = min(row["val/loss"] for row in rows if row["val/loss"] is not None)
    figure, axes = new_figure(columns=len(by_optimizer), width_in=7.0, height_in=2.8, sharey=True)
    for ax, name in zip(axes, [each for each in LOOKS if each in by_optimizer], strict=True):
        title, colour, marker = LOOKS[name]
        ax.axhspan(0, least + NEAR, color="#777777", alpha=0.15, linewidth=0)
        ax.axhline(math.log(5), color="#777777", linewidth=0.8, linestyle=":")
        middle = {}
        for rate, at in sorted(groups(by_optimizer[name], "optimizer.lr").items()):
            dead = sum(row["status"] != "completed" for row in at)
            ended = [row["val/loss"] for row in at if row["status"] == "completed"]
            middle[rate] = median([*ended, *[math.inf] * dead])
            ax.plot(
                [rate] * len(ended), ended, color=colour, marker=marker, markersize=3.5, linestyle="none", alpha=0.7
            )
            if dead:
                ax.plot([rate], [STOPPED], color=colour, marker="x", markersize=5)
                ax.text(rate, STOPPED + 0.05, f"{dead}", fontsize=LABEL_PT, ha="center", va="bottom")
        ax.plot(list(middle), list(middle.values()), color=colour, linewidth=1.0)
        logarithmic(ax, [row["optimizer.lr"] for row in rows], apart=0.2)
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("learning rate")
    figure.suptitle(
        f"a point a run, lines through medians; ×: runs that stopped; grey: within {NEAR:g} of the least loss of all",
        fontsize=8,
    )
    axes[0].set_ylim(0.85, 1.9)
    axes[0].set_yticks([1.0, 1.2, 1.4, math.log(5), STOPPED], ["1.0", "1.2", "1.4", "guessing", "× stopped"])
    axes[0].set_ylabel("final validation loss (nats)")
    save(figure, folder, "optimizers")


if __name__ == "__main__":
    draw_alone(draw)
