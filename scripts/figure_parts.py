"""Draws parts.png and .pdf: test accuracy by estimator, λ, clip of each task's meta-gradient, and outer optimizer."""

from pathlib import Path

from drawing import draw_alone, save, short
from figure_accuracy import MEAN, every_run
from statistics_of_runs import CHANCE, interval
from tables import PANELS, at_the_better_rate, kinds, parts_of, points

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    found = at_the_better_rate(parts_of(folder))
    shown = kinds(found)[::-1]
    figure, axes = new_figure(columns=len(PANELS), width_in=7.0, height_in=4.2)
    for ax, ((optimizer, clip), title) in zip(axes, PANELS.items(), strict=True):
        for place, (name, lam) in enumerate(shown):
            rows = found[optimizer, clip, name, lam]
            every_run(ax, rows, place)
            mean, half = interval([*points(rows).values()])
            ax.errorbar(mean, place, xerr=half, **MEAN | {"markersize": 7})
        for place in range(1, len(shown)):
            if shown[place][0] != shown[place - 1][0]:
                ax.axhline(place - 0.5, color="#BBBBBB", linewidth=0.6)
        ax.axvline(CHANCE, color="#777777", linewidth=0.8, linestyle=":")
        ax.set_title(title, fontsize=8)
        ax.set_xlim(15, 90)
        ax.set_xticks([20, 40, 60, 80])
        ax.set_ylim(-0.6, len(shown) - 0.4)
        labels = [f"{short(name)}, λ = {lam:g}" for name, lam in shown]
        ax.set_yticks(range(len(shown)), labels if ax is axes[0] else [])
    figure.supxlabel("test accuracy (%)", fontsize=9)
    save(figure, folder, "parts")


if __name__ == "__main__":
    draw_alone(draw)
