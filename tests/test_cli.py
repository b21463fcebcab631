"""The command line as a user meets it: real runs, real wandb offline, and one clear line for every bad value."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import QUIET, ROOT, processes_in, start_train, wait_until
from kill_test import result
from wandb_records import read_run

SUMMARY_KEYS = {"status", "step", "test/accuracy", "test/accuracy_ci95", "test/loss", "memory/peak_bytes",
                "bias/relative_error", "bias/cosine", "time/meta_step_s", "inner/residual", "meta_gradient/norm",
                "model/parameters"}
QUICK = ("width=8", "steps=3", "eval.tasks=20", "eval.validation_tasks=10", "bias.tasks=2")


def _summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def _complete(folder: Path) -> dict:
    summary = _summary(folder)
    assert summary["status"] == "completed"
    assert summary.keys() >= SUMMARY_KEYS
    for name in ("metrics.jsonl", "checkpoint.pt", "train.log", "learning_curve.png", ".hydra/config.yaml"):
        assert (folder / name).exists()
    run = read_run(folder)
    assert run["exit_code"] == 0
    assert run["config"]["width"] == summary["config"]["width"]
    assert run["config"]["estimator"] == summary["config"]["estimator"]
    assert run["summary"]["test/loss"] == pytest.approx(summary["test/loss"])
    return summary


def test_every_estimator_makes_a_complete_run(run_train, tmp_path):
    names = ["forward", "symmetric", "central4", "maml", "fomaml", "reptile", "imaml", "exact"]
    done = run_train("-m", f"estimator={','.join(names)}", "width=16", "steps=3", "eval.tasks=20",
                     "eval.validation_tasks=10", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    for name in names:
        (folder,) = (tmp_path / "sweep").glob(f"*estimator={name},*")
        summary = _complete(folder)
        assert summary["choices"]["estimator"] == name
        assert summary["step"] == 3
        assert summary["model/parameters"] == 2069
        assert 0.1 < summary["test/accuracy"] < 0.4
        # every number is there: the bias too, for every estimator at its default setting
        assert all(isinstance(summary[key], float | int) for key in SUMMARY_KEYS - {"status"}), summary


def test_multirun_makes_one_wandb_run_a_job(run_train, tmp_path):
    done = run_train("-m", "estimator=forward,symmetric", "width=16,32", "steps=3", "eval.tasks=20",
                     "eval.validation_tasks=10", "bias.every=0", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "sweep").glob("*/"))
    found = {(s["choices"]["estimator"], s["config"]["width"]) for s in map(_complete, folders)}
    assert found == {(e, w) for e in ("forward", "symmetric") for w in (16, 32)}
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*"))) == 4
    assert {read_run(folder)["group"] for folder in folders} == {"sweep"}


@pytest.mark.slow
def test_width_250(run_train, tmp_path):
    done = run_train("estimator=symmetric", "width=250", "steps=3", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert all(value is not None for key, value in _complete(tmp_path / "run").items() if key in SUMMARY_KEYS)


@pytest.mark.slow
def test_the_default_run_learns(run_train, tmp_path):
    """What `make train` does: some minutes, and an accuracy above the 88 % asked of more than three times the steps."""
    done = run_train("hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = _complete(tmp_path / "run")
    assert summary["test/accuracy"] > 0.88
    assert summary["bias/cosine"] > 0.5


@pytest.mark.parametrize("overrides", [("dataset=sinusoid",), ("dataset=logistic",), ("model=mlp", "depth=2"),
                                       ("solver=bb", "estimator.lam=2", "solver.tol=1e-3"),
                                       ("solver=newton_cg", "estimator.lam=2", "dtype=float64"), ("optimizer=adam",),
                                       ("optimizer=clipped_sgd", "dtype=float64"), ("optimizer=sgd", "depth=5")])
def test_the_other_choices_work(run_train, tmp_path, overrides):
    done = run_train(*QUICK, *overrides, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = _complete(tmp_path / "run")
    assert summary["test/loss"] is not None
    assert (summary["test/accuracy"] is None) == ("dataset=sinusoid" in overrides)
    if "solver=newton_cg" in overrides:  # the symmetric estimator with exact solves: the truncation error alone
        assert summary["bias/relative_error"] < 1e-2


def test_the_table_is_printed(run_train, tmp_path):
    done = run_train(*QUICK, "bias.every=0", "hydra.run.dir=run", "wandb.mode=disabled")
    assert re.search(r"meta-test accuracy +\d+\.\d ± \d\.\d %", done.stdout)
    assert re.search(r"memory of a meta-gradient +\d+\.\d MB", done.stdout)
    assert re.search(r"time of a meta-step +\d\.\d+ s", done.stdout)
    picture = re.search(r"learning curve +(\S+)", done.stdout)
    assert Path(picture[1]).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize(("overrides", "line"), [
    (["estimator=foo"],
     "estimator=foo: takes one of central4, exact, fomaml, forward, imaml, maml, maml_checkpoint, reptile, "
     "symmetric"),
    (["dataset=foo"], "dataset=foo: takes one of logistic, mnist1d, sinusoid"),
    (["width=0"], "width=0: takes a whole number of at least 1"),
    (["width=abc"], "width=abc: takes a whole number of at least 1"),
    (["estimator.nu=0"], "estimator.nu=0: takes a finite number above 0"),
    (["estimator.lam=-1"], "estimator.lam=-1: takes a finite number above 0"),
    (["solver.steps=0"], "solver.steps=0: takes a whole number of at least 1"),
    (["dataset.ways=11"], "dataset.ways=11: takes a whole number of at least 2 and at most 10"),
    (["dataset.shots=100000"], "dataset.shots=100000: takes at most 80 with shots and queries together.*"),
    (["device=cuda:99"], "device=cuda:99: takes a GPU that is there, and PyTorch finds .*"),
    (["resume=missing.pt"], "resume=missing.pt: takes a checkpoint file, and there is none"),
    (["optimizer.lr=-1"], "optimizer.lr=-1: takes a finite number above 0"),
    (["eval.every=0"], "eval.every=0: takes a whole number of at least 1"),
    (["eval.tasks=1"], "eval.tasks=1: takes a whole number of at least 2, or 0 for none"),
    (["dataset.loss=l1"], "dataset.loss=l1: takes one of cross_entropy, mse"),
    (["curvature.every=1", "solver=bb"], "curvature.every=1: takes solver=gd without momentum, or 0 for never"),
    (["depht=3"], "depht: there is no such setting.*"),
    (["dataset=sinusoid", "model=cnn"], r"model=cnn: input_shape=\(1,\): takes one sequence of at least 3 values.*"),
    (["estimator=maml", "solver=bb"], "estimator=maml: solver=BarzilaiBorwein: takes a solver with differentiable.*"),
])
def test_bad_input_is_one_line_and_leaves_nothing(run_train, tmp_path, overrides, line):
    done = run_train(*overrides)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run_train):
    done = run_train("device=cuda")
    assert re.fullmatch("error: device=cuda: takes a GPU that is there, .*\n", done.stderr)


def test_truncated_checkpoint(run_train, tmp_path):
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 not all of it")
    done = run_train("resume=c.pt")
    assert done.returncode != 0
    assert re.fullmatch("error: resume=c.pt: takes a whole checkpoint .*\n", done.stderr)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(run_train, tmp_path):
    done = run_train("hydra.run.dir=run", "width=8", "steps=50", "optimizer=sgd", "optimizer.lr=1e30",
                     "checkpoint_every=1", "eval.every=100", "bias.every=0", "eval.validation_tasks=4")
    assert done.returncode != 0
    found = re.fullmatch(r"error: the meta-gradient at step (\d+) is not finite: try a smaller solver.lr or "
                         r"optimizer.lr, or a larger estimator.lam; the last good checkpoint is (\S+)\n", done.stderr)
    assert found, done.stderr
    state = torch.load(found[2], weights_only=True)
    assert state["step"] == int(found[1]) - 1
    assert all(torch.isfinite(p).all() for p in state["model"].values())
    summary = _summary(tmp_path / "run")
    assert summary["status"] == "failed"
    assert "is not finite" in summary["reason"]
    assert read_run(tmp_path / "run")["exit_code"] == 1


LONG = ("width=8", "steps=30", "log_every=1", "eval.every=7", "checkpoint_every=4", "bias.every=30", "bias.tasks=2",
        "eval.tasks=20", "eval.validation_tasks=10", "wandb.mode=disabled")


def _start_and_stop(folder: Path, stop: signal.Signals, after_step: int) -> subprocess.Popen:
    """A run in ``folder`` that gets a signal once it has logged ``after_step``."""
    process = start_train(folder.parent, *LONG, f"hydra.run.dir={folder}")
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and f'"step": {after_step},' in metrics.read_text(), process)
    process.send_signal(stop)
    return process


def test_stopped_and_continued_is_uninterrupted_bit_for_bit(run_train, tmp_path):
    assert run_train(*LONG, "hydra.run.dir=whole").returncode == 0
    wanted = result(tmp_path / "whole")
    # killed at once, started again in its folder
    killed = _start_and_stop(tmp_path / "killed", signal.SIGKILL, 6)
    killed.wait()
    assert run_train(*LONG, "hydra.run.dir=killed").returncode == 0
    assert result(tmp_path / "killed") == wanted
    # asked to stop: writes a checkpoint, and says how to go on
    stopped = _start_and_stop(tmp_path / "stopped", signal.SIGTERM, 9)
    _, said = stopped.communicate()
    assert stopped.returncode == 130
    assert re.search(r"stopped by SIGTERM at step \d+; the same command with hydra.run.dir=\S+ continues", said)
    assert _summary(tmp_path / "stopped")["status"] == "interrupted"
    # continued elsewhere
    assert run_train(*LONG, "hydra.run.dir=elsewhere", "resume=stopped/checkpoint.pt").returncode == 0
    assert result(tmp_path / "elsewhere") == wanted
    # a complete run is not run again, and a run does not continue under other settings
    before = (tmp_path / "whole" / "summary.json").stat().st_mtime_ns
    again = run_train(*LONG, "hydra.run.dir=whole")
    assert again.returncode == 0
    assert "is complete" in again.stdout
    assert (tmp_path / "whole" / "summary.json").stat().st_mtime_ns == before
    other = run_train(*LONG, "hydra.run.dir=whole", "width=9")
    assert re.fullmatch(r"error: checkpoint \S+: takes a checkpoint of the same configuration, and here .*width=9 "
                        r"\(there 8\).*\n", other.stderr)


@pytest.mark.slow
def test_killed_at_random_moments():
    """A few of the hundred kills that the script makes by default."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--kills", "8"], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 kills of ")


def test_training_goes_on_when_wandbs_service_is_killed(run_train, tmp_path):
    plain = run_train(*LONG, "hydra.run.dir=plain")
    assert plain.returncode == 0
    process = start_train(tmp_path, *LONG[:-1], "hydra.run.dir=run")

    def killed() -> bool:
        for number, _ in processes_in(tmp_path):
            with suppress(OSError):
                if f"--pid\0{process.pid}\0" in Path(f"/proc/{number}/cmdline").read_text():
                    os.kill(number, signal.SIGKILL)
                    return True
        return False

    wait_until(killed, process)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.search(r"wandb \S+.* failed, and training goes on without it", out)
    assert "Traceback" not in out + err
    assert result(tmp_path / "run") == result(tmp_path / "plain")


def test_without_a_network_an_online_run_is_kept_offline(run_train, tmp_path):
    done = run_train(*QUICK, "bias.every=0", "hydra.run.dir=run", "wandb.mode=online",
                     env={"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert "wandb init (online) failed" in done.stdout
    _complete(tmp_path / "run")


def test_wandb_without_a_place_to_write(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    done = run_train(*QUICK, "bias.every=0", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert _summary(tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("wandb", ["disabled", "offline"])
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(run_train, tmp_path, wandb):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=56k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = (*QUICK, "steps=120", "log_every=1", "checkpoint_every=2", "bias.every=0", f"wandb.mode={wandb}",
               f"hydra.run.dir={disk}/run")
        done = run_train(*run)
        assert done.returncode == 1
        assert re.fullmatch(r"error: \S+: cannot be written \(No space left on device\); what was written before is "
                            "whole\n", done.stderr), done.stderr
        state = torch.load(disk / "run" / "checkpoint.pt", weights_only=True)
        assert 0 < state["step"] < 120
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert run_train(*run).returncode == 0
        assert run_train(*run[:-2], "wandb.mode=disabled", "hydra.run.dir=plain").returncode == 0
        assert result(disk / "run") == result(tmp_path / "plain")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = run_train(*run[:-1], f"hydra.run.dir={disk}/other")
        assert done.returncode == 1
        assert re.fullmatch(r"error: \S+: cannot be written \(Read-only file system\)\n", done.stderr), done.stderr
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_memory_does_not_grow(run_train, tmp_path):
    """Resident memory over 5000 meta-steps, from the first hundred on."""
    process = start_train(tmp_path, "width=4", "steps=5000", "meta_batch=1", "solver.steps=2", "log_every=10",
                          "eval.every=500", "eval.validation_tasks=10", "eval.tasks=0", "bias.every=0",
                          "wandb.mode=disabled", "hydra.run.dir=run", **QUIET)
    resident, metrics = [], tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        steps = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
        step = int(steps[-1]) if steps else 0
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()
        if step >= 100 and len(pages) > 1 and step < 5000:  # the plot comes after the last step
            resident.append(int(pages[1]))
        time.sleep(0.2)
    assert process.returncode == 0
    assert len(resident) > 20
    assert resident[-1] < 1.03 * resident[0]
