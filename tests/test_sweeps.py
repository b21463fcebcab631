"""Sweeps: the same numbers by every launcher, what is complete is not run again, and failed jobs are listed."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import QUIET, processes_in, start_train, wait_until

from fobmaml import sweeps

QUICK = ("width=4", "steps=3", "eval.tasks=20", "eval.validation_tasks=10", "bias.every=0", "wandb.mode=disabled")
TWELVE = ("-m", *QUICK, "steps=30", "checkpoint_every=5", "estimator=forward,symmetric", "seed=0,1,2,3,4,5")
MEASURED = ("test/accuracy", "test/loss", "val/loss", "train/loss", "memory/peak_bytes", "step", "status")


def _results(folder: Path) -> dict[str, tuple]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("multirun/*/*/summary.json")}
    return {job: tuple(summary[key] for key in MEASURED) for job, summary in found.items()}


def test_a_sweep_is_named_after_its_settings():
    name = sweeps.name_of(["-m", "seed=0,1", "width=4"])
    assert name == sweeps.name_of(["width=4", "seed=0,1", "--multirun", "hydra/launcher=ray", "hydra.launcher.x=3"])
    assert name != sweeps.name_of(["-m", "seed=0,1", "width=8"])


def test_failed_jobs_are_listed_and_the_rest_is_kept(run_train, tmp_path):
    sweep = ("-m", *QUICK, "optimizer.lr=-1,0.1", "seed=0,1")
    done = run_train(*sweep)
    assert done.returncode == 1
    listed = done.stderr.split("error: 2 of the jobs failed; the same command runs them again:\n")[1].splitlines()
    for seed, line in enumerate(listed):
        assert f"seed={seed}" in line
        assert line.endswith(": optimizer.lr=-1: takes a finite number above 0")
    assert len(listed) == 2
    assert "Traceback" not in done.stderr
    assert len(_results(tmp_path)) == 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/*/*/summary.json")}
    assert run_train(*sweep).returncode == 1
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_folder_in_use_is_refused(run_train, tmp_path):
    run = (*QUICK, "hydra.run.dir=run", "steps=100000")
    process = start_train(tmp_path, *run, **QUIET)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, process)
    done = run_train(*run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert done.returncode == 1
    assert done.stderr == f"error: hydra.run.dir={tmp_path / 'run'}: takes a folder in which no other process works\n"


def test_a_killed_search_is_completed_and_grows(run_train, tmp_path):
    search = ("-m", "search=optuna", *QUICK, "steps=40", "checkpoint_every=1", "eval.tasks=0")

    def checkpoints() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in tmp_path.glob("multirun/*/*/checkpoint.pt")}

    process = start_train(tmp_path, *search, "hydra.sweeper.n_trials=3", **QUIET)
    wait_until(lambda: len(_results(tmp_path)) == 1 and len(checkpoints()) == 2, process)
    process.kill()
    process.wait()
    (complete,) = _results(tmp_path)
    (cut_short,) = (path.parent for path in checkpoints() if path.parent.name != complete)
    last = torch.load(cut_short / "checkpoint.pt", weights_only=True)["step"]
    for again, trials in enumerate((3, 3, 4)):  # the second time there is nothing to do
        before = checkpoints() if again else {}
        done = run_train(*search, f"hydra.sweeper.n_trials={trials}")
        assert done.returncode == 0, done.stderr
        assert len(_results(tmp_path)) == trials
        assert checkpoints().items() >= before.items()
        assert (cut_short / "summary.json").exists()
        log = (cut_short / "train.log").read_text()
        assert f"continuing {cut_short / 'checkpoint.pt'} at step {last}" in log
    (best,) = tmp_path.glob("multirun/*/optimization_results.yaml")
    assert "best_value" in best.read_text()


def test_submitit_runs_the_jobs(run_train, tmp_path):
    done = run_train("-m", *QUICK, "hydra/launcher=submitit_local", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert sorted(result[-1] for result in _results(tmp_path).values()) == ["completed"] * 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, tuple]:
    folder = tmp_path_factory.mktemp("plain")
    assert start_train(folder, *TWELVE, **QUIET).wait() == 0
    return _results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_twelve_jobs_killed_and_continued_are_the_plain_sweep(run_train, plain, tmp_path, launcher):
    assert len(plain) == 12
    sweep = start_train(tmp_path, *TWELVE, f"hydra/launcher={launcher}", **QUIET)
    wait_until(lambda: len(_results(tmp_path)) >= 3, sweep)
    sweep.kill()
    sweep.wait()
    for process, _ in processes_in(tmp_path):  # its jobs: a kill of the whole machine's share
        os.kill(process, signal.SIGKILL)
    complete = {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/*/*/summary.json")}
    assert 3 <= len(complete) < 12

    done = run_train(*TWELVE, f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert _results(tmp_path) == plain
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
