"""Draws smoothness.png and .pdf: local smoothness of F against the norm of its gradient, along training."""

from pathlib import Path

import numpy as np
from drawing import draw_alone, load, save
from matplotlib.ticker import LogLocator, NullFormatter
from statistics_of_runs import slope

from fobmaml.run.plotting import method, new_figure


def draw(folder: Path) -> None:
    tables = [
        ("(a) MNIST-1D, CNN, MAML's objective", load(folder, "smoothness_curves"), "maml"),
        ("(b) logistic tasks, proximal objective", load(folder, "smoothness_logistic_curves"), "exact"),
    ]
    figure, axes = new_figure(columns=2, width_in=7.0, height_in=2.8)
    for ax, (title, rows, name) in zip(axes, tables, strict=True):
        points = [
            (row["smoothness/gradient_norm"], row["smoothness/local"])
            for row in rows
            if row["smoothness/local"] is not None
        ]
        norms, local = zip(*points, strict=True)
        power, half, intercept = slope(norms, local)
        ax.scatter(norms, local, s=6, color=method(name).colour, alpha=0.5, linewidth=0, label="along training")
        x = np.array([min(norms), max(norms)])
        ax.plot(x, 10**intercept * x**power, color="#D55E00", linewidth=1.2, label=f"power {power:.2f} ± {half:.2f}")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(min(local) / 4, max(local) * 6)
        if max(norms) < 10 * min(norms):
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        ax.set_title(f"{title} ({len(points)} points)", fontsize=8)
        ax.set_xlabel("‖∇F(θ)‖")
        ax.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("‖∇F(θ + d) − ∇F(θ)‖ / ‖d‖")
    save(figure, folder, "smoothness")


if __name__ == "__main__":
    draw_alone(draw)
