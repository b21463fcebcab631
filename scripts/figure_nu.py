"""Draws nu.png and .pdf: bias by ν, beside what the theory says, in both precisions, and at ν=auto."""

import math
from collections.abc import Sequence
from pathlib import Path

from drawing import FIT, Row, draw_alone, groups, legend_below, load, save, style
from figure_bias import of_nu
from scipy.optimize import least_squares

from fobmaml.run.plotting import method, new_figure

ORDER = {"forward": 1, "symmetric": 2, "central4": 4}
SHOWN_DELTA = 1e-6
SMALL = 0.5
"""Up to which ν the leading terms are fitted."""


def fitted(nu: Sequence[float], error: Sequence[float], order: int) -> tuple[float, float]:
    """a and b of a/ν + bνᵖ, by least squares of the logarithms."""

    def residuals(logarithms: Sequence[float]) -> list[float]:
        a, b = map(math.exp, logarithms)
        return [math.log((a / x + b * x**order) / y) for x, y in zip(nu, error, strict=True)]

    start = math.log(error[0] * nu[0]), math.log(error[-1] / nu[-1] ** order)
    a, b = map(math.exp, least_squares(residuals, start).x)
    return a, b


def by_nu(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """ν, and the bias where it is known."""
    known = [
        (row["estimator.nu"], row["bias/relative_error"]) for row in rows if row["bias/relative_error"] is not None
    ]
    nu, error = zip(*sorted(known), strict=True)
    return list(nu), list(error)


def draw(folder: Path) -> None:
    logistic = [row for row in load(folder, "bias_delta", columns=("seed",)) if row["solver.delta"] == SHOWN_DELTA]
    network, rule = load(folder, "nu"), load(folder, "nu_rule", "python benchmarks/nu_rule.py")
    figure, (left, middle, right) = new_figure(columns=3, width_in=7.0, height_in=3.1)
    middle.sharey(left)
    middle.tick_params(labelleft=False)
    for name, rows in groups(logistic, "estimator").items():
        errors = of_nu(rows)
        nu, error = [*errors], [*errors.values()]
        left.plot(nu, error, **style(name, linestyle="none"))
        small = [x for x in nu if x < SMALL]
        a, b = fitted(small, error[: len(small)], ORDER[name])
        fine = [10 ** (place / 20) for place in range(round(20 * math.log10(nu[0])), round(20 * math.log10(SMALL)))]
        left.plot(fine, [a / x + b * x ** ORDER[name] for x in fine], color=method(name).colour, **FIT)
    exponent = round(math.log10(SHOWN_DELTA))
    left.set_title(f"(a) logistic tasks, δ = 10$^{{{exponent}}}$\n(dashed: fits of a/ν + bνᵖ)", fontsize=8)
    left.set_ylabel("bias, ‖g − ∇F‖ / ‖∇F‖")
    for (name, dtype), rows in groups(network, "estimator", "dtype").items():
        single = {"linestyle": ":", "label": None, "markerfacecolor": "none"} if dtype == "float32" else {}
        middle.plot(*by_nu(rows), **style(name, **single))
    middle.set_title("(b) MNIST-1D, CNN, λ = 2, K = 200\n(dotted: float32, solid: float64)", fontsize=8)
    for name, rows in groups(rule, "estimator").items():
        right.plot(
            [row["best_error"] for row in rows],
            [row["auto_error"] for row in rows],
            **style(name, linestyle="none", markerfacecolor="none"),
        )
    ends = [min(row["best_error"] for row in rule), max(row["best_error"] for row in rule)]
    right.plot(ends, ends, color="#777777", linewidth=0.8)
    right.set_title(f"(c) estimator.nu=auto, {len(rule)} cases\n(line: as good as the grid's best)", fontsize=8)
    right.set_xlabel("error at the best ν of a grid")
    right.set_ylabel("error at ν=auto")
    for ax in (left, middle, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
    for ax in (left, middle):
        ax.set_xlabel("ν")
    legend_below(figure, [left, middle], 3)
    save(figure, folder, "nu")


if __name__ == "__main__":
    draw_alone(draw)
