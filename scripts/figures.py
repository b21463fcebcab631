"""Draws every figure and writes the tables of the READMEs: python scripts/figures.py [FOLDER]

FOLDER: where the tables are, by default results/; figures go to FOLDER/figures, what the tables say of each claim to
FOLDER/README.md, and from results/ the tables of this project's README to their places there.
"""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import summary
import tables
from drawing import RESULTS, Missing, folder_given

FIGURES = {path.stem: importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("figure_*.py"))}


def draw(name: str, folder: Path) -> str | None:
    """What is missing, if it is."""
    try:
        FIGURES[name].draw(folder)
    except Missing as missing:
        return str(missing)
    return None


def draw_all(folder: Path) -> list[str]:
    """Side by side, in processes that begin with all that is imported here; what is missing."""
    forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"  # where drawing may not fork
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) if forks else nullcontext() as pool:
        found = (pool.map if pool else map)(draw, FIGURES, [folder] * len(FIGURES))
        return [missing for missing in found if missing]


def main() -> None:
    folder = folder_given()
    missing = draw_all(folder)
    summary.write(folder)
    if folder.resolve() == RESULTS.resolve():
        try:
            tables.write()
        except Missing as table:
            missing.append(str(table))
    if missing:
        sys.exit("\n".join(f"error: {line}" for line in missing))


if __name__ == "__main__":
    main()
