"""Draws inner_steps.png and .pdf: test accuracy by inner steps, symmetric and MAML, every run a point."""

from pathlib import Path
from statistics import fmean

from drawing import draw_alone, groups, label_ends, load, logarithmic, save, style
from figure_memory_accuracy import draw_accuracies
from matplotlib.ticker import MaxNLocator
from tables import counted

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    rows = load(folder, "inner_steps", columns=("seed", "solver.steps"))
    figure, (ax,) = new_figure(width_in=4.5, height_in=2.6)
    by_method = groups(rows, "estimator")
    for place, (name, found) in enumerate(by_method.items()):
        beside = 1.04 ** (2 * place - len(by_method) + 1)
        by_steps = {steps * beside: at for steps, at in sorted(groups(found, "solver.steps").items())}
        for steps, at in by_steps.items():
            draw_accuracies(ax, name, steps, at, label=None)
        means = [fmean(map(counted, at)) for at in by_steps.values()]
        ax.plot(list(by_steps), means, **style(name, marker=None))
    logarithmic(ax, [row["solver.steps"] for row in rows])
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    ax.set_xlabel("inner steps K")
    ax.set_ylabel("meta-test accuracy (%)")
    ax.set_title("every run a point; lines through the means", fontsize=8)
    label_ends(figure, ax)
    save(figure, folder, "inner_steps")


if __name__ == "__main__":
    draw_alone(draw)
