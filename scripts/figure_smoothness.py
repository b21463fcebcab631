"""Draws smoothness.png and .pdf: local smoothness of F against the norm of its gradient along training, run by run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from drawing import FIT, LABEL_PT, draw_alone, groups, load, save
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.optimize import least_squares
from statistics_of_runs import slope

from fobmaml.run.plotting import new_figure

TABLES = {"smoothness": "MNIST-1D, CNN, MAML's objective", "smoothness_logistic": "logistic tasks, proximal objective"}


def fitted(norms: Sequence[float], local: Sequence[float]) -> tuple[float, float]:
    """L₀ and L₁ ≥ 0 of L₀ + L₁‖∇F‖, by least squares of logarithms: local smoothness goes over decades."""
    g, logarithms, least = np.array(norms), np.log(local), 1e-6 * min(local)
    start = float(np.median(local)), float(np.median(local) / np.median(g))
    fit = least_squares(
        lambda parts: np.log(parts[0] + parts[1] * g) - logarithms, start, bounds=((least, 0), np.inf), x_scale=start
    )
    zero, one = map(float, fit.x)
    return (zero if zero > 2 * least else 0.0), one


def draw(folder: Path) -> None:
    curves = {
        name: groups([row for row in load(folder, f"{name}_curves") if row["smoothness/local"] is not None], "run")
        for name in TABLES
    }
    ends = {(name, row["run"]): row for name in TABLES for row in load(folder, name)}
    columns = max(map(len, curves.values()))
    figure, axes = new_figure(columns, 7.0, 4.4, rows=len(TABLES), sharex="row", sharey="row")
    last = max(row["step"] for runs in curves.values() for run in runs.values() for row in run)
    for line, (name, runs) in enumerate(curves.items()):
        for place, (run, rows) in enumerate(runs.items()):
            ax = axes[columns * line + place]
            norms, local = ([row[f"smoothness/{key}"] for row in rows] for key in ("gradient_norm", "local"))
            power, zero, one = slope(norms, local)[0], *fitted(norms, local)
            points = ax.scatter(norms, local, c=[row["step"] for row in rows], s=7, cmap="viridis", vmin=0, vmax=last)
            span = np.geomspace(min(norms), max(norms))
            ax.plot(span, zero + one * span, color="#D55E00", **FIT)
            end = ends[name, run]
            stopped = "" if end["status"] == "completed" else f"\nstopped after\nstep {end['step']:.0f}"
            said = f"power {power:.2f}\nL₀ {zero:.2g}, L₁ {one:.2g}{stopped}"
            ax.text(0.03, 0.97, said, fontsize=LABEL_PT, transform=ax.transAxes, va="top", in_layout=False)
            ax.set_xscale("log")
            ax.set_yscale("log")
            title = f"({'ab'[line]}) {TABLES[name]}\n" if place == columns // 2 else ""
            ax.set_title(f"{title}seed {rows[0]['seed']:.0f}", fontsize=8)
            ax.set_xlabel("‖∇F(θ)‖")
        first = axes[columns * line]
        low, high = first.get_ylim()
        first.set_ylim(low, high * (high / low) ** 0.2)
        first.set_ylabel("‖∇F(θ + d) − ∇F(θ)‖ / ‖d‖")
        for axis, (least, most) in ((first.xaxis, first.get_xlim()), (first.yaxis, first.get_ylim())):
            if most < 20 * least:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
    bar = figure.colorbar(points, ax=axes, label="meta-step", shrink=0.5, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.label.set_fontsize(8)
    save(figure, folder, "smoothness")


if __name__ == "__main__":
    draw_alone(draw)
