"""The example of a user's own project, trained and used far from the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

EXAMPLE = ROOT / "examples" / "own_project"
QUICK = ("width=4", "steps=20", "eval.tasks=20", "eval.validation_tasks=0", "bias.every=0", "wandb.mode=disabled")


@pytest.mark.slow
def test_a_project_of_ones_own(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "project")
    here = tmp_path / "elsewhere"
    here.mkdir()
    paths = [str(tmp_path / "project"), *filter(None, [os.environ.get("PYTHONPATH")])]

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=here,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fobmaml(*arguments: str) -> str:
        return python("-c", "from fobmaml.run import main; main()", *arguments)

    own = ("--config-dir=../project/configs", "dataset=tones", "solver=nesterov", "estimator=mixed")
    assert re.search(r"estimator +mixed\n", fobmaml(*own, "solver.steps=3", *QUICK, "hydra.run.dir=run"))
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["test/accuracy"] > 0.4  # of three classes
    assert summary["choices"] == {
        "dataset": "tones",
        "model": "listener",
        "solver": "nesterov",
        "estimator": "mixed",
        "optimizer": "sngdm",
    }
    fobmaml("evaluate", "run", "dataset.shots=1", "hydra.run.dir=once")  # it knows where the settings come from
    once = json.loads((here / "once" / "summary.json").read_text())
    assert once["config"]["dataset"]["shots"] == 1
    assert once["config"]["solver"] == {"_target_": "tones.methods.Nesterov", "steps": 3, "lr": 0.1}
    said = python("../project/use.py", "run")
    assert re.fullmatch(r"Listener after 20 meta-steps: \d+% of a new task is right\n", said)


def test_the_examples_files_name_what_is_there(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from fobmaml.saved.parts import make

    def settings(group: str, name: str) -> dict:
        return yaml.safe_load(Path(EXAMPLE, "configs", group, f"{name}.yaml").read_text())

    tones = make("dataset", settings("dataset", "tones")["dataset"], trust=True)
    splits = [set(frequencies.tolist()) for frequencies in tones.frequencies.values()]
    assert [len(split) for split in splits] == [40, 10, 10]
    assert len(set.union(*splits)) == 60
    solver = make("solver", settings("solver", "nesterov"), trust=True)
    assert make("estimator", settings("estimator", "mixed"), trust=True, solver=solver).share == 0.1
    network = make(
        "model", settings("model", "listener") | {"width": 4}, trust=True, input_shape=tones.input_shape, outputs=3
    )
    assert network(tones.sample("test", 1, None).support_x[0].float()).shape == (15, 3)
