"""Builds the interactive page, one file that needs no network: python scripts/explorer.py [FOLDER]

FOLDER has the tables that it shows, by default results/. The page goes to outputs/explorer.html (or --page=PATH). Where
a Chromium is found (unless --no-pictures), so do pictures of its panels, to FOLDER/figures/explorer_*.png, and the time
of its redraws, to FOLDER/explorer.csv.
"""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import vl_convert
from drawing import Missing, folder_given
from explorer_data import FINE_NUS, NODES, compare, curvature, measured, methods, tradeoff
from explorer_sinusoid import networks
from playwright.sync_api import Browser, sync_playwright

from fobmaml.files import write_csv, write_json, write_text
from fobmaml.run.provenance import provenance

PARTS = Path(__file__).parent / "explorer_page"
PANELS = ("curvature", "compare", "tradeoff", "sinusoid", "measured")
SCRIPTS = ("formulas.js", "page.js")
MOVES = 20


def build(path: Path, folder: Path, nodes: int = NODES, nus: Sequence[float] = FINE_NUS) -> None:
    """``nodes``: of the grid of θ, a side; ``nus``: of the panel on ν and δ."""
    data = {
        "methods": methods(),
        "curvature": curvature(folder),
        "compare": compare(nodes),
        "tradeoff": tradeoff(nus),
        "sinusoid": networks(folder),
        "measured": measured(folder),
    }
    page = (PARTS / "page.html").read_text(encoding="utf-8")
    commit = provenance()["commit"]
    for place, part in (
        ("<!--commit-->", f"commit {commit[:10]}" if commit else "outside a checkout"),
        ("/*page.css*/", (PARTS / "page.css").read_text(encoding="utf-8")),
        ("/*data*/", json.dumps(data).replace("</", "<\\/")),
        ("/*vega.js*/", vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        ("/*page.js*/", "".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)),
    ):
        page = page.replace(place, part, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    print(f"{os.path.relpath(path)}: {path.stat().st_size / 1e6:.1f} MB")


def chromium() -> str | None:
    """The system's, or the one that `playwright install chromium` has brought."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    with sync_playwright() as driver:
        path = driver.chromium.executable_path
    return path if Path(path).exists() else None


@contextmanager
def browser() -> Iterator[Browser]:
    """Headless."""
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to have as root
    path = chromium()
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=alone)
        yield started
        started.close()


def look(page: Path, folder: Path) -> None:
    """Takes a picture of every panel, and the time that each slider's moves take to be drawn."""
    rows = []
    with browser() as started:
        tab = started.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("html[data-ready]")
        for name in PANELS:
            path = folder / "figures" / f"explorer_{name}.png"
            tab.locator(f"#{name}").screenshot(path=path)
            print(os.path.relpath(path))
        for name in PANELS:
            for slider in tab.locator(f"#{name} input[type=range]").all():
                times = []
                for move in range(MOVES):
                    slider.press("ArrowLeft" if move % 2 else "ArrowRight")
                    tab.wait_for_selector(f"#{name}[data-state=drawn]")
                    times.append(float(tab.locator(f"#{name}").get_attribute("data-redraw-ms") or "nan"))
                rows.append(
                    {
                        "panel": name,
                        "slider": slider.get_attribute("id"),
                        "moves": MOVES,
                        "milliseconds": statistics.median(times),
                        "most": max(times),
                    }
                )
        version = started.version
    write_csv(folder / "explorer.csv", rows)
    write_json(
        folder / "explorer.json",
        {
            "command": "make explorer",
            "what": "milliseconds from a slider's move to its drawing: median and most",
            "chromium": version,
            "provenance": provenance(),
        },
    )
    print(f"a slider's move is drawn within {max(row['milliseconds'] for row in rows):.0f} ms (median of the slowest)")


def main() -> None:
    path = next((Path(given[7:]) for given in sys.argv if given.startswith("--page=")), Path("outputs/explorer.html"))
    folder = folder_given()
    try:
        build(path, folder)
    except Missing as missing:
        sys.exit(f"error: {missing}")
    if "--no-pictures" not in sys.argv:
        if chromium():
            look(path, folder)
        else:
            print("no pictures: there is no Chromium (on Debian: apt-get install chromium)")


if __name__ == "__main__":
    main()
