"""Draws accuracy.png and .pdf: validation accuracy by meta-step and by training time, every method."""

from pathlib import Path

from drawing import draw_alone, groups, legend_below, load, save, style
from statistics_of_runs import interval

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    rows = [
        row
        for row in load(folder, "accuracy_curves", columns=("seed", "time/train_s"))
        if row["val/accuracy"] is not None
    ]
    figure, axes = new_figure(columns=2, width_in=7.0, height_in=3.1)
    seeds = sorted({len({row["seed"] for row in found}) for found in groups(rows, "estimator").values()})
    seeds = seeds if len(seeds) == 1 else [seeds[0], seeds[-1]]
    for name, found in groups(rows, "estimator").items():
        steps = groups(found, "step")
        bands = [interval([100 * row["val/accuracy"] for row in at]) for at in steps.values()]
        seconds = [sum(row["time/train_s"] for row in at) / len(at) for at in steps.values()]
        for ax, x, first in ((axes[0], list(steps), 0), (axes[1], seconds, 1)):  # no zero on a logarithmic axis
            low, middle, high = ([mean + sign * half for mean, half in bands][first:] for sign in (-1, 0, 1))
            ax.plot(x[first:], middle, **style(name, markevery=4))
            ax.fill_between(x[first:], low, high, color=style(name)["color"], alpha=0.15, linewidth=0)
    axes[0].set_xlabel("meta-step")
    axes[1].set_xlabel("seconds of training (one thread)")
    axes[1].set_xscale("log")
    axes[1].set_title("jobs side by side on two cores", fontsize=8)
    axes[0].set_ylabel("validation accuracy (%)")
    for ax in axes:
        ax.set_ylim(15, 100)
    axes[0].set_title(f"mean and 95 % interval over {' to '.join(map(str, seeds))} seeds", fontsize=8)
    legend_below(figure, axes, 4)
    save(figure, folder, "accuracy")


if __name__ == "__main__":
    draw_alone(draw)
