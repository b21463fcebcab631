"""What the README shows runs as it stands, and its tables are the results."""

import re
import subprocess
import sys

import pytest
import tables
import yaml
from conftest import ROOT
from test_scripts import same_text

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_library_example():
    (example,) = (each for each in EXAMPLES if "optimizer.step()" in each)
    assert len(example.strip().splitlines()) < 30
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.manual_seed(0)\n" + example],
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("example", [each for each in EXAMPLES if "load_run" in each])
def test_example_of_use(run_train, tmp_path, example):
    (folder,) = re.findall(r"load_run\(\"(.*?)\"", example)
    quick = ("width=4", "steps=2", "eval.tasks=0", "eval.validation_tasks=0", "bias.every=0", "wandb.mode=disabled")
    assert run_train(*quick, f"hydra.run.dir={folder}").returncode == 0
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_example_of_data():
    (example,) = (each for each in EXAMPLES if "FewShot" in each)
    sampled = "print(source.sample('test', 2, torch.Generator()).query_x.shape)"
    done = subprocess.run([sys.executable, "-c", example + sampled], text=True, capture_output=True, timeout=120)
    assert done.stdout == "torch.Size([2, 50, 28, 28])\n", done.stderr


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in (
        "setup",
        "train",
        "test",
        "test-all",
        "lint",
        "figures",
        "reproduce",
        "verify",
        "bench",
        "explorer",
        "help",
    ):
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make train" in shown


def test_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert "python=3.11" in environment["dependencies"]
    packages = ["--constraint constraints.txt", "--editable .[dev,sweeps,explorer]"]
    assert environment["dependencies"][-1] == {"pip": packages}


def test_tables_are_the_results():
    assert same_text(tables.page(ROOT / "results"), README)
