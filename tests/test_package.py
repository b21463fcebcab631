"""What a pip user gets: a library that needs torch and numpy alone, and with an extra the program and its settings."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from environments import build, elsewhere, files, install, link

EXTRA = ("hydra", "omegaconf", "wandb", "matplotlib", "mnist1d", "filelock", "tqdm", "yaml")
"""What comes with ``fobmaml[run]``."""
USE = """
import os, sys, torch
from torch import nn
import fobmaml
assert not [name for name in sys.argv[1:] if sys.modules.get(name) is not None]
x, y = torch.randn(3, 20, 2), torch.randn(3, 20, 1)
tasks = fobmaml.TaskBatch(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])
solver = fobmaml.solvers.GradientDescent()
for estimator in (fobmaml.estimators.Symmetric(solver), fobmaml.estimators.MAML(solver)):
    result = fobmaml.meta_gradient(estimator, nn.Linear(2, 1), nn.functional.mse_loss, tasks)
    assert result.gradient["weight"].norm() > 0
try:
    fobmaml.tasks.MNIST1D()
except ImportError as error:
    print(error)
"""
QUICK = ("width=4", "eval.tasks=20", "eval.validation_tasks=10", "bias.tasks=2", "wandb.mode=offline")
STEPS = ("steps=4", "checkpoint_every=2")


def _assert_only_the_library(python: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([*python, USE, *EXTRA], cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"MNIST-1D .*mnist1d.* not installed: pip install 'fobmaml\[run\]'\n", done.stdout)


def test_the_library_alone(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # without the arrays of an earlier run
    done = subprocess.run(
        [sys.executable, "-c", USE.split("try:")[0], "hydra", "omegaconf", "wandb", "matplotlib", "mnist1d"],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr  # not imported where they are installed, either
    blocked = "import sys\nsys.modules.update(dict.fromkeys(sys.argv[2:]))\ncode = sys.argv.pop(1)\n"
    _assert_only_the_library([sys.executable, "-c", blocked + "exec(code)"], tmp_path, environment)
    program = "from fobmaml.run import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", blocked + "exec(code)", program, *EXTRA], text=True, capture_output=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"error: \w+ is not installed: pip install 'fobmaml\[run\]'\n", done.stderr), done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module", params=["linked", pytest.param("pip", marks=pytest.mark.nightly)])
def installed(request, built, tmp_path_factory) -> Path:
    """The programs of an empty environment in which the wheel is, with what it says it needs and no more: by pip, or,
    in a tenth of the time, as links to the packages beside this Python."""
    put = {"pip": install, "linked": link}[request.param]
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=request.param == "pip")
    wheel, _ = built
    put(folder, wheel, "")
    _assert_only_the_library([str(folder / "bin" / "python"), "-c"], folder, elsewhere(folder))
    done = subprocess.run([folder / "bin" / "fobmaml"], text=True, capture_output=True, env=elsewhere(folder))
    assert re.fullmatch(r"error: \w+ is not installed: pip install 'fobmaml\[run\]'\n", done.stderr), done.stderr
    put(folder, wheel, "run")
    return folder / "bin"


@pytest.mark.slow
def test_a_wheel_has_everything(built):
    wheel, source = built
    held = set(zipfile.ZipFile(wheel).namelist())
    settings = {name for name in files() if name.startswith("configs/")}
    assert {f"fobmaml/{name}" for name in settings} == {name for name in held if name.startswith("fobmaml/configs/")}
    modules = {name.removeprefix("src/") for name in files() if name.startswith("src/") and name.endswith(".py")}
    assert modules == {name for name in held if name.endswith(".py")}
    with tarfile.open(source) as archive:
        needed = settings | {name for name in files() if name.startswith("src/") and name.endswith((".c", ".h"))}
        assert {f"{source.name.removesuffix('.tar.gz')}/{name}" for name in needed} <= set(archive.getnames())


@pytest.mark.slow
def test_an_installed_program_trains_resumes_and_sweeps_far_from_the_repository(installed, tmp_path):
    def fobmaml(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [installed / "fobmaml", *arguments, *QUICK],
            cwd=tmp_path,
            env=elsewhere(tmp_path),
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def summary(folder: Path) -> dict:
        return json.loads((folder / "summary.json").read_text())

    done = fobmaml("estimator=symmetric", *STEPS, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "meta-test accuracy" in done.stdout
    whole = summary(tmp_path / "run")
    assert whole["status"] == "completed"
    assert isinstance(whole["test/accuracy"], float)
    assert isinstance(whole["bias/cosine"], float)
    assert whole["provenance"]["commit"] is None
    assert list(tmp_path.glob("run/wandb/offline-run-*"))

    assert "is complete" in fobmaml("estimator=symmetric", *STEPS, "hydra.run.dir=run").stdout
    (tmp_path / "run" / "summary.json").unlink()
    done = fobmaml("estimator=symmetric", *STEPS, "hydra.run.dir=on", "resume=run")
    assert "continuing run/checkpoint.pt at step 4" in done.stdout, done.stderr
    assert summary(tmp_path / "on")["test/loss"] == whole["test/loss"]

    (tmp_path / "mine" / "dataset").mkdir(parents=True)
    (tmp_path / "mine" / "dataset" / "few.yaml").write_text("_target_: fobmaml.tasks.MNIST1D\nways: 3\n")
    done = fobmaml("-m", "--config-dir=mine", "dataset=few", "estimator=fomaml,maml", "steps=2", "bias.every=0")
    assert done.returncode == 0, done.stderr
    jobs = [summary(path.parent) for path in tmp_path.glob("multirun/*/*/summary.json")]
    assert sorted(job["choices"]["estimator"] for job in jobs) == ["fomaml", "maml"]
    assert {job["config"]["dataset"]["ways"] for job in jobs} == {3}
    assert fobmaml("steps=-1").stderr == "error: steps=-1: takes a whole number of at least 0\n"
    assert fobmaml("depht=3").stderr == "error: depht: there is no such setting (fobmaml --help lists them)\n"


@pytest.mark.slow
def test_the_version_is_said_once(installed):
    said = subprocess.run(
        [
            installed / "python",
            "-c",
            "import fobmaml; from importlib.metadata import version; print(fobmaml.__version__, version('fobmaml'))",
        ],
        text=True,
        capture_output=True,
        cwd=installed,
        env=elsewhere(installed),
        check=True,
    ).stdout.split()
    assert said[0] == said[1]
    assert f"version: {said[0]}\n" in (ROOT / "CITATION.cff").read_text()
