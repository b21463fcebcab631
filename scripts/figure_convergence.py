"""Draws convergence.png and .pdf: the norm of the exact meta-gradient along training, without and with noise in the
tasks, where it levels off, and how many meta-steps it takes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing import FIT, LABEL_PT, Row, draw_alone, groups, label_ends, load, logarithmic, save, short, style
from figure_bias import AUTO
from figure_optimizers import LOOKS
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, NullFormatter

from fobmaml.run.plotting import new_figure

NORM = "bias/exact_norm"
OPTIMIZERS = ("sgd", "clipped_sgd", "sngdm")
LAST = 5
"""Measurements whose root mean square is a floor."""
EPSILONS = [0.1 * 2 ** (-place / 2) for place in range(16)]
RESOLVED = 5
"""Measurements that it takes at least until ε for it to count, since there is nothing between two."""


def lowest(rows: Sequence[Row]) -> tuple[float, dict[float, float]]:
    """Of one method's runs: the rate whose geometric mean of final norms is the least, and each seed's norm with it. A
    run that stopped ends at infinity."""
    ends = {
        rate: {row["seed"]: row[NORM] if row["status"] == "completed" else math.inf for row in of}
        for rate, of in groups(rows, "optimizer.lr").items()
    }
    rate = min(ends, key=lambda rate: sum(map(math.log, ends[rate].values())) / len(ends[rate]))
    return rate, ends[rate]


def floors(rows: Sequence[Row]) -> dict[float, float]:
    """Of each seed, where the norm levels off."""
    return {
        seed: math.sqrt(statistics.fmean(row[NORM] ** 2 for row in sorted(of, key=lambda row: row["step"])[-LAST:]))
        for seed, of in groups(rows, "seed").items()
    }


def steps_to(rows: Sequence[Row]) -> Mapping[float, Sequence[float]]:
    """Of each ε that every seed reaches, and not at once, each seed's meta-steps until ‖∇F‖ ≤ ε, with the rate of which
    their mean is the least."""
    by_rate = [[*groups(of, "seed").values()] for of in groups(rows, "optimizer.lr").values()]
    every = min(row["step"] for row in rows if row["step"])
    found = {}
    for epsilon in EPSILONS:
        reached = [
            [min((row["step"] for row in run if row[NORM] <= epsilon), default=math.inf) for run in runs]
            for runs in by_rate
        ]
        best = min(reached, key=sum)
        if math.isfinite(sum(best)) and min(best) >= RESOLVED * every:
            found[epsilon] = best
    return found


def plain(axis: Axis, ticks: Sequence[float]) -> None:
    """On less than two decades."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_fixed(ax: Axes, folder: Path) -> None:
    rows = [row for row in load(folder, "convergence_curves") if row[NORM] is not None]
    for name, found in groups(rows, "estimator").items():
        look = style(name, markevery=5, label=short(name))
        ax.plot([row["step"] for row in found], [row[NORM] for row in found], **look)
    ax.set_xlabel("meta-step t")
    ax.set_ylabel("‖∇F(θₜ)‖")
    ax.set_title("(a) all of 16 tasks, gradient descent", fontsize=8)


def draw_noise(ax: Axes, folder: Path) -> None:
    """Of each outer optimizer and method a point a seed."""
    rows = load(folder, "convergence_noise", columns=("optimizer.lr",))
    for place, optimizer in enumerate(OPTIMIZERS):
        for shift, name in enumerate(("symmetric", "fomaml", "reptile")):
            found = [row for row in rows if row["optimizer"] == optimizer and row["estimator"] == name]
            ends = lowest(found)[1].values()
            look = style(name, linestyle="none", alpha=0.7, label=None if place else short(name))
            ax.plot([place + 0.25 * (shift - 1)] * len(ends), [*ends], **look)
    ax.set_xticks(range(len(OPTIMIZERS)), [LOOKS[name][0] for name in OPTIMIZERS])
    ax.set_xlim(-0.5, len(OPTIMIZERS) - 0.5)
    ax.set_ylabel("‖∇F(θ)‖ at the end")
    plain(ax.yaxis, [0.005, 0.01, 0.02, 0.04])
    ax.legend(fontsize=LABEL_PT, loc="center", bbox_to_anchor=(0.5, 0.68), ncols=3, columnspacing=0.8, handletextpad=0)
    ax.set_title("(b) 8 of 64 tasks a meta-step", fontsize=8)


def draw_floors(ax: Axes, folder: Path) -> None:
    rows = [row for row in load(folder, "convergence_floor_curves", columns=("seed",)) if row[NORM] is not None]
    deltas = sorted({row["solver.delta"] for row in rows})
    for nu, of_nu in groups(rows, "estimator.nu").items():
        found = [floors([row for row in of_nu if row["solver.delta"] == delta]) for delta in deltas]
        means = [statistics.geometric_mean(at.values()) for at in found]
        auto = nu == AUTO
        look: Row = {"color": style("symmetric")["color"] if auto else "#777777", "markersize": 3.5, "alpha": 0.7}
        ax.plot(deltas, means, linewidth=1.5 if auto else 0.8, color=look["color"])
        for delta, at in zip(deltas, found, strict=True):
            ax.plot([delta] * len(at), [*at.values()], marker="o" if auto else ".", linestyle="none", **look)
        label, end = f"ν = {nu}" if auto else f"{nu:g}", (deltas[-1], means[-1])
        ax.annotate(label, end, (4, 0), textcoords="offset points", fontsize=LABEL_PT, va="center", color=look["color"])
        if auto:
            theory = [0.4 * means[0] * (delta / deltas[0]) ** (2 / 3) for delta in deltas]
            ax.plot(deltas, theory, color="#000000", **FIT)
            ax.annotate("δ$^{2/3}$", (deltas[-1], theory[-1]), (4, 0), textcoords="offset points", fontsize=LABEL_PT)
    logarithmic(ax, deltas)
    ax.set_xlim(right=8 * deltas[-1])
    ax.set_xlabel("inner precision δ")
    ax.set_ylabel("floor of ‖∇F‖")
    ax.set_title("(c) where symmetric levels off, by ν", fontsize=8)


def draw_steps(ax: Axes, folder: Path) -> None:
    rows = [row for row in load(folder, "convergence_rates_curves", columns=("optimizer.lr",)) if row[NORM] is not None]
    for optimizer, of in groups(rows, "optimizer").items():
        found, (label, colour, marker) = steps_to(of), LOOKS[optimizer]
        look: Row = {"color": colour, "marker": marker, "markersize": 3.5, "alpha": 0.7}
        for epsilon, at in found.items():
            ax.plot([epsilon] * len(at), at, linestyle="none", **look)
        ax.plot([*found], [statistics.fmean(at) for at in found.values()], color=colour, linewidth=1.0, label=label)
    ax.set_xscale("log")
    ax.invert_xaxis()
    plain(ax.xaxis, [0.03, 0.02, 0.01])
    plain(ax.yaxis, [100, 200, 400, 800])
    ax.legend(fontsize=LABEL_PT)
    ax.set_xlabel("ε")
    ax.set_ylabel("meta-steps until ‖∇F‖ ≤ ε")
    ax.set_title("(d) the same, by symmetric, constant rates", fontsize=8)


def draw(folder: Path) -> None:
    figure, axes = new_figure(columns=2, width_in=7.0, height_in=5.2, rows=2)
    for ax, panel in zip(axes, (draw_fixed, draw_noise, draw_floors, draw_steps), strict=True):
        ax.set_yscale("log")
        panel(ax, folder)
    label_ends(figure, axes[0])
    save(figure, folder, "convergence")


if __name__ == "__main__":
    draw_alone(draw)
