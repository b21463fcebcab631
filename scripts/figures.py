"""Draws every figure and writes the tables of the READMEs and of docs/: python scripts/figures.py [FOLDER]

FOLDER: where the tables are, by default results/; figures go to FOLDER/figures, what the tables say of each claim to
FOLDER/README.md, and from results/ the tables of this project's README and of docs/ to their places there.
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import summary
import tables
from drawing import RESULTS, Missing, folder_given

FIGURES = {path.stem: importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("figure_*.py"))}


def redraw(folder: Path) -> list[str]:
    """All figures, side by side, and then the tables, some of which the figures' scripts write; what is missing for
    some."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        missing = [*processes.map(partial(missing_in, folder), [figure.draw for figure in FIGURES.values()])]
    missing.append(missing_in(folder, summary.write))
    if folder.resolve() == RESULTS.resolve():
        missing.append(missing_in(folder, tables.write))
    return [line for line in missing if line]


def missing_in(folder: Path, part: Callable[[Path], object]) -> str | None:
    """The line about a table that ``part`` misses, if it does."""
    try:
        part(folder)
    except Missing as table:
        return str(table)
    return None


def main() -> None:
    if missing := redraw(folder_given()):
        sys.exit("\n".join(f"error: {line}" for line in missing))


if __name__ == "__main__":
    main()
