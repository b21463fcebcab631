"""What a training run spends in meta-gradients and beside them: bench_loop.csv."""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from timing import Row

import fobmaml.run
import fobmaml.training
from fobmaml.estimators import estimate
from fobmaml.measure import Validation
from fobmaml.training import MetaTraining

ROOT = Path(__file__).parents[1]


def by_part(steps: int) -> list[Row]:
    """The rows of bench_loop.csv: python train.py, with clocks in it and as little evaluation as it can do."""
    spent = {"gradient": 0.0, "validation": 0.0}
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
            patch.object(Validation, "__call__", clocked("validation", Validation.__call__)),
            patch.object(MetaTraining, "train", clocked_loop),
        ):
            fobmaml.run.main(ROOT / "configs")
    counted = loop["all"] - loop["validation"]
    parts = {"gradient": loop["gradient"], "rest": counted - loop["gradient"], "validation": loop["validation"]}
    return [
        {
            "part": part,
            "steps": steps,
            "seconds": round(value, 4),
            "share": None if part == "validation" else round(value / counted, 4),
        }
        for part, value in parts.items()
    ]
