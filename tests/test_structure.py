"""The rules of the house that a syntax tree shows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "src" / "fobmaml"
FILES = sorted(path for path in SOURCE.rglob("*.py"))
LIBRARY = [path for path in FILES if SOURCE / "run" not in path.parents]
OF_THE_PROGRAM = {"hydra", "omegaconf", "wandb", "matplotlib", "filelock", "tqdm", "yaml"}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Module and name of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the bodies of functions, and what is for a program alone."""
    todo: list[ast.AST] = [node for node in tree.body if not _is_main(node)]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += [*node.args.defaults, *(default for default in node.args.kw_defaults if default)]
            todo += getattr(node, "decorator_list", [])
        else:
            todo += ast.iter_child_nodes(node)


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _named(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", files, ids=[str(path.relative_to(ROOT)) for path in files])


@_named(FILES)
def test_no_private_name_crosses_modules(path):
    tree = _tree(path)
    ours = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fobmaml"
        for alias in node.names
    }
    assert not [name for name in ours if name.startswith("_") and not name.endswith("__")]
    modules = {
        name
        for name, module in ours.items()
        if (SOURCE.parent / f"{module}.{name}".replace(".", "/")).with_suffix(".py").exists()
    }
    reached = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
    ]
    assert not reached


@_named(FILES)
def test_no_command_line_is_read_at_import(path):
    tree = _tree(path)
    for node in _at_import(tree):
        assert ast.unparse(node) != "sys.argv" if isinstance(node, ast.Attribute) else True
        if isinstance(node, ast.Call):
            assert "ArgumentParser" not in ast.unparse(node.func)
            assert "parse_args" not in ast.unparse(node.func)


@_named(LIBRARY)
def test_the_library_knows_nothing_of_the_program(path):
    for module, name in _imports(_tree(path)):
        assert not f"{module}.{name}".startswith("fobmaml.run")
        assert module.split(".")[0] not in OF_THE_PROGRAM


@_named(FILES)
def test_no_module_keeps_state_by_a_global_statement(path):
    assert not [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Global)]


def test_files_are_short():
    lengths = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES
    }
    assert not {name: length for name, length in lengths.items() if length > 350}
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) < 30
