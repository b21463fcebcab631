"""Draws time.png and .pdf: time of one meta-gradient by width and by inner steps, and its use of the arithmetic."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import LABEL_PT, Row, draw_alone, groups, label_ends, load, logarithmic, save, style
from matplotlib.axes import Axes

from fobmaml.run.plotting import OF_OTHERS, method, new_figure

COLUMNS = (
    "width",
    "inner_steps",
    "seconds_median",
    "seconds_q25",
    "seconds_q75",
    "seconds_16_tasks",
    "multiply_adds",
    "matrix_product_gflops",
    "fraction_of_limit",
)
BY_SHARE = ("symmetric", "symmetric_operators", "maml", *OF_OTHERS)


def draw(folder: Path) -> None:
    rows = [row for row in load(folder, "bench", "make bench", COLUMNS) if row["seconds_median"] is not None]
    steps, width = min(row["inner_steps"] for row in rows), max(row["width"] for row in rows)
    by_width = groups([row for row in rows if row["inner_steps"] == steps], "estimator")
    by_steps = groups([row for row in rows if row["width"] == width], "estimator")
    figure, (share, left, right) = new_figure(columns=3, width_in=7.0, height_in=3.2)
    right.sharey(left)
    right.tick_params(labelleft=False)
    for ax, parts, key in ((left, by_width, "width"), (right, by_steps, "inner_steps")):
        for found in parts.values():
            draw_seconds(ax, found, key)
        limit = [
            row["seconds_16_tasks"] / row["seconds_median"] * 2e-9 * row["multiply_adds"] / limit_gflops(row)
            for row in parts["symmetric"]
        ]
        look: Row = {"color": method("symmetric").colour, "linestyle": "--", "linewidth": 1.0}
        ax.plot([row[key] for row in parts["symmetric"]], limit, **look, label="arithmetic limit of symmetric")
    products: dict[float, list[float]] = {}
    for name, found in by_width.items():
        if name in BY_SHARE:
            share.plot(
                [row["width"] for row in found], [100 * row["fraction_of_limit"] for row in found], **style(name)
            )
        for row in found:
            products.setdefault(row["width"], []).append(100 * row["matrix_product_gflops"] / limit_gflops(row))
    widths = sorted(products)
    shares = [statistics.median(products[width]) for width in widths]
    share.plot(widths, shares, color="#777777", linestyle="--", linewidth=1.0)
    share.text(widths[0], max(shares) + 2, "matrix product by torch", fontsize=LABEL_PT)
    share.set_ylim(0, 105)
    share.set_ylabel("% of the arithmetic limit")
    left.set_ylabel("seconds, 16 tasks")
    for ax, key, title in (
        (share, "width", f"(a) {steps:.0f} inner steps"),
        (left, "width", f"(b) {steps:.0f} inner steps"),
        (right, "inner_steps", f"(c) {width:.0f} channels"),
    ):
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("channels" if key == "width" else "inner steps")
        logarithmic(ax, [row[key] for row in rows], y=ax is not share, apart=0.2)
    label_ends(figure, right)
    save(figure, folder, "time")


def limit_gflops(row: Row) -> float:
    """The rate of fused multiply-adds, or, where that was not measured, of torch's matrix product."""
    return row.get("multiply_add_gflops") or row["matrix_product_gflops"]


def draw_seconds(ax: Axes, rows: Sequence[Row], key: str) -> None:
    """Medians, with bars from quartile to quartile, for all tasks."""
    scales = [row["seconds_16_tasks"] / row["seconds_median"] for row in rows]
    bars = [
        [scale * abs(row[end] - row["seconds_median"]) for row, scale in zip(rows, scales, strict=True)]
        for end in ("seconds_q25", "seconds_q75")
    ]
    x, y = [row[key] for row in rows], [row["seconds_16_tasks"] for row in rows]
    name = rows[0]["estimator"]
    ax.errorbar(x, y, yerr=bars, fmt="none", ecolor=method(name).colour, capsize=1.5, elinewidth=0.8)
    ax.plot(x, y, **style(name))


if __name__ == "__main__":
    draw_alone(draw)
