"""torchrun: a run does not depend on the number of its processes, and none of them outlives another."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import processes_in, start_train, wait_until

RUN = (
    "device=cpu",
    "width=8",
    "steps=12",
    "meta_batch=7",
    "eval.every=5",
    "eval.tasks=20",
    "eval.validation_tasks=10",
    "bias.every=0",
    "log_every=1",
    "task_clip=0.01",
    "wandb.mode=disabled",
)


def _torchrun(folder: Path, processes: int, *overrides: str) -> subprocess.Popen[str]:
    return start_train(
        folder,
        *overrides,
        start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # a process takes a GPU of its own where there are any
        by=("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
    )


def _ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def _assert_same_run(found: Path, wanted: Path, tolerance: float) -> None:
    ours, plain = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (found, wanted))
    for part in ("model", "variables"):
        assert ours[part].keys() == plain[part].keys()
        for name, parameter in plain[part].items():
            torch.testing.assert_close(ours[part][name], parameter, rtol=0.0, atol=tolerance)
    ours, plain = (json.loads((folder / "summary.json").read_text()) for folder in (found, wanted))
    assert ours["status"] == "completed"
    for key in ("test/accuracy", "meta_gradient/clipped", "work/example_gradients", "work/hessian_products"):
        assert ours[key] == plain[key]
    assert plain["work/example_gradients"] > 0
    for key in ("test/loss", "val/loss", "train/loss", "inner/residual", "meta_gradient/norm"):
        assert ours[key] == pytest.approx(plain[key], rel=100 * tolerance)
    events = [
        [(event["step"], sorted(event)) for event in map(json.loads, (folder / "metrics.jsonl").open())]
        for folder in (found, wanted)
    ]
    assert events[0] == events[1]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "counts"),
    [
        ("float64", 1e-10, [2]),
        pytest.param("float64", 1e-10, [3], marks=pytest.mark.nightly),
        pytest.param("float32", 1e-5, [2], marks=pytest.mark.slow),
        pytest.param("float64", 1e-10, [1], marks=pytest.mark.nightly),
        pytest.param("float32", 1e-5, [1, 3], marks=pytest.mark.nightly),
    ],
)
def test_the_number_of_processes_does_not_change_a_run(run_train, tmp_path, dtype, tolerance, counts):
    run = (*RUN, f"dtype={dtype}")
    assert run_train(*run, "hydra.run.dir=plain").returncode == 0
    for count in counts:
        code, out, err = _ended(_torchrun(tmp_path, count, *run, f"hydra.run.dir={count}"))
        assert code == 0, err
        assert out.count("meta-test accuracy") == 1  # one process speaks
        _assert_same_run(tmp_path / str(count), tmp_path / "plain", tolerance)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", *map(str, counts)}  # and writes


def _assert_two_are_as_one(run_train, tmp_path, run):
    assert run_train(*run, "hydra.run.dir=plain").returncode == 0
    code, _, err = _ended(_torchrun(tmp_path, 2, *run, "hydra.run.dir=two"))
    assert code == 0, err
    _assert_same_run(tmp_path / "two", tmp_path / "plain", 1e-10)


@pytest.mark.slow
def test_an_estimators_own_variables_and_its_progress_reach_all_processes(run_train, tmp_path):
    run = (*RUN, "dtype=float64", "estimator=maml", "estimator.learn_lr=1", "estimator.multi_step=0.5")
    run += ("estimator.second_order_from=0.25",)
    _assert_two_are_as_one(run_train, tmp_path, run)


@pytest.mark.slow
def test_batches_and_stages_are_those_of_a_single_process_and_go_on(run_train, tmp_path):
    run = (*RUN, "steps=40", "dtype=float64", "solver.batch=5", "solver.query_batch=4")
    run += ("inner=[{until: 0.5, steps: 3, query_batch: 3}]",)
    _assert_two_are_as_one(run_train, tmp_path, run)
    job = _torchrun(tmp_path, 2, *run, "hydra.run.dir=stopped")
    wait_until(lambda: _logged(tmp_path / "stopped" / "metrics.jsonl") > 8, job)
    os.kill(job.pid, signal.SIGTERM)
    assert _ended(job)[0] != 0
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["status"] == "interrupted"
    code, _, err = _ended(_torchrun(tmp_path, 2, *run, "hydra.run.dir=stopped"))
    assert code == 0, err
    _assert_same_run(tmp_path / "stopped", tmp_path / "two", 0.0)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("meta_batch=1",), "error: meta_batch=1: takes at least 2, a task for each process"),
        (("nothing=2",), "error: nothing: there is no such setting .*"),
        pytest.param(
            ("seed=${oc.env:NOT_SET}",),
            "error: .*Environment variable 'NOT_SET' not found.*seed",
            marks=pytest.mark.nightly,
        ),
        (("-m", "seed=0,1"), "error: --multirun: takes one process, .*"),
    ],
)
def test_bad_input_is_said_once(tmp_path, overrides, line):
    code, out, err = _ended(_torchrun(tmp_path, 2, *overrides))
    assert code != 0
    said = [text for text in (out + err).splitlines() if "error: " in text]
    assert len(said) == 1
    assert re.fullmatch(line, said[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _logged(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
def test_killed_and_stopped_jobs_end_at_once_and_continue(run_train, tmp_path):
    run = (*RUN, "steps=60", "checkpoint_every=5", "dtype=float64")
    assert run_train(*run, "hydra.run.dir=plain").returncode == 0
    metrics = tmp_path / "run" / "metrics.jsonl"

    job = _torchrun(tmp_path, 2, *run, "hydra.run.dir=run")
    wait_until(lambda: _logged(metrics) > 6, job)
    (second,) = (number for number, environment in processes_in(tmp_path) if "\0RANK=1\0" in environment)
    os.kill(second, signal.SIGKILL)
    started = time.monotonic()
    code, _, err = _ended(job)
    assert code != 0
    assert time.monotonic() - started < 60  # not the day that collectives wait
    assert f"Signal 9 (SIGKILL) received by PID {second}" in err  # says torchrun, which then stops the first process,
    said = re.search("error: another process of this run has ended|stopped by SIGTERM", err)  # unless it has seen it
    assert said, err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == (
        "failed" if said[0].startswith("error") else "interrupted"
    )

    for processes, steps, stop, signalled in (
        (2, 12, os.kill, signal.SIGTERM),  # torchrun hands it to all,
        (2, 24, os.killpg, signal.SIGINT),
    ):  # as a terminal does with Ctrl-C
        job = _torchrun(tmp_path, processes, *run, "hydra.run.dir=run")
        wait_until(lambda steps=steps: _logged(metrics) > steps, job)
        stop(job.pid, signalled)
        code, _, err = _ended(job)
        assert code != 0
        assert re.search(
            rf"stopped by {signalled.name} at step \d+; the same command with hydra.run.dir=\S+ continues", err
        ), err
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"

    assert run_train(*run, "hydra.run.dir=run").returncode == 0
    _assert_same_run(tmp_path / "run", tmp_path / "plain", 1e-10)


def test_what_fails_in_one_process_is_said_and_ends_the_job(tmp_path):
    """The exact estimator in float32 misses its tolerance in every share; each process finds out by itself."""
    code, _, err = _ended(
        _torchrun(tmp_path, 2, *RUN, "estimator=exact", "solver=newton_cg", "solver.steps=1", "hydra.run.dir=run")
    )
    assert code != 0
    assert re.search("error: .*the exact meta-gradient at step 1 is not available", err)


FIRST_ERROR = """
import os, sys, time
import torch
from fobmaml import distributed
def call():
    torch.distributed.barrier()  # the first is connected
    if distributed.rank():
        os._exit(3)
    time.sleep(1)  # until the other is gone
    raise ValueError("the first error")
try:
    with distributed.processes():
        distributed.everywhere(call)
except BaseException as error:
    print(type(error).__name__, error)
"""


def test_an_error_is_not_hidden_by_a_process_that_is_gone(tmp_path):
    """Without torchrun, which would end the process that has something to say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", FIRST_ERROR],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **together, "RANK": str(rank)},
        )
        for rank in range(2)
    )
    out, err = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert second.returncode == 3
    assert out == "ValueError the first error\n", err
