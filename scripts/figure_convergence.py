"""Draws convergence.png and .pdf: the norm of the exact meta-gradient along training by each method."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing import Row, draw_alone, groups, label_ends, load, save, style

from fobmaml.run.plotting import new_figure

NORM = "bias/exact_norm"
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


def draw(folder: Path) -> None:
    rows = [row for row in load(folder, "convergence_curves") if row["bias/exact_norm"] is not None]
    figure, (ax,) = new_figure(width_in=4.5, height_in=2.8)
    for name, found in groups(rows, "estimator").items():
        ax.plot([row["step"] for row in found], [row["bias/exact_norm"] for row in found], **style(name, markevery=5))
    ax.set_yscale("log")
    ax.set_xlabel("meta-step t")
    ax.set_ylabel("‖∇F(θₜ)‖")
    ax.set_title("logistic tasks, gradient descent on fixed tasks", fontsize=8)
    label_ends(figure, ax)
    save(figure, folder, "convergence")


if __name__ == "__main__":
    draw_alone(draw)
