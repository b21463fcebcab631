"""Whatever configuration: a valid one ends with finite and complete results, an invalid one with one clear line."""

import contextlib
import io
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fobmaml.run import main

CHECKS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
FEW, MANY, PARTS = 8, 60, 5  # the nightly parts make 300


def _run(overrides: list[str]) -> tuple[int, str, Path, tempfile.TemporaryDirectory]:
    """What train.py does with these arguments, in this process: its exit status, stderr and folder."""
    holder = tempfile.TemporaryDirectory()
    folder, err, code = Path(holder.name), io.StringIO(), 0
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    with (
        mock.patch.object(sys, "argv", ["train.py", *overrides, f"hydra.run.dir={folder / 'run'}"]),
        mock.patch.dict(os.environ, environment, clear=True),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(ROOT / "configs")
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else int(end.code or 0)
            if isinstance(end.code, str):
                print(end.code, file=err)
        finally:  # no later test's warnings go to this run's log
            logging.disable(logging.NOTSET)
            for handler in [*logging.root.handlers]:
                if isinstance(handler, logging.FileHandler):
                    logging.root.removeHandler(handler)
                    handler.close()
    return code, err.getvalue(), folder, holder


def _within(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that a person might type, spread evenly by magnitude."""
    return st.floats(math.log(low), math.log(high)).map(lambda power: float(f"{math.exp(power):.3g}"))


@st.composite
def valid(draw) -> list[str]:
    def one_of(name: str, *values: object) -> str:
        chosen = draw(st.sampled_from(values))
        found.append(f"{name}={chosen}")
        return str(chosen)

    def number(name: str, strategy: st.SearchStrategy) -> None:
        found.append(f"{name}={draw(strategy)}")

    found = ["steps=2", "wandb.mode=disabled"]
    dataset = one_of("dataset", "mnist1d", "sinusoid", "logistic")
    if dataset == "mnist1d":
        number("dataset.ways", st.integers(2, 6))
        one_of("dataset.loss", "cross_entropy", "mse")
    if dataset == "logistic":
        number("dataset.dimension", st.integers(1, 8))
    number("dataset.shots", st.integers(1, 5))
    number("dataset.queries", st.integers(1, 6))
    model = one_of("model", *(("cnn",) if dataset == "mnist1d" else ()), "mlp", "linear")
    if model != "linear":
        number("width", st.integers(1, 9))
        number("depth", st.integers(1, 4))
        one_of("model.activation", "silu", "gelu", "softplus", "tanh", "relu")
    estimator = one_of(
        "estimator",
        "forward",
        "symmetric",
        "central4",
        "maml",
        "maml_checkpoint",
        "fomaml",
        "reptile",
        "imaml",
        *(("exact",) if dataset == "logistic" and model == "linear" else ()),
    )
    if estimator != "exact":
        one_of("dtype", "float32", "float64")
        number("estimator.lam", _within(0.3, 3.0))
        solver = one_of("solver", "gd", *(() if estimator.startswith("maml") else ("bb", "newton_cg")))
        number("solver.steps", st.integers(1, 6))
        if solver == "gd":
            number("solver.lr", _within(1e-4, 0.02))
            number("solver.momentum", st.sampled_from([0.0, 0.5, 0.9]))
    if estimator != "exact" and solver == "gd":
        one_of("solver.batch", "null", 1, 3, 100)
        one_of("solver.query_batch", "null", 2)
    if estimator in ("forward", "symmetric", "central4"):
        number("estimator.nu", _within(0.01, 0.3))
    one_of("optimizer", "sngdm", "clipped_sgd", "sgd", "adam")
    number("optimizer.lr", _within(1e-5, 1e-2))
    number("meta_batch", st.integers(1, 5))
    one_of("task_chunk", "auto", 1, 2)
    one_of("schedule", "cosine", "linear", "constant")
    one_of("fixed_tasks", "true", "false")
    number("seed", st.integers(0, 2**31))
    one_of("log_every", 1, 2, 3)
    one_of("checkpoint_every", 1, 2, 5)
    one_of("eval.every", 1, 2, 5)
    one_of("eval.validation_tasks", 0, 0, 0, 2)  # a learning curve takes longer than the run
    one_of("eval.tasks", 0, 2, 4)
    one_of("bias.every", 0, 1, 2)
    one_of("bias.tasks", 1, 2)
    return found


def _check_valid(overrides: list[str]) -> None:
    code, err, folder, holder = _run(overrides)
    with holder:
        assert code == 0, err
        summary = json.loads((folder / "run" / "summary.json").read_text())
        assert (summary["status"], summary["step"]) == ("completed", 2)
        needed = ["train/loss", "meta_gradient/norm", "inner/residual", "memory/peak_bytes", "time/meta_step_s"]
        needed += ["val/loss"] * ("eval.validation_tasks=0" not in overrides)
        needed += ["test/loss"] * ("eval.tasks=0" not in overrides)
        for key in needed:  # what is not finite is null there
            assert isinstance(summary[key], int | float), key
        if "bias.every=0" not in overrides:
            assert summary["bias/reason"] or math.isfinite(summary["bias/relative_error"])
        state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
        assert all(torch.isfinite(parameter).all() for parameter in state["model"].values())


words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=4, max_size=8).map(lambda word: f"x{word}")
no_number = st.one_of(words, st.sampled_from(["null", "nan", "[1,2]", "{a:1}", "true", "''"]))
below_0 = st.one_of(st.integers(max_value=-1), _within(1e-6, 1e6).map(lambda x: -x))
fraction = st.integers(0, 50).map(lambda n: n + 0.5)
not_positive = st.one_of(no_number, below_0, st.sampled_from([0, 0.0, "inf", "-inf"]))
not_whole = st.one_of(no_number, below_0, fraction, st.just("inf"))
not_positive_whole = st.one_of(not_whole, st.just(0))
not_share = st.one_of(no_number, below_0, _within(1.0, 1e9), st.just(1))
wrong = {
    **dict.fromkeys(
        [
            "width",
            "depth",
            "meta_batch",
            "log_every",
            "checkpoint_every",
            "eval.every",
            "bias.tasks",
            "smoothness.tasks",
            "curvature.tasks",
            "solver.steps",
            "dataset.shots",
            "dataset.queries",
        ],
        not_positive_whole,
    ),
    **dict.fromkeys(["steps", "seed", "bias.every", "smoothness.every", "curvature.every"], not_whole),
    **dict.fromkeys(["eval.tasks", "eval.validation_tasks"], st.one_of(not_whole, st.just(1))),
    **dict.fromkeys(
        ["estimator.lam", "estimator.nu", "solver.lr", "optimizer.lr", "bias.tol", "smoothness.radius"], not_positive
    ),
    **dict.fromkeys(["solver.momentum", "optimizer.beta"], not_share),
    **dict.fromkeys(
        [
            "dtype",
            "schedule",
            "device",
            "wandb.mode",
            "estimator",
            "model",
            "dataset",
            "solver",
            "optimizer",
            "model.activation",
            "dataset.loss",
            "fixed_tasks",
            "bias.at_start",
            "resume",
        ],
        words,
    ),
    "dataset.ways": st.one_of(not_whole, st.sampled_from([0, 1, 11])),
    "task_chunk": not_positive_whole,
    "memory_limit_mb": st.one_of(not_positive.filter(lambda value: value != "null"), _within(1e-6, 1e-3)),
}
invalid = st.one_of(
    st.sampled_from(sorted(wrong)).flatmap(lambda name: st.tuples(st.just(name), wrong[name])),
    st.tuples(words, st.integers(0, 9)),
)  # no such setting


def _check_invalid(setting: tuple[str, object]) -> None:
    name, value = setting
    code, err, folder, holder = _run(["width=4", "steps=2", "wandb.mode=disabled", f"{name}={value}"])
    with holder:
        assert code != 0
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert name in err
        assert not list(folder.rglob("*"))


def _examples(check: Callable[[Any], None], strategy: st.SearchStrategy, count: int, start: int) -> None:
    seed(start)(settings(max_examples=count, **CHECKS)(given(strategy)(lambda example: check(example))))()


parts = pytest.mark.parametrize(
    ("part", "count"),
    [
        (0, FEW),
        *(pytest.param(part, MANY, marks=pytest.mark.nightly) for part in range(1, PARTS + 1)),
    ],
)


@parts
def test_valid_configurations_end_complete(part, count):
    _examples(_check_valid, valid(), count, part)


@parts
def test_invalid_values_are_one_line(part, count):
    _examples(_check_invalid, invalid, count, part)
