"""The parts of a run from its settings alone, as plain values: what Hydra makes of them where a run begins."""

import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from fobmaml.arguments import refuse

TO_HYDRA = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
"""What Hydra reads of a group, and does not pass on."""
OWN = ("fobmaml.estimators.", "fobmaml.models.", "fobmaml.solvers.", "fobmaml.tasks.")
"""Where the classes are that a file may name: making one computes, and writes nothing."""


def make(name: str, settings: Mapping[str, Any], trust: bool, **given: Any) -> Any:
    """What ``settings["_target_"]`` makes of the other settings, and of those ``given`` in their place.

    Nothing is imported or called but fobmaml's own data sets, networks, solvers and estimators, unless ``trust``.
    Raises ValueError, naming the setting, for another target, one that is not there, and settings that it does not
    take.
    """
    target = _found(name, settings["_target_"], trust)
    values = {key: value for key, value in settings.items() if key not in TO_HYDRA}
    positional = settings.get("_args_", [])
    if settings.get("_recursive_", True):
        positional, values = _nested(f"{name}._args_", positional, trust), _nested(name, values, trust)
    if settings.get("_partial_"):
        return partial(target, *positional, **(values | given))
    try:
        return target(*positional, **(values | given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {settings['_target_']} refuses its settings ({error})") from error


def _nested(name: str, value: Any, trust: bool) -> Any:
    """Settings, with what is to be made below them made."""
    if isinstance(value, list):
        return [_nested(f"{name}[{i}]", each, trust) for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        return make(name, value, trust)
    return {key: _nested(f"{name}.{key}", each, trust) for key, each in value.items()}


def _found(name: str, target: Any, trust: bool) -> Any:
    own = isinstance(target, str) and target.startswith("fobmaml.")
    try:
        found = pkgutil.resolve_name(target) if own or trust else None
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise refuse(f"{name}._target_", target, f"what can be imported here ({error})") from error
    if not trust and not (isinstance(found, type) and found.__module__.startswith(OWN)):
        raise refuse(
            f"{name}._target_",
            target,
            "a data set, network, solver or estimator of fobmaml's; trust=True takes any, and runs its code",
        )
    return found


def evaluation_solver(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the solver of validation and meta-test tasks: ``eval.solver``, and what it does not say from
    ``solver``, if both make the same. None: as in training."""
    said, solver = settings["eval"]["solver"], settings["solver"]
    if not said:
        return None
    if said.get("_target_", solver["_target_"]) == solver["_target_"]:
        return {**solver, **said}
    # null, as of batches that training's solver has, is what any other does without
    return {key: value for key, value in said.items() if value is not None}
