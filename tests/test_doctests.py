"""Examples in the docstrings of public names do what they say."""

import doctest
import inspect
import re
from collections.abc import Iterator

import documentation_reference as names
import pytest
from conftest import ROOT

import fobmaml

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
(PROBLEM,) = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "reference" / "fobmaml.md").read_text(), re.MULTILINE | re.DOTALL
)


def _examples() -> Iterator[doctest.DocTest]:
    """One for each public name, and each method of one, that has examples."""
    parser, seen = doctest.DocTestParser(), set[int]()
    for module in names.modules():
        for name in names.public(module):
            value = getattr(module, name)
            if id(value) in seen or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            seen.add(id(value))
            parts = {name: value} | {f"{name}.{key}": each for key, each in vars(value).items() if callable(each)}
            for path, each in parts.items():
                if not (getattr(each, "__module__", None) or "").startswith("fobmaml"):
                    continue  # torch's, as a class holds it
                test = parser.get_doctest(inspect.getdoc(each) or "", {}, f"{module.__name__}.{path}", None, 0)
                if test.examples:
                    yield test


EXAMPLES = {test.name.removeprefix("fobmaml."): test for test in _examples()}


def _failures(test: doctest.DocTest) -> str:
    exec(PROBLEM, test.globs)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, run_train, monkeypatch):
    test = EXAMPLES[name]
    if any("outputs" in example.source for example in test.examples):
        quick = ("width=4", "steps=2", "eval.tasks=0", "eval.validation_tasks=0", "bias.every=0", "wandb.mode=disabled")
        assert run_train(*quick, "hydra.run.dir=outputs/first").returncode == 0
    monkeypatch.chdir(tmp_path)
    assert not _failures(test)


def test_a_wrong_example_is_found():
    assert "Expected" in _failures(doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0))


def test_each_main_entry_point_has_one():
    kinds = {
        "estimators": fobmaml.estimators.Estimator,
        "solvers": fobmaml.solvers.Solver,
        "optim": object,
    }
    wanted = {"meta_gradient", "adapt", "adapt_tasks", "load_run", "read_runs", "TaskBatch", "tasks.FewShot"}
    for module, kind in kinds.items():
        for name in names.public(getattr(fobmaml, module)):
            value = getattr(getattr(fobmaml, module), name)
            if inspect.isclass(value) and issubclass(value, kind) and not inspect.isabstract(value):
                wanted.add(f"{module}.{name}")
    assert not wanted - EXAMPLES.keys()
