"""Sweeps: the same numbers by every launcher, what is complete is not run again, and failed jobs are listed."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import QUIET, processes_in, start_train, wait_until

from fobmaml.run import sweeps

QUICK = ("width=4", "steps=3", "eval.tasks=20", "eval.validation_tasks=10", "bias.every=0", "wandb.mode=disabled")
SWEEP = ("-m", *QUICK, "steps=20,60", "checkpoint_every=5", "estimator=forward,symmetric")
MEASURED = ("test/accuracy", "test/loss", "val/loss", "train/loss", "memory/peak_bytes", "step", "status")


def _results(folder: Path) -> dict[str, tuple]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("multirun/*/*/summary.json")}
    return {job: tuple(summary[key] for key in MEASURED) for job, summary in found.items()}


def test_a_sweep_is_named_after_its_settings():
    name = sweeps.name_of(["-m", "seed=0,1", "width=4"])
    assert name == sweeps.name_of(["width=4", "seed=0,1", "--multirun", "hydra/launcher=ray", "hydra.launcher.x=3"])
    others = (
        ["-m", "seed=0,1", "width=8"],
        ["-m", "seed=0,1", "width=4", "--config-dir=a"],
        ["-m", "seed=0,1", "width=4", "-cn", "a"],
        ["-m", "seed=0,1", "width=4", "-cp=a"],
    )
    assert len({name, *map(sweeps.name_of, others)}) == 5


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


@pytest.mark.parametrize(
    "launcher", [pytest.param("basic", marks=pytest.mark.nightly), pytest.param("joblib", marks=pytest.mark.slow)]
)
def test_failed_jobs_are_listed_wherever_they_work(run_train, tmp_path, launcher):
    done = run_train(
        "-m",
        *QUICK,
        "optimizer.lr=-1,0.1",
        "hydra.job.chdir=true",
        "hydra.sweep.dir=a/b",
        f"hydra/launcher={launcher}",
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    assert re.search(
        "error: 1 of the jobs failed; the same command runs them again:\n  .* optimizer.lr=-1: "
        "optimizer.lr=-1: takes a finite number above 0\n$",
        done.stderr,
    ), done.stderr
    assert [path.parent.parent for path in tmp_path.rglob("failed.jsonl")] == [tmp_path / "a"]
    assert [path.parent.parent for path in tmp_path.rglob("summary.json")] == [tmp_path / "a" / "b"]


def test_what_is_given_from_here_is_found_from_the_jobs_folder(run_train, tmp_path):
    assert run_train(*QUICK, "hydra.run.dir=run").returncode == 0
    done = run_train("-m", *QUICK, "resume=run/checkpoint.pt", "hydra.job.chdir=true", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert [result[-1] for result in _jobs(tmp_path / "sweep")] == ["completed"]


def _jobs(sweep: Path) -> list[tuple]:
    return [
        (
            path.parent.name,
            (path.parent / ".hydra" / "overrides.yaml").read_text(),
            json.loads(path.read_text())["status"],
        )
        for path in sorted(sweep.glob("*/summary.json"))
    ]


def test_names_of_jobs_fit_into_a_folder(run_train, tmp_path):
    """Overrides with slashes, or longer than a file name may be, and none at all; ordinary ones are as they were."""
    assert run_train(*QUICK, "hydra.run.dir=run").returncode == 0
    note = "n" * 150
    done = run_train("-m", *QUICK, f"resume={tmp_path}/run/checkpoint.pt", "hydra.sweep.dir=slashes")
    assert done.returncode == 0, done.stderr
    done = run_train("-m", *QUICK, f"+wandb.notes={note}", f"+wandb.job_type={note}1,{note}2", "hydra.sweep.dir=long")
    assert done.returncode == 0, done.stderr
    ((name, overrides, _),) = _jobs(tmp_path / "slashes")
    assert f"resume={tmp_path}/run/checkpoint.pt" in overrides
    assert "resume=_" in name
    long = _jobs(tmp_path / "long")
    assert len(long) == 2
    for (name, overrides, status), last in (
        zip(long, (2, 1), strict=True) if f"{note}2" in long[0][1] else zip(long, (1, 2), strict=True)
    ):
        assert len(os.fsencode(name)) <= 255
        assert f"wandb.job_type={note}{last}" in overrides
        assert status == "completed"
    done = run_train("-m", *QUICK, "seed=0", "hydra.sweep.dir=plain")
    assert [name for name, *_ in _jobs(tmp_path / "plain")] == [",".join(sorted((*QUICK, "seed=0")))]


def test_the_name_tells_all_that_differs(run_train, tmp_path):
    """Settings that names leave out, once several are swept or the folder is not named after them; other files of
    configuration."""
    for name, width in (("first", 4), ("second", 5)):
        (tmp_path / name / "experiment").mkdir(parents=True)
        for experiment, seed in (("one", 1), ("two", 2)):
            (tmp_path / name / "experiment" / f"{experiment}.yaml").write_text(
                f"# @package _global_\nseed: {seed}\nwidth: {width}\n"
            )
    plain = [setting for setting in QUICK if setting != "width=4"]
    for source in ("first", "second"):
        for folder in ((), ("hydra.sweep.dir=sweep",)):
            done = run_train("-m", f"--config-dir={source}", *plain, "experiment=one,two", *folder)
            assert done.returncode == 0, done.stderr
    found = sorted(
        (summary["config"]["seed"], summary["config"]["width"])
        for summary in (json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/summary.json"))
    )
    assert found == [(1, 4), (1, 5), (2, 4), (2, 5)]
    assert len(list(tmp_path.glob("multirun/*"))) == 2
    assert len(list(tmp_path.glob("multirun/*/*/summary.json"))) == 4


def test_an_experiment_names_the_folder_or_the_job(run_train, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    for seed, name in enumerate(("one", "two")):
        (tmp_path / "mine" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\nseed: {seed}\n")
        for folder in (f"all/{name}", "both"):
            done = run_train("-m", "--config-dir=mine", *QUICK, f"experiment={name}", f"hydra.sweep.dir={folder}")
            assert done.returncode == 0, done.stderr
    both = [name for name, *_ in _jobs(tmp_path / "both")]
    assert ["experiment=one" in name for name in both] == [True, False]
    assert ["experiment=two" in name for name in both] == [False, True]
    ((name, *_),) = _jobs(tmp_path / "all" / "one")
    assert name == ",".join(sorted(QUICK)) + ",--config-dir=mine"


def test_a_sweep_that_cannot_be_composed_leaves_an_older_one_as_it_was(run_train, tmp_path):
    assert run_train("-m", *QUICK, "seed=0", "hydra.sweep.dir=sweep").returncode == 0
    before = (tmp_path / "sweep" / "multirun.yaml").read_bytes()
    for folder in ("sweep", "other"):
        done = run_train("-m", *QUICK, "depht=0,1", f"hydra.sweep.dir={folder}")
        assert done.stderr == "error: depht: there is no such setting (python train.py --help lists them)\n"
    assert (tmp_path / "sweep" / "multirun.yaml").read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_a_folder_in_use_is_refused(run_train, tmp_path):
    run = (*QUICK, "hydra.run.dir=run", "steps=100000")
    process = start_train(tmp_path, *run, **QUIET)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, process)
    done = run_train(*run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert done.returncode == 1
    assert done.stderr == f"error: hydra.run.dir={tmp_path / 'run'}: takes a folder in which no other process works\n"


@pytest.mark.slow
def test_a_killed_search_is_completed_and_grows(run_train, tmp_path):
    gently = "hydra.sweeper.params={optimizer.lr: 'interval(0.001, 0.01)', solver.lr: 'interval(0.01, 0.02)'}"
    search = ("-m", "search=optuna", *QUICK, "steps=40", "checkpoint_every=1", "eval.tasks=0", gently)

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


def test_an_estimator_without_nu_is_searched_without_it(run_train, tmp_path):
    done = run_train("-m", "search=optuna", *QUICK, "estimator=fomaml", "eval.tasks=0", "hydra.sweeper.n_trials=1")
    assert done.returncode == 0, done.stderr
    (job,) = _results(tmp_path)
    assert "optimizer.lr=" in job
    assert "estimator.nu=" not in job


@pytest.mark.slow
def test_submitit_runs_the_jobs(run_train, tmp_path):
    done = run_train("-m", *QUICK, "hydra/launcher=submitit_local", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert sorted(result[-1] for result in _results(tmp_path).values()) == ["completed"] * 2


@pytest.fixture(scope="module", params=["0", pytest.param("0,1,2", marks=pytest.mark.nightly)])
def plain(request, tmp_path_factory) -> tuple[tuple[str, ...], dict[str, tuple]]:
    """A sweep and its results, by no launcher, one job after another."""
    sweep, folder = (*SWEEP, f"seed={request.param}"), tmp_path_factory.mktemp("plain")
    assert start_train(folder, *sweep, **QUIET).wait() == 0
    results = _results(folder)
    assert len(results) == 4 * len(request.param.split(","))
    return sweep, results


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", pytest.param("ray", marks=pytest.mark.nightly)])
def test_jobs_killed_and_continued_are_the_plain_sweep(run_train, plain, tmp_path, launcher):
    command, wanted = plain
    killed = start_train(tmp_path, *command, f"hydra/launcher={launcher}", **QUIET)
    some = len(wanted) // 4
    wait_until(lambda: len(_results(tmp_path)) >= some, killed)
    killed.kill()
    killed.wait()
    for process, _ in processes_in(tmp_path):  # its jobs: a kill of the whole machine's share
        os.kill(process, signal.SIGKILL)
    complete = {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/*/*/summary.json")}
    assert some <= len(complete) < len(wanted)

    done = run_train(*command, f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert _results(tmp_path) == wanted
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
