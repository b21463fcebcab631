"""Draws every figure and writes the tables of the READMEs and of docs/: python scripts/figures.py [FOLDER]

FOLDER: where the tables are, by default results/; figures go to FOLDER/figures, what the tables say of each claim to
FOLDER/README.md, and from results/ the tables of this project's README and of docs/ to their places there.
"""

import importlib
import sys
from pathlib import Path

import summary
import tables
from drawing import RESULTS, Missing, folder_given

FIGURES = {path.stem: importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("figure_*.py"))}


def redraw(folder: Path) -> list[str]:
    """All figures and tables; what is missing for some."""
    parts = [figure.draw for figure in FIGURES.values()] + [summary.write]
    if folder.resolve() == RESULTS.resolve():
        parts.append(tables.write)
    missing = []
    for part in parts:
        try:
            part(folder)
        except Missing as table:
            missing.append(str(table))
    return missing


def main() -> None:
    if missing := redraw(folder_given()):
        sys.exit("\n".join(f"error: {line}" for line in missing))


if __name__ == "__main__":
    main()
