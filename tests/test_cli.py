"""The command line as a user meets it: real runs, real wandb offline, and one clear line for every bad value."""

import json
import os
import re
import shutil
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

SUMMARY_KEYS = {
    "status",
    "step",
    "test/accuracy",
    "test/accuracy_ci95",
    "test/loss",
    "memory/peak_bytes",
    "bias/relative_error",
    "bias/cosine",
    "time/meta_step_s",
    "inner/residual",
    "meta_gradient/norm",
    "work/example_gradients",
    "work/hessian_products",
    "model/parameters",
}
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


@pytest.mark.slow
def test_every_estimator_makes_a_complete_run(run_train, tmp_path):
    names = ["fobmaml", "forward", "symmetric", "central4", "maml", "fomaml", "reptile", "imaml", "exact"]
    done = run_train(
        "-m",
        f"estimator={','.join(names)}",
        "width=16",
        "steps=3",
        "eval.tasks=20",
        "eval.validation_tasks=10",
        "bias.tasks=2",
        "hydra.sweep.dir=sweep",
    )
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
    done = run_train(
        "-m",
        "estimator=forward,symmetric",
        "width=16,32",
        "steps=3",
        "eval.tasks=20",
        "eval.validation_tasks=10",
        "bias.every=0",
        "hydra.sweep.dir=sweep",
    )
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "sweep").glob("*/"))
    found = {(s["choices"]["estimator"], s["config"]["width"]) for s in map(_complete, folders)}
    assert found == {(e, w) for e in ("forward", "symmetric") for w in (16, 32)}
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*"))) == 4
    assert {read_run(folder)["group"] for folder in folders} == {"sweep"}


FEWER_TASKS = ("eval.tasks=20", "eval.validation_tasks=10", "meta_batch=4", "bias.every=0")


@pytest.mark.parametrize(
    "tasks", [pytest.param(FEWER_TASKS, marks=pytest.mark.slow), pytest.param((), marks=pytest.mark.nightly)]
)
def test_width_250(run_train, tmp_path, tasks):
    done = run_train("estimator=symmetric", "width=250", "steps=3", *tasks, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = _complete(tmp_path / "run")
    unmeasured = {key for key in SUMMARY_KEYS if summary[key] is None}
    assert unmeasured == ({"bias/relative_error", "bias/cosine"} if tasks else set())


@pytest.mark.parametrize(
    ("shorter", "accuracy"),
    [
        pytest.param(("steps=500", "bias.tasks=2"), 0.8, marks=pytest.mark.slow),
        pytest.param((), 0.94, marks=pytest.mark.nightly),
    ],
)
def test_the_default_run_learns(run_train, tmp_path, shorter, accuracy):
    """What `make train` does. The bias is that of seven coarse inner steps, on a few tasks."""
    done = run_train("hydra.run.dir=run", *shorter)
    assert done.returncode == 0, done.stderr
    summary = _complete(tmp_path / "run")
    assert summary["test/accuracy"] > accuracy
    assert summary["bias/cosine"] > 0.2


@pytest.mark.parametrize("dataset", ["sinusoid", "logistic", "shapes1d"])
def test_a_data_set_brings_settings_that_it_learns_with(run_train, tmp_path, dataset):
    quick = ("width=8", "steps=60", "bias.every=0", "eval.tasks=20", "eval.validation_tasks=0", "wandb.mode=disabled")
    done = run_train(f"dataset={dataset}", *quick, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    losses = [
        json.loads(line)["train/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:-1]
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("dataset=sinusoid",),
        ("dataset=logistic",),
        ("model=mlp", "depth=2"),
        ("solver=bb", "estimator.lam=2", "solver.tol=1e-3"),
        ("estimator=symmetric", "solver=newton_cg", "estimator.lam=2", "dtype=float64"),
        ("optimizer=adam",),
        ("optimizer=clipped_sgd", "dtype=float64"),
        ("optimizer=sgd", "depth=5"),
    ],
)
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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["estimator=foo"],
            "estimator=foo: takes one of central4, exact, fobmaml, fomaml, forward, imaml, maml, maml_checkpoint, "
            "reptile, symmetric, tangent",
        ),
        (
            ["dataset=foo"],
            "dataset=foo: takes one of arrays, digits, image_folder, logistic, mini_imagenet, mnist1d, omniglot, "
            "shapes1d, sinusoid",
        ),
        (["width=0"], "width=0: takes a whole number of at least 1"),
        (["width=abc"], "width=abc: takes a whole number of at least 1"),
        (["estimator.nu=0"], "estimator.nu=0: takes a finite number above 0, or auto"),
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
        (
            ["curvature.every=1", "solver=bb"],
            "curvature.every=1: takes solver=gd without momentum and batches, or 0 for never",
        ),
        (["depht=3"], "depht: there is no such setting.*"),
        (
            ["dataset=sinusoid", "model=cnn"],
            r"model=cnn: input_shape=\(1,\): takes one sequence of at least 3 values.*",
        ),
        (
            ["estimator=maml", "solver=bb"],
            "estimator=maml: solver=BarzilaiBorwein: takes a solver with differentiable.*",
        ),
        (
            ["seed=18446744073709551616"],
            "seed=18446744073709551616: takes a whole number of at least 0 and at most 1844.*",
        ),
        (["-cn", "nope"], "Cannot find primary config 'nope'.*; looked in .*/configs"),
        (["--config-dir", "nope"], "Additional config directory '.*/nope' not found"),
        (["width=[1"], r"width=\[1; no viable alternative at input '\[1'"),
        (["hydra.mode=MULTI"], "Error merging override hydra.mode=MULTI; Invalid value 'MULTI', expected one of .*"),
        (["hydra.run.dir=${oc.env:NOT_SET}"], ".*Environment variable 'NOT_SET' not found.*hydra.run.dir"),
        (["-m", "hydra.sweep.dir=${oc.env:NOT_SET}"], ".*Environment variable 'NOT_SET' not found.*hydra.sweep.dir"),
        (["seed=${oc.env:NOT_SET}"], ".*Environment variable 'NOT_SET' not found.*seed"),
        (["model._target_=mine.Net"], "Error locating target 'mine.Net'; full_key: model; No module named 'mine'"),
        (
            ["optimizer._target_=builtins.dict"],
            "optimizer._target_=builtins.dict: takes one that makes a torch.optim.*",
        ),
        (["dataset._target_=builtins.dict"], "dataset: dict has no sample: takes .*"),
        (["+wandb.colour=red"], "wandb.colour=red: takes an argument of wandb.init: .*job_type.*"),
        (
            ["+wandb.resume=perhaps"],
            "wandb.resume=perhaps: takes what wandb does .*'allow', 'must', 'never' or 'auto'.*",
        ),
        (["wandb.mode=on"], "wandb.mode=.*: takes one of offline, online, disabled"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run_train, tmp_path, overrides, line):
    done = run_train(*overrides, env={"HYDRA_FULL_ERROR": "0"})  # off, as in Hydra
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr
    assert not list(tmp_path.rglob("*.*"))
    assert set(tmp_path.rglob("*")) <= {tmp_path / "outputs", *tmp_path.glob("outputs/*")}


def _content(folder: Path) -> dict[str, bytes | None]:
    """Every file below, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _plant(folder: Path) -> None:
    """A user's files, and what a run of this program has left."""
    for name, text in (
        ("mine", "a"),
        ("below/mine.txt", "b"),
        ("train.log", "a line"),
        ("empty/none", None),
        (".hydra/config.yaml", OWN),
        (".hydra/overrides.yaml", "[]"),
        (".hydra/hydra.yaml", "{}"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (folder / name).write_text(text)


OWN = "meta_batch: 1\ncheckpoint_every: 2\nwandb: {}\n"
WRONG = [
    ("width=0",),
    ("resume=missing.pt",),
    ("resume=mine",),
    ("depht=3",),
    ("estimator=foo",),
    ("-cn", "nope"),
    ("device=cuda:99",),
    ("model._target_=mine.Net",),
    ("seed=18446744073709551616",),
    ("+wandb.colour=red",),
    ("estimator=maml", "solver=bb"),
]


@pytest.mark.parametrize("place", ["keep", "."])
@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_what_is_there_survives_bad_input(run_train, tmp_path, wrong, place):
    _plant(tmp_path / place)
    before = _content(tmp_path)
    done = run_train(*wrong, f"hydra.run.dir={place}")
    assert done.returncode == 1
    assert re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert _content(tmp_path) == before


@pytest.mark.parametrize(
    "wrong",
    [
        ("width=0,1", "optimizer.lr=-1"),
        ("resume=missing.pt,mine",),
        ("width=0", "depht=3,4"),
        ("model._target_=mine.Net,our.Net",),
        ("estimator=foo,bar",),
    ],
    ids=" ".join,
)
def test_what_is_there_survives_bad_sweeps(run_train, tmp_path, wrong):
    _plant(tmp_path / "keep")
    jobs = [f"{wrong[0].split('=')[0]}={value}" for value in wrong[0].split("=")[1].split(",")]
    for job in jobs:  # one in the place of a job's folder, and an empty one
        _plant(tmp_path / "keep" / ",".join(sorted((job, *wrong[1:]))))
    before = _content(tmp_path)
    done = run_train("-m", *wrong, "hydra.sweep.dir=keep")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    after = _content(tmp_path)
    assert {name: after.get(name, b"gone") for name in before} == before
    assert after.keys() - before.keys() <= {"keep/multirun.yaml", "keep/failed.jsonl", "keep/jobs.jsonl"}


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "summary.json", "checkpoint.pt", "learning_curve.png", ".hydra/config.yaml"]
)
def test_files_of_another_program_are_not_overwritten(run_train, tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text('{"step": 7, "status": "completed"}\n')
    before = _content(tmp_path)
    done = run_train(*QUICK, "hydra.run.dir=run")
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{re.escape(name)}.*\n", done.stderr), done.stderr
    assert _content(tmp_path) == before


@pytest.mark.parametrize("name", ["multirun.yaml", "failed.jsonl", "optimization_results.yaml"])
def test_files_of_another_sweep_are_not_overwritten(run_train, tmp_path, name):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / name).write_text("mine: 1\n")
    before = _content(tmp_path)
    done = run_train("-m", *QUICK, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert re.fullmatch(
        f"error: hydra.sweep.dir=.*: takes a folder without {name} of another program, and there is one\n", done.stderr
    ), done.stderr
    assert _content(tmp_path) == before


def test_results_are_not_overwritten_once_their_checkpoint_is_gone(run_train, tmp_path):
    run = (*QUICK, "bias.every=0", "hydra.run.dir=run", "wandb.mode=disabled")
    assert run_train(*run).returncode == 0
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "elsewhere.pt")
    before = _content(tmp_path)
    for more in ((), ("resume=elsewhere.pt",), ("width=9",)):
        done = run_train(*run, *more)
        assert done.returncode == 1
        assert re.fullmatch("error: hydra.run.dir=.*: takes a folder without results.*\n", done.stderr), done.stderr
        assert _content(tmp_path) == before
    (tmp_path / "elsewhere.pt").rename(tmp_path / "run" / "checkpoint.pt")
    log = tmp_path / "run" / "metrics.jsonl"
    (tmp_path / "run" / "summary.json").unlink()
    log.write_text("a note\nand another\n" + log.read_text())
    before = _content(tmp_path)
    done = run_train(*run)
    assert re.fullmatch("error: .*metrics.jsonl: takes an event of this program's a line .*\n", done.stderr)
    assert _content(tmp_path) == before


@pytest.mark.slow
def test_runs_that_start_in_the_same_second_have_a_folder_each(tmp_path):
    run = (*QUICK, "bias.every=0", "wandb.mode=disabled")
    runs = [start_train(tmp_path, *run, f"width={width}", "hydra.run.dir='outputs/${now:%Y}'") for width in (4, 5, 6)]
    assert [process.wait(300) for process in runs] == [0, 0, 0]
    folders = list(tmp_path.glob("outputs/*"))
    assert sorted(_summary(folder)["config"]["width"] for folder in folders) == [4, 5, 6]
    for folder in folders:
        width = _summary(folder)["config"]["width"]
        assert f"width={width}" in (folder / ".hydra" / "overrides.yaml").read_text()
    assert "    dir: outputs/${now:" in (ROOT / "configs" / "train.yaml").read_text()  # the default is of that kind


@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.nightly), "koi8-r:strict", "utf-8"])
def test_output_in_any_encoding(run_train, encoding):
    done = run_train(*QUICK, "bias.every=0", "wandb.mode=disabled", env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(rf"meta-test accuracy +\d+\.\d {'±' if encoding == 'utf-8' else '[+]-'} \d", done.stdout)


ENDS = [
    ("| true", 0),
    ("| head -1", 0),
    ("2>&-", 0),
    (">&-", 0),
    ("<&- >&- 2>&-", 0),
    ("> /dev/full", 0),
    ("2>&1 width=0 | true", 1),
    ("optimizer.lr=1e30 optimizer=sgd steps=50 2>&1 | true", 1),
]


@pytest.mark.parametrize(
    ("redirected", "status", "unbuffered"),
    [
        *(pytest.param(*end, "", marks=pytest.mark.nightly if end == ENDS[1] else ()) for end in ENDS),
        *(pytest.param(*end, "1", marks=pytest.mark.nightly if end != ENDS[1] else ()) for end in ENDS),
    ],
)
def test_the_run_outlives_who_reads_its_output(tmp_path, redirected, status, unbuffered):
    command = " ".join(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *QUICK,
            "bias.every=0",
            "wandb.mode=disabled",
            "hydra.run.dir=run",
            redirected,
        ]
    )
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert done.returncode == status
    assert done.stderr == ""
    if "width=0" not in redirected:
        assert _summary(tmp_path / "run")["status"] == ("failed" if status else "completed")


def test_full_tracebacks_are_asked_for(run_train):
    assert "Traceback" in run_train("width=0", env={"HYDRA_FULL_ERROR": "1"}).stderr


def test_numbers_in_text_are_numbers(run_train, tmp_path):
    run = ("steps=2", "eval.validation_tasks=10", "wandb.mode=disabled", "hydra.run.dir=run")
    text = (
        "seed=${oc.env:ID}",
        "width='4'",
        "eval.tasks=${oc.env:TASKS}",
        "bias.every='0'",
        "estimator.nu=${oc.env:NU}",
        "optimizer.lr='1e-2'",
        "fixed_tasks=${oc.env:FIXED}",
        "task_chunk='2'",
    )
    done = run_train(*run, *text, env={"ID": "3", "TASKS": "20", "NU": "0.25", "FIXED": "true"})
    assert done.returncode == 0, done.stderr
    config = _summary(tmp_path / "run")["config"]
    assert [config[key] for key in ("seed", "width", "fixed_tasks", "task_chunk")] == [3, 4, True, 2]
    assert (config["estimator"]["nu"], config["optimizer"]["lr"], config["model"]["width"]) == (0.25, 0.01, 4)
    numbers = (
        "seed=3",
        "width=4",
        "eval.tasks=20",
        "bias.every=0",
        "estimator.nu=0.25",
        "optimizer.lr=0.01",
        "fixed_tasks=true",
        "task_chunk=2",
    )
    done = run_train(*run, *numbers)  # the same run
    assert "is complete" in done.stdout, done.stderr
    done = run_train(*run, *text, env={"ID": "three", "TASKS": "20", "NU": "0.25", "FIXED": "true"})
    assert done.stderr == "error: seed=three: takes a whole number of at least 0 and at most 18446744073709551615\n"


def test_text_stays_text(run_train, tmp_path):
    """What a user's class takes as text, or was written as text where it does not say."""
    (tmp_path / "mine.py").write_text(
        "from fobmaml.models import CNN1d\n"
        "class Net(CNN1d):\n"
        "    def __init__(self, input_shape, outputs, width: int, depth: int, label: str, tag, size, **more):\n"
        "        super().__init__(input_shape, outputs, width, depth, **more)\n"
        "        print('got', [label, tag, size])\n"
    )
    done = run_train(
        *QUICK,
        "bias.every=0",
        "wandb.mode=disabled",
        "model._target_=mine.Net",
        "+model.label=${oc.env:N}",
        "+model.tag='7'",
        "+model.size=${oc.env:N}",
        env={"N": "7", "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "got ['7', '7', 7]" in done.stdout


@pytest.mark.slow
def test_a_run_continued_on_another_engine_says_so(run_train, tmp_path):
    run = (*QUICK, "steps=100000", "bias.every=0", "wandb.mode=disabled", "eval.every=100000", "hydra.run.dir=run")
    metrics, said = tmp_path / "run" / "metrics.jsonl", []
    for engine in ("autograd", "stacked", "stacked"):
        process = start_train(tmp_path, *run, f"engine={engine}")
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        wait_until(lambda wanted=before + 3: metrics.exists() and metrics.read_text().count("\n") >= wanted, process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
        said.append("gradients are computed by engine stacked, and up to this checkpoint by autograd" in out)
        summary = _summary(tmp_path / "run")
        assert summary["engine"] == summary["provenance"]["engine"] == engine
    assert said == [False, True, False]


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
    done = run_train(
        "hydra.run.dir=run",
        "width=8",
        "steps=50",
        "optimizer=sgd",
        "optimizer.lr=1e30",
        "checkpoint_every=1",
        "eval.every=100",
        "bias.every=0",
        "eval.validation_tasks=4",
    )
    assert done.returncode != 0
    found = re.fullmatch(
        r"error: the meta-gradient at step (\d+) is not finite: try a smaller solver.lr or "
        r"optimizer.lr, or a larger estimator.lam; the last good checkpoint is (\S+)\n",
        done.stderr,
    )
    assert found, done.stderr
    state = torch.load(found[2], weights_only=True)
    assert state["step"] == int(found[1]) - 1
    assert all(torch.isfinite(p).all() for p in state["model"].values())
    summary = _summary(tmp_path / "run")
    assert summary["status"] == "failed"
    assert "is not finite" in summary["reason"]
    assert read_run(tmp_path / "run")["exit_code"] == 1


LONG = (
    "width=8",
    "steps=30",
    "log_every=1",
    "eval.every=7",
    "checkpoint_every=4",
    "bias.every=30",
    "bias.tasks=2",
    "eval.tasks=20",
    "eval.validation_tasks=10",
    "wandb.mode=disabled",
)


def _start_and_stop(folder: Path, stop: signal.Signals, after_step: int) -> subprocess.Popen:
    """A run in ``folder`` that gets a signal once it has logged ``after_step``."""
    process = start_train(folder.parent, *LONG, f"hydra.run.dir={folder}")
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and f'"step": {after_step},' in metrics.read_text(), process)
    process.send_signal(stop)
    return process


@pytest.mark.slow
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
    assert re.fullmatch(
        r"error: checkpoint \S+: takes a checkpoint of the same configuration, and here .*width=9 "
        r"\(there 8\).*\n",
        other.stderr,
    )


@pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.nightly)]
)
def test_killed_at_random_moments(kills):
    """A few of the hundred kills that the script makes by default."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--kills", str(kills)], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{kills} kills of ")


@pytest.mark.slow
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
    done = run_train(
        *QUICK,
        "bias.every=0",
        "hydra.run.dir=run",
        "wandb.mode=online",
        env={"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr
    assert "wandb init (online) failed" in done.stdout
    _complete(tmp_path / "run")


@pytest.mark.parametrize(
    ("variables", "settings", "offline", "said"),
    [
        ({}, (), True, {"project": "fobmaml", "name": "{folder}-run"}),
        ({"WANDB_MODE": "disabled"}, (), False, {}),
        ({"WANDB_DISABLED": "true"}, (), False, {}),
        ({"WANDB_DISABLED": "false"}, (), True, {}),
        ({"WANDB_MODE": "disabled"}, ("wandb.mode=offline",), True, {}),
        ({"WANDB_DISABLED": "true"}, ("wandb.mode=offline",), True, {}),
        (
            {
                "WANDB_PROJECT": "theirs",
                "WANDB_ENTITY": "us",
                "WANDB_NAME": "n",
                "WANDB_RUN_GROUP": "g",
                "WANDB_TAGS": "a,b",
                "WANDB_NOTES": "hm",
                "WANDB_RUN_ID": "abc",
            },
            (),
            True,
            {
                "project": "theirs",
                "entity": "us",
                "name": "n",
                "group": "g",
                "tags": ["a", "b"],
                "notes": "hm",
                "id": "abc",
            },
        ),
        (
            {"WANDB_PROJECT": "theirs", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g"},
            (
                "wandb.project=ours",
                "+wandb.name=2024",
                "wandb.group=h",
                "wandb.tags=[c]",
                "+wandb.notes=why",
                "+wandb.job_type=try",
                "+wandb.id=xyz",
                "+wandb.resume=allow",
            ),
            True,
            {
                "project": "ours",
                "name": "2024",
                "group": "h",
                "tags": ["c"],
                "notes": "why",
                "job_type": "try",
                "id": "xyz",
            },
        ),
    ],
)
def test_wandbs_own_variables_hold_where_nothing_is_set(run_train, tmp_path, variables, settings, offline, said):
    done = run_train(*QUICK, "bias.every=0", "hydra.run.dir=run", *settings, env=variables)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert bool(list(tmp_path.glob("run/wandb/offline-run-*"))) == offline
    if offline:
        run = read_run(tmp_path / "run")
        assert {key: run[key] for key in said} == {
            key: value.format(folder=tmp_path.name) if isinstance(value, str) else value for key, value in said.items()
        }


def test_wandbs_variable_asks_for_online(run_train, tmp_path):
    done = run_train(
        *QUICK,
        "bias.every=0",
        "hydra.run.dir=run",
        env={"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr
    assert "wandb init (online) failed" in done.stdout
    _complete(tmp_path / "run")


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="takes root, to be another user")
def test_without_a_home(tmp_path):
    """A user that the machine has no entry for: neither the data set's cache nor wandb has a place."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME", "USER")}
    other = ["setpriv", "--reuid=54321", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    homeless = subprocess.run(
        [*other, sys.executable, "-c", "from pathlib import Path; Path.home()"],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert "Could not determine home" in homeless.stderr
    done = subprocess.run(
        [*other, sys.executable, str(ROOT / "train.py"), *QUICK, "bias.every=0", "hydra.run.dir=run"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert _summary(tmp_path / "run")["status"] == "completed"


def test_without_fcntl(tmp_path):
    """As on Windows."""
    blocked = "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = sys.argv[1:]; "
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            blocked + "runpy.run_path(sys.argv[0], run_name='__main__')",
            str(ROOT / "train.py"),
            *QUICK,
            "bias.every=0",
            "wandb.mode=disabled",
            "hydra.run.dir=run",
        ],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert _summary(tmp_path / "run")["status"] == "completed"


def test_wandb_without_a_place_to_write(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    done = run_train(*QUICK, "bias.every=0", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert _summary(tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("wandb", [pytest.param("disabled", marks=pytest.mark.nightly), "offline"])
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(run_train, tmp_path, wandb):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = (
            *QUICK,
            "steps=120",
            "log_every=1",
            "checkpoint_every=2",
            "bias.every=0",
            f"wandb.mode={wandb}",
            f"hydra.run.dir={disk}/run",
        )
        done = run_train(*run)
        assert done.returncode == 1
        assert re.fullmatch(
            r"error: \S+: cannot be written \(No space left on device\); what was written before is "
            "whole\n",
            done.stderr,
        ), done.stderr
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
    """Resident memory over 1200 meta-steps, from the first hundred on."""
    process = start_train(
        tmp_path,
        "width=4",
        "steps=1200",
        "meta_batch=1",
        "solver.steps=2",
        "log_every=10",
        "eval.every=500",
        "eval.validation_tasks=10",
        "eval.tasks=0",
        "bias.every=0",
        "wandb.mode=disabled",
        "hydra.run.dir=run",
        **QUIET,
    )
    resident, metrics = [], tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        steps = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
        step = int(steps[-1]) if steps else 0
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()
        if step >= 100 and len(pages) > 1 and step < 1200:  # the plot comes after the last step
            resident.append(int(pages[1]))
        time.sleep(0.1)
    assert process.returncode == 0
    assert len(resident) > 20
    assert resident[-1] < 1.03 * resident[0]
