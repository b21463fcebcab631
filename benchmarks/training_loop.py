"""What a training run spends in meta-gradients and beside them: bench_loop.csv."""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timing import Row, existing_folder

import fobmaml.run
import fobmaml.training
from fobmaml.estimators import estimate
from fobmaml.files import write_csv, write_json
from fobmaml.measure import Validation
from fobmaml.run.provenance import provenance
from fobmaml.tasks.ahead import Ahead
from fobmaml.training import MetaTraining

ROOT = Path(__file__).parents[1]


def by_part(steps: int) -> list[Row]:
    """The rows of bench_loop.csv: python train.py, with clocks in it and as little evaluation as it can do."""
    spent = {"gradient": 0.0, "sampling": 0.0, "validation": 0.0}
    loop: dict[str, float] = {}
    train = MetaTraining.train

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            spent[part] += time.perf_counter() - started
            return result

        return call

    def clocked_loop(training: MetaTraining, *arguments: Any) -> Iterator[Any]:
        before, started = dict(spent), time.perf_counter()
        yield from train(training, *arguments)
        loop.update({part: spent[part] - before[part] for part in spent}, all=time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"steps={steps}",
            "device=cpu",
            f"eval.every={steps}",
            "eval.tasks=2",
            "bias.every=0",
            "wandb.mode=offline",
            f"hydra.run.dir={folder}",
        )
        with (
            contextlib.redirect_stdout(io.StringIO()),
            patch.object(sys, "argv", ["train.py", *settings]),
            patch.object(fobmaml.training, "estimate", clocked("gradient", estimate)),
            patch.object(Ahead, "take", clocked("sampling", Ahead.take)),
            patch.object(Validation, "__call__", clocked("validation", Validation.__call__)),
            patch.object(MetaTraining, "train", clocked_loop),
        ):
            fobmaml.run.main(ROOT / "configs")
    counted = loop["all"] - loop["validation"]
    parts = {part: loop[part] for part in ("gradient", "sampling")}
    parts |= {"rest": counted - sum(parts.values()), "validation": loop["validation"]}
    return [
        {
            "part": part,
            "steps": steps,
            "seconds": round(value, 4),
            "share": None if part == "validation" else round(value / counted, 4),
        }
        for part, value in parts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="meta-steps of a run")
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        rows += [{"threads": threads, **row} for row in by_part(arguments.steps)]
    write_csv(arguments.folder / "bench_loop.csv", rows)
    command = "python benchmarks/training_loop.py"
    write_json(arguments.folder / "bench_loop.json", {"command": command, "provenance": provenance()})


if __name__ == "__main__":
    main()
