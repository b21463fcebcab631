"""The reference: every public name, and which of them, or of their parameters, it says nothing about."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import fobmaml
from fobmaml import engine
from fobmaml.tasks import TaskSource

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def modules() -> list[ModuleType]:
    """Those that are public: the package, what it names in ``__all__``, and the engine."""
    named = [getattr(fobmaml, name) for name in fobmaml.__all__]
    return [fobmaml, *(each for each in named if inspect.ismodule(each)), engine]


def public(module: ModuleType) -> list[str]:
    """Names of a module: its ``__all__``, or all that it defines; without underscore, and no modules."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", defined)
    return [name for name in names if not name.startswith("_") and not inspect.ismodule(getattr(module, name))]


def reference(name: str) -> str:
    """Every public name of a module, by autodoc. What the package has from a module inside it is documented there."""
    module = importlib.import_module(name)
    inside = {each: other for other in modules()[1:] for each in public(other)} if module is fobmaml else {}
    return (
        "````{eval-rst}\n" + "\n\n".join(_entry(module, each, inside.get(each)) for each in public(module)) + "\n````"
    )


def _entry(module: ModuleType, name: str, elsewhere: ModuleType | None) -> str:
    value, path = getattr(module, name), f"{module.__name__}.{name}"
    if elsewhere is not None and getattr(elsewhere, name) is value:
        return f".. py:data:: {path}\n   :no-index:\n\n   Short for :py:obj:`{elsewhere.__name__}.{name}`."
    if inspect.isclass(value):
        called = "\n   :special-members: __call__" if getattr(vars(value).get("__call__"), "__doc__", None) else ""
        return f".. autoclass:: {path}\n   :members:{called}\n   :show-inheritance:"
    if inspect.isfunction(value):
        return f".. autofunction:: {path}"
    return f".. py:data:: {path}\n   :value: {str(value).replace('typing.', '')}\n\n   {data_docs(module, name)}"


def data_docs(module: ModuleType, name: str) -> str:
    """The text below the assignment of a constant, wherever in the module's folder that is; empty if there is none."""
    return next(_below(Path(module.__file__ or ""), name), "")


def _below(file: Path, name: str) -> Iterator[str]:
    for path in sorted(file.parent.rglob("*.py")) if file.stem == "__init__" else [file]:
        for node, after in pairwise(ast.parse(path.read_text(encoding="utf-8")).body):
            match node, after:
                case (
                    ast.Assign(targets=[ast.Name(id=given)]),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ) if given == name:
                    yield inspect.cleandoc(text)


def undocumented() -> list[str]:
    """Public names, public methods of public classes, and parameters, of which nothing is said."""
    missing = []
    for module in modules():
        for name in public(module):
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.isclass(value):
                made_up = (value.__doc__ or f"{name}(").startswith(f"{name}(")  # by a dataclass
                missing += [path] * made_up
                missing += [f"{path}.{method}" for method in _methods(value) if not method_docs(value, method)]
            elif not (inspect.getdoc(value) if inspect.isfunction(value) else data_docs(module, name)):
                missing.append(path)
            missing += [f"{path}({each})" for each in _unexplained(value)]
    return missing


def _unexplained(value: object) -> list[str]:
    """Parameters whose names stand in no docstring: a function's own, or a class's, its methods' and its bases'."""
    if not (inspect.isclass(value) or inspect.isfunction(value)) or (
        inspect.isclass(value) and issubclass(value, Exception)
    ):
        return []
    kinds = [kind for kind in value.__mro__ if kind.__module__.startswith("fobmaml")] if inspect.isclass(value) else []
    said = [inspect.getdoc(value) or "", *(kind.__doc__ or "" for kind in kinds)]
    said += [inspect.getdoc(each) or "" for kind in kinds for each in vars(kind).values() if inspect.isfunction(each)]
    names = [each.name for each in inspect.signature(value).parameters.values() if each.kind not in VARIADIC]
    return [name for name in names if not re.search(rf"\b{name}\b", "\n".join(said))]


def _methods(kind: type) -> list[str]:
    """Its own public methods and properties."""
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property) or hasattr(value, "func"))
    ]


def method_docs(kind: type, name: str) -> str:
    """Its own, inherited, or that of the protocol ``TaskSource``, which data sets follow without being subclasses."""
    own = inspect.getdoc(inspect.getattr_static(kind, name)) or inspect.getdoc(getattr(kind, name))
    return own or inspect.getdoc(getattr(TaskSource, name, None)) or ""
