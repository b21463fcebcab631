"""Draws bias.png and .pdf: bias by inner precision δ at the best ν, with fitted slopes, and by inner steps."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import FIT, LABEL_PT, Row, draw_alone, groups, label_ends, load, logarithmic, save, short, style
from statistics_of_runs import slope

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


def exponents(rows: Sequence[Row]) -> list[float]:
    """Of each seed, the power of δ with which its bias goes."""
    return [
        slope([row["solver.delta"] for row in of], [row["bias/relative_error"] for row in of])[0]
        for of in groups(rows, "seed").values()
    ]


def at_best_scale(row: Row) -> float:
    """min ‖c g − ∇F‖ / ‖∇F‖ over c: the error of a direction."""
    return math.sqrt(max(1 - row["bias/cosine"] ** 2, 0.0))


def draw(folder: Path) -> None:
    best, floor, steps = best_nu(load(folder, "bias_delta")), load(folder, "bias_floor"), load(folder, "bias_steps")
    figure, (left, right) = new_figure(columns=2, width_in=7.0, height_in=3.0, sharey=True)
    fitted: list[Row] = []
    for name, rows in best.items():
        delta, error = ([row[key] for row in rows] for key in ("solver.delta", "bias/relative_error"))
        rate, half, intercept = slope(delta, error)
        fitted.append(
            {"estimator": name, "slope": rate, "slope_ci95": half, "theory": THEORY[name], "deltas": len(delta)}
        )
        left.plot(delta, error, **style(name, linestyle="none"))
        left.plot(delta, [10**intercept * d**rate for d in delta], color=style(name)["color"], **FIT)
    said = ["fits (dashed), powers of δ:"]
    said += [f"{short(f['estimator'])} {f['slope']:.2f} ± {f['slope_ci95']:.2f} (theory {f['theory']})" for f in fitted]
    left.text(0.98, 0.03, "\n".join(said), fontsize=LABEL_PT, transform=left.transAxes, ha="right")
    for name, rows in groups(floor, "estimator").items():
        rows = sorted(rows, key=lambda row: row["solver.delta"])
        left.plot([row["solver.delta"] for row in rows], [row["bias/relative_error"] for row in rows], **style(name))
    write_csv(folder / "bias_slopes.csv", fitted)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("inner precision δ = ‖φ − φ*‖")
    left.set_ylabel("bias, ‖g − ∇F‖ / ‖∇F‖")
    left.set_title("(a) logistic tasks, random errors, best ν", fontsize=8)
    for name, rows in groups([row for row in steps if row["bias/relative_error"] is not None], "estimator").items():
        rows = sorted(rows, key=lambda row: row["solver.steps"])
        right.plot([row["solver.steps"] for row in rows], [row["bias/relative_error"] for row in rows], **style(name))
    logarithmic(right, [row["solver.steps"] for row in steps])
    right.set_xlabel("inner steps K")
    right.set_title("(b) MNIST-1D, CNN, λ = 2, float64", fontsize=8)
    label_ends(figure, right)
    save(figure, folder, "bias")


if __name__ == "__main__":
    draw_alone(draw)
