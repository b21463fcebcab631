"""Draws optimizers.png and .pdf: final validation loss and share of failed runs by learning rate, outer optimizers."""

import math
from pathlib import Path

from drawing import Row, draw_alone, groups, legend_below, load, logarithmic, save

from fobmaml.run.plotting import new_figure

LOOKS = {
    "sgd": ("SGD", "#E69F00", "^"),
    "clipped_sgd": ("clipped SGD", "#009E73", "D"),
    "sngdm": ("SNGDM", "#0072B2", "o"),
    "adam": ("Adam", "#000000", "s"),
}


def draw(folder: Path) -> None:
    rows = load(folder, "optimizers", columns=("optimizer", "optimizer.lr"))
    chance = math.log(5)
    figure, (left, right) = new_figure(columns=2, width_in=7.0, height_in=2.9)
    for name, found in groups(rows, "optimizer").items():
        label, colour, marker = LOOKS[name]
        look: Row = {"color": colour, "marker": marker, "label": label, "linewidth": 1.0, "markersize": 4.0}
        by_rate = dict(sorted(groups(found, "optimizer.lr").items()))
        ended = {rate: [row["val/loss"] for row in at if row["status"] == "completed"] for rate, at in by_rate.items()}
        drawn = {rate: sorted(losses) for rate, losses in ended.items() if losses}
        middle = [losses[len(losses) // 2] for losses in drawn.values()]
        left.plot(list(drawn), middle, **look)
        left.fill_between(
            list(drawn),
            [losses[0] for losses in drawn.values()],
            [losses[-1] for losses in drawn.values()],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        failed = [
            100 * sum(row["status"] != "completed" or row["val/loss"] > 1.01 * chance for row in at) / len(at)
            for at in by_rate.values()
        ]
        right.plot(list(by_rate), failed, **look)
    left.axhline(chance, color="#777777", linewidth=0.8, linestyle="--", label="guessing")
    left.set_ylabel("final validation loss (nats)")
    left.set_ylim(0.8, 2.0)
    left.set_title("median and range over seeds", fontsize=8)
    right.set_ylabel("runs that diverged (%)")
    right.set_title("stopped, or ended 1 % worse than guessing", fontsize=8)
    for ax in (left, right):
        logarithmic(ax, [row["optimizer.lr"] for row in rows])
        ax.set_xlabel("learning rate")
    legend_below(figure, [left, right], 5)
    save(figure, folder, "optimizers")


if __name__ == "__main__":
    draw_alone(draw)
