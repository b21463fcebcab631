"""Draws time.png and .pdf: time of one meta-gradient by width and by inner steps, and its use of the arithmetic."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import Row, draw_alone, groups, legend_below, load, logarithmic, save, style
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
IN_THE_MIDDLE = ("symmetric", "symmetric_operators", "maml", *OF_OTHERS)


def draw(folder: Path) -> None:
    rows = [row for row in load(folder, "bench", "make bench", COLUMNS) if row["seconds_median"] is not None]
    steps, width = min(row["inner_steps"] for row in rows), max(row["width"] for row in rows)
    by_width = groups([row for row in rows if row["inner_steps"] == steps], "estimator")
    by_steps = groups([row for row in rows if row["width"] == width], "estimator")
    figure, (left, middle, right) = new_figure(columns=3, width_in=7.0, height_in=4.0)
    for name, found in by_width.items():
        draw_seconds(left, found, "width")
        if name in IN_THE_MIDDLE:
            middle.plot(
                [row["width"] for row in found], [100 * row["fraction_of_limit"] for row in found], **style(name)
            )
    limit = [
        row["seconds_16_tasks"] / row["seconds_median"] * 2e-9 * row["multiply_adds"] / limit_gflops(row)
        for row in by_width["symmetric"]
    ]
    left.plot(
        [row["width"] for row in by_width["symmetric"]],
        limit,
        color=method("symmetric").colour,
        linestyle="--",
        linewidth=1.0,
        label="arithmetic limit of symmetric",
    )
    products: dict[float, list[float]] = {}
    for row in (row for found in by_width.values() for row in found):
        products.setdefault(row["width"], []).append(100 * row["matrix_product_gflops"] / limit_gflops(row))
    middle.plot(
        sorted(products),
        [statistics.median(products[width]) for width in sorted(products)],
        color="#777777",
        linestyle="--",
        linewidth=1.0,
        label="matrix product by torch",
    )
    for found in by_steps.values():
        draw_seconds(right, found, "inner_steps")
    left.set_ylabel("seconds, 16 tasks")
    middle.set_ylabel("% of the arithmetic limit")
    middle.set_ylim(0, 105)
    right.set_ylabel("seconds, 16 tasks")
    for ax, key, title in (
        (left, "width", f"(a) {steps:.0f} inner steps"),
        (middle, "width", f"(b) {steps:.0f} inner steps"),
        (right, "inner_steps", f"(c) {width:.0f} channels"),
    ):
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("channels" if key == "width" else "inner steps")
        logarithmic(ax, [row[key] for row in rows], y=ax is not middle)
    legend_below(figure, [left, middle], 3)
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
    ax.errorbar(
        [row[key] for row in rows],
        [row["seconds_16_tasks"] for row in rows],
        yerr=bars,
        capsize=1.5,
        elinewidth=0.8,
        **style(rows[0]["estimator"]),
    )


if __name__ == "__main__":
    draw_alone(draw)
