"""What the scripts of single figures share: tables read, figures saved, and their style."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter
from scipy.optimize import isotonic_regression

from fobmaml.files import read_csv
from fobmaml.run.plotting import METHODS, method

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]

LABEL_PT = 7.5
"""Type of what is written into a figure."""

FIT: Row = {"linestyle": (0, (4, 2)), "linewidth": 0.9}
"""Of lines that are fitted; those that join what was measured are solid, or a method's own."""

LEADER: Row = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
"""Of the lines from a line's end to its label."""


def folder_given() -> Path:
    """Where the tables are: the command line's first argument that is no option, by default results/."""
    return next((Path(given) for given in sys.argv[1:] if not given.startswith("-")), RESULTS)


def draw_alone(draw: Callable[[Path], None]) -> None:
    """What the script of a single figure does."""
    try:
        draw(folder_given())
    except Missing as missing:
        sys.exit(f"error: {missing}")


class Missing(Exception):
    """A table is not there, or not whole; the text says what makes it."""


def load(folder: Path, name: str, made_by: str | None = None, columns: Iterable[str] = ()) -> list[Row]:
    """A table with numbers as numbers and empty cells as None. Raises Missing, saying what makes it: ``made_by``, by
    default the experiment of the same name."""
    path = folder / f"{name}.csv"
    command = made_by or f"make reproduce ARGS={name.removesuffix('_curves').removesuffix('_examples')}"
    if not path.exists():
        raise Missing(f"{os.path.relpath(path)} is missing: {command} makes it")
    rows = [{key: parse(value) for key, value in row.items()} for row in read_csv(path)]
    order = {name: place for place, name in enumerate(METHODS)}
    rows.sort(key=lambda row: order.get(str(row.get("estimator")), len(order)))
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise Missing(f"{os.path.relpath(path)} lacks {', '.join(missing)}: {command} makes it anew")
    return rows


def settings(folder: Path, name: str) -> dict[str, Any]:
    """What the jobs of an experiment had in common. Raises Missing."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise Missing(f"{os.path.relpath(path)} is missing: make reproduce ARGS={name} makes it")
    about = json.loads(path.read_text())
    return about["settings"] | {key: values[0] for key, values in about["varied"].items() if len(values) == 1}


def parse(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def lay_out(figure: Figure) -> None:
    if layout := figure.get_layout_engine():
        layout.execute(figure)


def save(figure: Figure, folder: Path, name: str) -> None:
    """As FOLDER/figures/NAME.png and .pdf, laid out once for both; ``savefig`` would draw each twice."""
    (folder / "figures").mkdir(exist_ok=True)
    lay_out(figure)
    figure.set_layout_engine("none")
    png, pdf = (folder / "figures" / f"{name}.{suffix}" for suffix in ("png", "pdf"))
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
    print(f"{os.path.relpath(png)} and .pdf", flush=True)


def groups(rows: Sequence[Row], *keys: str) -> dict[Any, list[Row]]:
    """The rows by the value of one key, or by the values of several."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    return found


def short(name: str) -> str:
    """A method's label where FO-B-MAML is understood."""
    return method(name).label.removeprefix("FO-B-MAML, ")


def style(name: str, **changes: Any) -> Row:
    look = method(name)
    return {
        "color": look.colour,
        "marker": look.marker,
        "label": look.label,
        "linewidth": 1.0,
        "markersize": 4.0,
        "linestyle": look.linestyle,
        "markerfacecolor": "none" if look.linestyle != "-" else look.colour,
    } | changes


def logarithmic(ax: Axes, x: Sequence[float] | None = None, y: bool = False, apart: float = 0.1) -> None:
    """A logarithmic x axis with ticks where it was measured and there is room, or a y axis with plain numbers.

    ``apart``: the least distance of ticks, as a part of the axis.
    """
    if x is not None:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ticks = sorted(set(x))
        least = apart * math.log(ticks[-1] / ticks[0])
        shown = [ticks[-1]]
        for tick in reversed(ticks[:-1]):
            if math.log(shown[-1] / tick) > least:
                shown.append(tick)
        ax.set_xticks(shown)
        ax.xaxis.set_minor_locator(NullLocator())
    if y:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """One legend for all axes, each label once."""
    found: Mapping[str, Any] = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def label_ends(figure: Figure, *axes: Axes) -> None:
    """Writes each line's label beside its right end, in place of a legend: no further up or down than keeps them apart.

    To be called when all else is drawn: the heights of the axes are those of the layout.
    """
    lay_out(figure)
    type_size = LABEL_PT / 72 * figure.dpi
    for ax in axes:
        lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
        ends = {line: tuple(np.asarray(line.get_xydata())[-1]) for line in lines}
        heights = {line: ax.transAxes.inverted().transform(ax.transData.transform(ends[line]))[1] for line in lines}
        lines.sort(key=heights.__getitem__)
        box = ax.get_window_extent()
        lowest = 1.2 * type_size / box.height * np.arange(len(lines))
        moved = isotonic_regression([heights[line] for line in lines] - lowest).x.clip(0, max(0, 1 - lowest[-1]))
        for line, height in zip(lines, moved + lowest, strict=True):
            ax.annotate(
                str(line.get_label()),
                ends[line],
                (1 + type_size / box.width, height),
                textcoords="axes fraction",
                fontsize=LABEL_PT,
                verticalalignment="center",
                annotation_clip=False,
                arrowprops=LEADER | {"color": line.get_color()},
            )
