"""Kills a run with SIGKILL at random moments and continues it: python scripts/kill_test.py [--kills 100]

After every kill all files have to be readable, and a run that was continued to its end has to be the uninterrupted run,
bit for bit: parameters, metrics and summary. The run writes a checkpoint after every step, so that kills meet it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from forked import Forks
from tqdm import tqdm

from fobmaml.run.events import read_events

RUN = (
    "width=4",
    "steps=40",
    "log_every=1",
    "checkpoint_every=1",
    "eval.every=20",
    "bias.every=0",
    "eval.tasks=10",
    "eval.validation_tasks=10",
)
KILLS_A_RUN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with (
        tempfile.TemporaryDirectory() as holder,
        tqdm(total=arguments.kills, unit="kill", disable=None) as bar,
        Forks() as forks,
    ):
        folder = Path(holder)
        started = time.monotonic()
        to_its_end(forks, folder / "whole")
        seconds, wanted = time.monotonic() - started, result(folder / "whole")
        kills = runs = 0
        while kills < arguments.kills:
            for _ in range(min(KILLS_A_RUN, arguments.kills - kills)):
                if not killed(forks, folder / "run", moments, seconds):
                    break  # it had ended before
                check_files(folder / "run")
                kills += 1
                bar.update()
            to_its_end(forks, folder / "run")
            if result(folder / "run") != wanted:
                sys.exit("error: a killed and continued run differs from the uninterrupted one")
            runs += 1
            shutil.rmtree(folder / "run")
    print(f"{arguments.kills} kills of {runs} runs: every file was whole, every run ended as the uninterrupted one")


def start(forks: Forks, folder: Path, err: str = os.devnull) -> int:
    return forks.start((*RUN, f"hydra.run.dir={folder}"), folder.parent, err=err)


def to_its_end(forks: Forks, folder: Path) -> None:
    """Starts the run, or continues it."""
    with tempfile.NamedTemporaryFile() as err:
        start(forks, folder, err.name)
        if forks.wait():
            sys.exit(f"error: a run does not end complete: {Path(err.name).read_text()}")


def killed(forks: Forks, folder: Path, moments: random.Random, seconds: float) -> bool:
    """Starts the run and kills it: at any moment of its life or, two times of three, in one of its next steps."""
    checkpoint = folder / "checkpoint.pt"

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    last, process = written(), start(forks, folder)
    if moments.random() < 2 / 3:
        for _ in range(moments.randint(1, 10)):
            while not forks.ended() and written() == last:
                time.sleep(0.001)
            last = written()
        time.sleep(moments.uniform(0.0, 0.05))
    else:
        time.sleep(moments.uniform(0.0, seconds))
    if not forks.ended():
        os.kill(process, signal.SIGKILL)
    return forks.wait() < 0


def check_files(folder: Path) -> None:
    """Whatever is there is whole; only the last line of the log of events may be cut short."""
    if (folder / "checkpoint.pt").exists():
        torch.load(folder / "checkpoint.pt", weights_only=True)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    log = folder / "metrics.jsonl"
    if log.exists() and len(log.read_text().splitlines()) - len(read_events(log)) > 1:
        sys.exit(f"error: {log} has lines that are cut short")


def result(folder: Path) -> tuple[Any, ...]:
    """What has to be the same: all but times."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    summary = json.loads((folder / "summary.json").read_text())
    events = [
        {key: value for key, value in event.items() if not key.startswith("time/")}
        for event in read_events(folder / "metrics.jsonl")
    ]
    return (
        {name: parameter.numpy().tobytes() for name, parameter in state["model"].items()},
        events,
        {
            key: value
            for key, value in summary.items()
            if ("/" in key and not key.startswith("time/")) or key in ("status", "step")
        },
    )


if __name__ == "__main__":
    main()
