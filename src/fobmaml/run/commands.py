"""Commands beside training: to evaluate what a run has learned, and to list runs."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fobmaml.run.console import make_lasting
from fobmaml.run.errors import command
from fobmaml.run.settings import quoted
from fobmaml.saved.results import read_runs, spoken, table


def runs(given: Sequence[str]) -> None:
    """Prints the runs in a folder. Ends by SystemExit where something is wrong."""
    make_lasting()
    parser = argparse.ArgumentParser(f"{command()} runs", description="Lists runs with their settings and results.")
    parser.add_argument("folder", help="the runs are in it and below")
    parser.add_argument("--csv", action="store_true", help="with every setting and result, separated by commas")
    asked = parser.parse_args(given)
    try:
        rows = read_runs(asked.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not rows:
        sys.exit(f"error: folder={asked.folder}: takes a folder with runs in or below it, and there are none")
    if not asked.csv:
        print(table(rows))
        return
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()})


def evaluation(given: Sequence[str]) -> list[str]:
    """The arguments of the run that only measures, from those of ``evaluate``: a run's folder, and in what the settings
    differ from that run's."""
    usage = f"{command()} evaluate FOLDER [settings]: takes the folder of a run"
    if not given or given[0].startswith("-"):
        sys.exit(f"error: {usage}")
    folder, more = given[0], list(given[1:])
    try:
        said: Any = OmegaConf.to_container(OmegaConf.load(Path(folder, ".hydra", "overrides.yaml")))
        hydra: Any = OmegaConf.load(Path(folder, ".hydra", "hydra.yaml")).hydra
        if not isinstance(said, list):
            raise TypeError(".hydra/overrides.yaml is no list")
        sources = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
        name = hydra.job.config_name
    except Exception as error:  # of a parser, which meets any file here
        sys.exit(f"error: {usage}, and {folder} is none ({' '.join(str(error).split())})")
    places = [f"--config-dir={path}" for path in sources] + [f"--config-name={name}"] * (name != "train")
    places = [place for place in places if not any(each.startswith(place.split("=")[0]) for each in more)]
    taken = {"init", "resume", "steps", *spoken(more)}
    kept = [override for override in said if not taken & spoken([override]).keys()]
    settings = [each for each in more if not each.startswith("-") and ("=" in each or each.startswith("~"))]
    options = [each for each in more if each not in settings]  # with their values; they come before all settings
    return [*places, *options, *kept, f"init={quoted(folder)}", "steps=0", *settings]
