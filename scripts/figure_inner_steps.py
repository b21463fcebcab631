"""Draws inner_steps.png and .pdf: test accuracy by inner steps, symmetric and MAML."""

from pathlib import Path

from drawing import draw_alone, groups, load, logarithmic, save, style
from statistics_of_runs import interval

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    rows = [
        row for row in load(folder, "inner_steps", columns=("seed", "solver.steps")) if row["test/accuracy"] is not None
    ]
    figure, (ax,) = new_figure(height_in=2.6)
    for name, found in groups(rows, "estimator").items():
        by_steps = dict(sorted(groups(found, "solver.steps").items()))
        bands = [interval([100 * row["test/accuracy"] for row in at]) for at in by_steps.values()]
        ax.errorbar(
            list(by_steps), [mean for mean, _ in bands], yerr=[half for _, half in bands], capsize=2, **style(name)
        )
    logarithmic(ax, [row["solver.steps"] for row in rows])
    ax.set_xlabel("inner steps K")
    ax.set_ylabel("meta-test accuracy (%)")
    ax.set_title(f"mean and 95 % interval over {len({row['seed'] for row in rows})} seeds", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    save(figure, folder, "inner_steps")


if __name__ == "__main__":
    draw_alone(draw)
