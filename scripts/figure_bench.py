"""Draws bench.png and .pdf: time, use of the arithmetic, and memory of a meta-gradient.

python scripts/figure_bench.py [FOLDER]: from FOLDER/bench.csv (by default results/bench.csv) into FOLDER/figures.
"""

import os
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from fobmaml.files import read_csv
from fobmaml.plotting import METHODS, new_figure

ROOT = Path(__file__).parents[1]
NUMBERS = ("width", "inner_steps", "tasks_at_once", "seconds_median", "seconds_q25", "seconds_q75", "seconds_16_tasks",
           "multiply_adds", "matrix_product_gflops", "fraction_of_limit", "peak_bytes")
PEERS = ("higher", "torchopt")
HOLLOW = {"maml_checkpoint": ":", "torchopt": "--"}
"""Those that lie on others' lines, with a line that lets these through."""

Row = dict[str, Any]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results"
    rows = read(folder / "bench.csv")
    steps, width = min(row["inner_steps"] for row in rows), max(row["width"] for row in rows)
    figure, (left, middle, right) = new_figure(columns=3, width_in=7.0, height_in=3.6)
    for name in dict.fromkeys(row["estimator"] for row in rows):
        by_width = [row for row in rows if row["estimator"] == name and row["inner_steps"] == steps]
        by_steps = [row for row in rows if row["estimator"] == name and row["width"] == width]
        draw_seconds(left, by_width)
        if name in ("symmetric", "maml", *PEERS):
            middle.plot([row["width"] for row in by_width], [100 * row["fraction_of_limit"] for row in by_width],
                        **style(name))
        if name in ("symmetric", "maml", "maml_checkpoint", *PEERS):
            right.plot([row["inner_steps"] for row in by_steps],
                       [row["peak_bytes"] / row["tasks_at_once"] / 1e6 for row in by_steps], **style(name))
    left.set_ylabel("seconds, 16 tasks")
    middle.set_ylabel("% of the arithmetic limit")
    middle.set_ylim(0, 100)
    right.set_ylabel("peak memory a task (MB)")
    for ax, key, title in ((left, "width", f"(a) {steps:.0f} inner steps"),
                           (middle, "width", f"(b) {steps:.0f} inner steps"),
                           (right, "inner_steps", f"(c) width {width:.0f}")):
        ax.set_title(title, fontsize=8)
        ax.set_xlabel(key.replace("_", " "))
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_xticks(sorted({row[key] for row in rows}))
        ax.xaxis.set_minor_locator(NullLocator())
    for ax in (left, right):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    (folder / "figures").mkdir(exist_ok=True)
    for suffix in ("png", "pdf"):
        path = folder / "figures" / f"bench.{suffix}"
        figure.savefig(path, metadata={"CreationDate": None} if suffix == "pdf" else {"Software": None})
        print(os.path.relpath(path))


def read(path: Path) -> list[Row]:
    """The table, its numbers as numbers."""
    shown = os.path.relpath(path)
    if not path.exists():
        sys.exit(f"error: {shown} is missing: make bench makes it")
    rows = read_csv(path)
    missing = [column for column in NUMBERS if column not in rows[0]]
    if missing:
        sys.exit(f"error: {shown} lacks {', '.join(missing)}: make bench makes it anew")
    return [{"estimator": row["estimator"], **{key: float(row[key]) for key in NUMBERS}} for row in rows]


def draw_seconds(ax: Axes, rows: list[Row]) -> None:
    """Medians with bars from quartile to quartile, for all tasks; for symmetric the time of its products alone too."""
    name, widths = rows[0]["estimator"], [row["width"] for row in rows]
    scales = [row["seconds_16_tasks"] / row["seconds_median"] for row in rows]
    bars = [[scale * abs(row[end] - row["seconds_median"]) for row, scale in zip(rows, scales, strict=True)]
            for end in ("seconds_q25", "seconds_q75")]
    ax.errorbar(widths, [row["seconds_16_tasks"] for row in rows], yerr=bars, capsize=1.5, elinewidth=0.8,
                **style(name))
    if name == "symmetric":
        limit = [scale * 2e-9 * row["multiply_adds"] / row["matrix_product_gflops"]
                 for row, scale in zip(rows, scales, strict=True)]
        ax.plot(widths, limit, color=METHODS[name].colour, linestyle="--", linewidth=1.0,
                label="arithmetic limit of symmetric")


def style(name: str) -> Row:
    look, hollow = METHODS[name], name in HOLLOW
    return {"color": look.colour, "marker": look.marker, "label": look.label, "linewidth": 1.0,
            "markersize": 6.0 if name == "torchopt" else 4.0, "markerfacecolor": "none" if hollow else look.colour,
            "linestyle": HOLLOW.get(name, "-")}


if __name__ == "__main__":
    main()
