"""Draws nu.png and .pdf: bias by ν, with the optimum that the theory gives, and in both precisions."""

import math
from pathlib import Path

from drawing import draw_alone, groups, legend_below, load, save, style

from fobmaml.run.plotting import method, new_figure

ORDER = {"forward": 1, "symmetric": 2, "central4": 4}
SHOWN_DELTA = 1e-6


def draw(folder: Path) -> None:
    logistic = [row for row in load(folder, "bias_delta") if row["solver.delta"] == SHOWN_DELTA]
    network = load(folder, "nu")
    figure, (left, right) = new_figure(columns=2, width_in=7.0, height_in=3.4)
    for name, rows in groups(logistic, "estimator").items():
        rows = sorted(rows, key=lambda row: row["estimator.nu"])
        nu, error, p = [row["estimator.nu"] for row in rows], [row["bias/relative_error"] for row in rows], ORDER[name]
        left.plot(nu, error, **style(name))
        # error = a/ν + b ν^p: a from the smallest ν, where the solver's error rules, b where truncation does.
        lowest = min(range(len(nu)), key=error.__getitem__)
        a, ruled = error[0] * nu[0], min(lowest + 2, len(nu) - 1)
        b = error[ruled] / nu[ruled] ** p
        optimum = (a / (p * b)) ** (1 / (p + 1))
        left.axvline(optimum, color=method(name).colour, linewidth=0.8, linestyle="--")
    exponent = round(math.log10(SHOWN_DELTA))
    left.set_title(f"(a) logistic tasks, δ = 10$^{{{exponent}}}$, float64\n(dashed: optimum of a/ν + bνᵖ)", fontsize=8)
    left.set_ylabel("bias, ‖g − ∇F‖ / ‖∇F‖")
    for (name, dtype), rows in groups(network, "estimator", "dtype").items():
        rows = sorted(
            (row for row in rows if row["bias/relative_error"] is not None), key=lambda row: row["estimator.nu"]
        )
        single = dtype == "float32"
        right.plot(
            [row["estimator.nu"] for row in rows],
            [row["bias/relative_error"] for row in rows],
            **style(
                name,
                linestyle=":" if single else "-",
                label=None if single else method(name).label,
                markerfacecolor="none" if single else method(name).colour,
            ),
        )
    right.set_title("(b) MNIST-1D, CNN, λ = 2, 200 inner steps\n(dotted: float32, solid: float64)", fontsize=8)
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("ν")
    legend_below(figure, [left, right], 3)
    save(figure, folder, "nu")


if __name__ == "__main__":
    draw_alone(draw)
