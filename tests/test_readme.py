"""What the README shows runs as it stands, and its tables, and those of docs/, are the results."""

import re
import subprocess
import sys

import pytest
import tables
import yaml
from conftest import ROOT
from test_docs import anchors
from test_scripts import same_text

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_library_example():
    (example,) = EXAMPLES
    assert len(example.strip().splitlines()) < 30
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.manual_seed(0)\n" + example],
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]


def test_a_first_visit_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) < 120
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        name, _, anchor = target.partition("#")
        if not name.startswith("https:"):
            assert (ROOT / name).exists(), target
            assert not anchor or anchor in anchors((ROOT / name).read_text()), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in (
        "setup",
        "train",
        "test",
        "test-site",
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
    packages = ["--constraint constraints.txt", "--editable .[dev,docs,sweeps,explorer]"]
    assert environment["dependencies"][-1] == {"pip": packages}


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: path.name)
def test_tables_are_the_results(path):
    assert same_text(tables.pages(ROOT / "results")[path], path.read_text())


def test_each_table_stands_once():
    shown = [name for path in tables.FILES for name in tables.MARK.findall(path.read_text())]
    assert sorted(shown) == sorted(tables.TABLES)
