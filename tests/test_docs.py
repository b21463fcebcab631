"""The pages of docs/, before a site is built of them: links, tables, names, and how blocks run."""

import re
import sys
from pathlib import Path

import documentation
import documentation_blocks as blocks
import documentation_parts as parts
import documentation_reference as names
import pytest
import tables
import torch
from conftest import ROOT

import fobmaml
from fobmaml.files import read_csv

DOCS = ROOT / "docs"
SOURCES = sorted(DOCS.rglob("*.md"))
GENERATED = ("modules", "reference")
"""Parts that take long, or are Sphinx's to read."""
ids = pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(DOCS).as_posix() for path in SOURCES])


def filled(path: Path) -> str:
    """A page as Sphinx gets it, but for outputs of its blocks and what takes long."""
    text = path.read_text(encoding="utf-8")
    return documentation.filled(documentation.MARKER.sub(lambda m: "" if m[1] in GENERATED else m[0], text))


def anchors(text: str) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    slugs = {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}
    return slugs | {*re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)}


class TestPages:
    @ids
    def test_links_lead_somewhere(self, path):
        text = re.sub(r"^(`{3,}).*?^\1$", "", filled(path), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:", target):
                continue
            name, _, anchor = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            assert there.exists(), target
            if anchor:
                assert anchor in anchors(filled(there)), target

    def test_every_page_is_in_the_contents(self):
        listed = {DOCS / "index.md"}
        for path in SOURCES:
            for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
                entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
                listed |= {path.parent / f"{entry}.md" for entry in entries}
        assert listed == {*SOURCES}

    def test_no_number_of_a_table_is_typed(self):
        markers = [found.groups() for path in SOURCES for found in documentation.MARKER.finditer(path.read_text())]
        assert {name for part, name in markers if part == "table"} <= {*tables.TABLES}
        assert len(documentation.MARKER.findall("\n".join(map(Path.read_text, SOURCES)))) == sum(
            path.read_text().count("<!-- site:") for path in SOURCES
        )

    def test_columns_of_a_table(self):
        found = [line.split(" | ") for line in parts.csv("bench_processes", "width", "seconds").splitlines()]
        rows = read_csv(ROOT / "results" / "bench_processes.csv")
        assert [line[0] for line in found[2:]] == [f"| {row['width']}" for row in rows]
        shown = [float(line[1].removesuffix(" |")) for line in found[2:]]
        assert shown == pytest.approx([float(row["seconds"]) for row in rows], rel=1e-3)

    def test_what_auto_takes_is_beside_the_best_fixed_choice(self):
        lines = [line.strip("| ").split(" | ") for line in parts.chunks().splitlines()[2:]]
        rows = read_csv(ROOT / "results" / "bench_chunks.csv")
        assert len(lines) == sum(row["auto"] == "true" for row in rows)
        for _, width, _, taken, _, auto, best, ratio in lines:
            assert any(row["width"] == width and row["task_chunk"] == taken and row["auto"] == "true" for row in rows)
            assert float(ratio) == pytest.approx(float(auto.split()[0]) / float(best.split()[0]), abs=0.02)

    def test_a_number_of_a_table_keeps_its_unit(self):
        text = documentation.filled("| 63 ms, 41 % | 86.2 ± 1.7 % | 3.2 M, 10.4 s | 5 more |\n63 ms")
        assert text == "| 63\xa0ms, 41\xa0% | 86.2\xa0±\xa01.7\xa0% | 3.2\xa0M, 10.4\xa0s | 5 more |\n63 ms"

    def test_each_claim_says_what_measures_it_again(self):
        import reproduce

        again = re.findall(r"make reproduce ARGS=(\w+)", parts.claims())
        assert {*again} <= {*reproduce.EXPERIMENTS}
        verdicts = [line.split(" | ")[2] for line in parts.claims().splitlines()[2:]]
        measured = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", (ROOT / "results" / "README.md").read_text(), re.MULTILINE)
        assert measured == ["verdict", *verdicts]

    def test_links_of_included_files(self):
        text = parts.include("results/README.md")
        assert "](protocol.md)" in text
        assert "](../results/figures/accuracy.png)" in text
        assert "](../results/bias_delta.csv)" in text


class TestReference:
    def test_every_public_name_says_what_it_is(self):
        assert names.undocumented() == []

    def test_labels_in_a_docstring_begin_paragraphs(self):
        lines = ["What it is.", "Cost: one. Memory: flat. Raises ValueError if not.", ">>> f()  # Cost: none"]
        documentation._describe(None, "class", "fobmaml.optim.SNGDM", fobmaml.optim.SNGDM, None, lines)
        assert [line for line in lines if line] == [
            "What it is.",
            "**Cost:**  one. ",
            "**Memory:**  flat. ",
            "**Raises** ValueError if not.",
            ">>> f()  # Cost: none",
        ]

    def test_names_without_a_word_are_found(self, monkeypatch):
        class Silent:
            def speak(self): ...

        def half(said, unsaid):
            """Of ``said``."""

        monkeypatch.setattr(fobmaml.optim, "__all__", ["Silent", "mute", "CONSTANT", "half"], raising=False)
        for name, value in {"Silent": Silent, "mute": lambda: None, "CONSTANT": 1, "half": half}.items():
            monkeypatch.setattr(fobmaml.optim, name, value, raising=False)
        paths = [f"fobmaml.optim.{name}" for name in ("Silent", "Silent.speak", "mute", "CONSTANT", "half(unsaid)")]
        assert names.undocumented() == paths

    def test_every_public_module_has_a_page(self):
        asked = [found.groups() for path in SOURCES for found in documentation.MARKER.finditer(path.read_text())]
        assert {name for part, name in asked if part == "reference"} == {each.__name__ for each in names.modules()}
        for module in names.modules():
            text = names.reference(module.__name__)
            for name in names.public(module):
                assert re.search(rf"^\.\. \S+:: {module.__name__}\.{name}$", text, re.MULTILINE)


class TestBlocks:
    def test_a_page_of_blocks(self, tmp_path):
        page = """
```python
# own/thing.py
VALUE = 3
```
```python
from own.thing import VALUE
print(VALUE)
```
```sh
echo $((1 + 1)); ls
```
```console
false
```
```yaml
key: shown
```
```python
print(VALUE + 1)
```
"""
        printed = [*blocks.run_blocks(page, tmp_path)]
        assert [output.split() for output in printed] == [[], ["3"], ["2", "own"], ["4"]]
        assert "own.thing" not in sys.modules
        text = blocks.executed(page)
        assert text.count(":class: output") == 3
        assert documentation.is_executed("---\nexecuted: true\n---\n" + page)
        assert not documentation.is_executed(page)

    @pytest.mark.parametrize("block", ["```python\n1 / 0\n```", "```sh\nfalse\ntrue\n```"])
    def test_a_block_that_fails(self, block):
        with pytest.raises(blocks.BlockFailed):
            blocks.executed(f"{block}\n")


LIMITS = re.compile(r"^```(?:python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda path: path.stem)
def test_tutorials_are_short(path):
    code = "".join(LIMITS.findall(path.read_text()))
    assert len([line for line in code.splitlines() if line.strip()]) < 60
    assert path.stem == "index" or documentation.is_executed(path.read_text())


def test_factors_by_which_methods_take_a_query_gradient():
    """The table of the page on the method: a support loss of constant curvature κ, a linear query loss."""
    lam, lr, steps, x = 0.5, 0.1, 7, 1.7
    kappa = 2 * x * x
    model = torch.nn.Linear(1, 1, bias=False).double()
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    tasks = fobmaml.TaskBatch(x * ones, 3 * ones, ones, ones)

    def factor(estimator: fobmaml.estimators.Estimator) -> float:
        result = fobmaml.meta_gradient(
            estimator, model, lambda outputs, _: outputs.mean(), tasks, support_loss=torch.nn.functional.mse_loss
        )
        return result.gradient["weight"].item()

    gd, exact = fobmaml.solvers.GradientDescent(steps, lr), lam / (lam + kappa)
    assert factor(fobmaml.estimators.Exact(fobmaml.solvers.NewtonCG(), lam)) == pytest.approx(exact)
    assert factor(fobmaml.estimators.IMAML(gd, lam)) == pytest.approx(exact)
    solved = 1 - (1 - lr * (lam + kappa)) ** steps
    assert factor(fobmaml.estimators.Tangent(gd, lam)) == pytest.approx(exact * solved)
    assert factor(fobmaml.estimators.Symmetric(gd, lam, nu=1e-4)) == pytest.approx(exact * solved)
    assert factor(fobmaml.estimators.MAML(gd)) == pytest.approx((1 - lr * kappa) ** steps)
    assert factor(fobmaml.estimators.FOMAML(gd)) == pytest.approx(1)
