"""Draws bias.png and .pdf: bias by inner precision δ with ν=auto and at the best ν, with fitted powers, and by inner
steps."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import FIT, LABEL_PT, Row, draw_alone, groups, label_ends, load, logarithmic, save, short, style
from matplotlib.axes import Axes
from statistics_of_runs import slope
from verdicts import over_runs

from fobmaml.files import write_csv
from fobmaml.run.plotting import new_figure

THEORY = {"forward": "1/2", "symmetric": "2/3", "central4": "4/5"}


AUTO = "auto"
"""ν by a rule that does not know the bias."""
PROBLEMS = {"bias_delta": "logistic tasks", "bias_delta_cnn": "a CNN"}


def mean_error(rows: Sequence[Row]) -> float:
    """The geometric mean of the biases of some runs."""
    return statistics.geometric_mean(row["bias/relative_error"] for row in rows)


def of_nu(rows: Sequence[Row]) -> dict[float, float]:
    """Of each ν that was given, the mean bias of its seeds."""
    given = groups([row for row in rows if row["estimator.nu"] != AUTO], "estimator.nu")
    return {nu: mean_error(of) for nu, of in sorted(given.items())}


def best_nu(rows: Sequence[Row]) -> list[Row]:
    """Of each δ the rows of the ν with the least mean bias."""
    best = []
    for of in groups(rows, "solver.delta").values():
        errors = of_nu(of)
        nu = min(errors, key=lambda nu: errors[nu])
        best += [row for row in of if row["estimator.nu"] == nu]
    return best


def by_delta(rows: Sequence[Row]) -> dict[float, float]:
    """Of each δ the mean bias."""
    return {delta: mean_error(of) for delta, of in sorted(groups(rows, "solver.delta").items())}


def exponents(rows: Sequence[Row]) -> list[float]:
    """Of each seed, the power of δ with which its bias goes."""
    return [
        slope([row["solver.delta"] for row in of], [row["bias/relative_error"] for row in of])[0]
        for of in groups(rows, "seed").values()
    ]


def at_best_scale(row: Row) -> float:
    """min ‖c g − ∇F‖ / ‖∇F‖ over c: the error of a direction."""
    return math.sqrt(max(1 - row["bias/cosine"] ** 2, 0.0))


def draw_by_delta(ax: Axes, rows: Sequence[Row]) -> list[Row]:
    """Of each method a point a seed with ν=auto, the mean fit, and rings at the best ν. Returns the powers."""
    powers: list[Row] = []
    said = ["power of δ (theory)"]
    for name, of in groups(rows, "estimator").items():
        auto, look = [row for row in of if row["estimator.nu"] == AUTO], style(name, linestyle="none", alpha=0.6)
        ax.plot([row["solver.delta"] for row in auto], [row["bias/relative_error"] for row in auto], **look)
        means, best = by_delta(auto), by_delta(best_nu(of))
        power, _, intercept = slope([*means], [*means.values()])
        ax.plot([*means], [10**intercept * delta**power for delta in means], color=look["color"], **FIT)
        ax.plot([*best], [*best.values()], **style(name, linestyle="none", markerfacecolor="none", markersize=8))
        found = exponents(auto)
        rate, half = over_runs(found)
        powers.append(
            {"estimator": name, "slope": rate, "slope_ci95": half, "theory": THEORY[name], "seeds": len(found)}
        )
        said.append(f"{short(name)} {rate:.2f} ± {half:.2f} ({THEORY[name]})")
    ax.text(0.98, 0.03, "\n".join(said), fontsize=LABEL_PT, transform=ax.transAxes, ha="right")
    ax.set_xscale("log")
    ax.set_xlabel("inner precision δ = ‖φ − φ*‖")
    return powers


def draw(folder: Path) -> None:
    tables = {name: load(folder, name, columns=("seed",)) for name in (*PROBLEMS, "bias_floor", "bias_imaml")}
    steps = [row for row in load(folder, "bias_steps") if row["bias/relative_error"] is not None]
    figure, (left, middle, right) = new_figure(columns=3, width_in=7.0, height_in=3.6, sharey=True)
    slopes: list[Row] = []
    for ax, table in zip((left, middle), PROBLEMS, strict=True):
        slopes += [{"table": table, **power} for power in draw_by_delta(ax, tables[table])]
    write_csv(folder / "bias_slopes.csv", slopes)
    most = max(row["estimator.cg_steps"] for row in tables["bias_imaml"])
    kept = tables["bias_floor"] + [row for row in tables["bias_imaml"] if row["estimator.cg_steps"] == most]
    for name, rows in groups(kept, "estimator").items():
        means = by_delta(rows)
        left.plot([*means], [*means.values()], **style(name))
    left.set_yscale("log")
    left.set_ylim(bottom=1e-12)  # room for the powers
    left.set_ylabel("bias, ‖g − ∇F‖ / ‖∇F‖")
    left.set_title("(a) logistic tasks,\nrandom errors of size δ", fontsize=8)
    middle.set_title("(b) the same, MNIST-1D,\nCNN of width 8, λ = 2", fontsize=8)
    for name, rows in groups(steps, "estimator").items():
        rows = sorted(rows, key=lambda row: row["solver.steps"])
        right.plot([row["solver.steps"] for row in rows], [row["bias/relative_error"] for row in rows], **style(name))
    logarithmic(right, [row["solver.steps"] for row in steps], apart=0.25)
    right.set_xlabel("inner steps K")
    right.set_title("(c) CNN of width 16,\nλ = 2, K inner steps", fontsize=8)
    figure.suptitle(
        "(a), (b): a point a seed with ν=auto; open: the best ν of a grid; iMAML: CG to its tolerance",
        fontsize=8,
    )
    label_ends(figure, right)
    save(figure, folder, "bias")


if __name__ == "__main__":
    draw_alone(draw)
