"""A run's settings: numbers read from text, and what of them makes it this run."""

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

GROUPS = ("dataset", "model", "estimator", "solver", "optimizer")
"""Of each one is chosen."""
# Runs that agree in everything else are the same run, and continue each other's checkpoints.
NOT_PART_OF_A_RUN = ("resume", "wandb", "device", "engine", "prefetch", "checkpoint_every")


def open_node(name: str, key: str) -> None:
    """Lets the command line add settings below a key without a plus, which configs/train.yaml asks for by ``open``."""
    root = OmegaConf.create({})
    OmegaConf.update(root, key, {})
    OmegaConf.set_struct(OmegaConf.select(root, key), False)
    ConfigStore.instance().store(name, root, group="open", package="_global_")


open_node("eval_solver", "eval.solver")  # what may stand there depends on the solver


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def same_run(cfg: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in plain_config(cfg).items() if key not in NOT_PART_OF_A_RUN}


def quoted(text: str) -> str:
    """As Hydra reads it, whatever characters are in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def choices() -> dict[str, str]:
    """The word chosen for each group: estimator=..., dataset=..., ..."""
    chosen = HydraConfig.get().runtime.choices
    return {group: chosen[group] for group in GROUPS}


def overrides() -> list[str]:
    """What the command said."""
    return list(HydraConfig.get().overrides.task)


def measurements_in(cfg: DictConfig) -> list[str]:
    """The names of what the files of the group ``measure`` have put there: all other that makes something."""
    return [
        str(name)
        for name in cfg
        if name not in GROUPS
        and not OmegaConf.is_missing(cfg, name)
        and isinstance(cfg[name], DictConfig)
        and "_target_" in cfg[name]
    ]


def sweep_name() -> str | None:
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return None
    folder, here = Path(config.sweep.dir).absolute(), Path(config.runtime.cwd)
    return (folder.relative_to(here) if folder.is_relative_to(here) else folder).as_posix()


def read_numbers(node: DictConfig | ListConfig) -> None:
    """Makes numbers of text that reads as one, as environment variables have it: seed=${oc.env:SLURM_ARRAY_TASK_ID}.

    What the class of a group (``_target_``) takes as text, and wandb's settings, stay as they are.
    """
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if key in ("_target_", "init", "resume", "wandb") or OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            read_numbers(value)
        elif isinstance(value, str) and takes_number(node, key):
            with suppress(HydraException):  # it is no value that a command line could have
                read = OverridesParser.create().parse_override(f"value={value}").value()
                if isinstance(read, int | float):
                    node[key] = read


def takes_number(node: DictConfig | ListConfig, key: Any) -> bool:
    """Whether a setting may be a number. Where a class does not say, text is meant if it was written as text."""
    if isinstance(node, ListConfig) or "_target_" not in node:
        return True
    try:
        parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
    except (HydraException, ImportError, ValueError, TypeError):  # build_part says it
        return False
    wanted = parameters[key].annotation if key in parameters else inspect.Parameter.empty
    if wanted in (inspect.Parameter.empty, Any) or isinstance(wanted, str):
        return OmegaConf.is_interpolation(node, key)
    return bool({int, float, bool} & {wanted, *get_args(wanted)})
