"""The parts of a run from its settings, every one checked."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from fobmaml import distributed
from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.estimators import Adaptation, Estimator
from fobmaml.measure import Measurement, Metric
from fobmaml.run.errors import ConfigError
from fobmaml.run.settings import GROUPS, choices, measurements_in, plain_config
from fobmaml.run.tracking import check_options
from fobmaml.saved.parts import evaluation_solver
from fobmaml.settings import Settings
from fobmaml.solvers import Solver
from fobmaml.stages import Stage
from fobmaml.tasks import FewShot
from fobmaml.tasks.checks import check_members
from fobmaml.training import MetaTraining

KINDS = {
    "dataset": object,
    "model": torch.nn.Module,
    "solver": Solver,
    "eval.solver": Solver,
    "inner": Solver,
    "estimator": Estimator,
    "optimizer": torch.optim.Optimizer,
    "metrics": Metric,
}
"""What the ``_target_`` of a group makes; of a data set it is looked at what it has. All others are measurements."""


def build(cfg: DictConfig) -> MetaTraining:
    """The parts of a run, every setting checked. Raises ConfigError."""
    with bad_values_named():
        device = choose_device(cfg.device)
        dtype = getattr(torch, one_of("dtype", cfg.dtype, ("float32", "float64")))
        plain = plain_config(cfg)
        check_options(plain["wandb"])
        whole_number("seed", cfg.seed, at_least=0, at_most=2**64 - 1)  # what torch takes
        settings = Settings(**{field.name: plain[field.name] for field in fields(Settings)})
        number("optimizer.lr", cfg.optimizer.lr, above=0.0)  # torch's own optimizers say less
    dataset = build_part(cfg, "dataset")
    if isinstance(dataset, FewShot):
        dataset = dataset.to(device, dtype)  # where its tasks are then gathered
    with bad_values_named():
        check_members(dataset)
    torch.manual_seed(settings.seed)
    model = build_part(cfg, "model", input_shape=dataset.input_shape, outputs=dataset.outputs).to(device, dtype)
    estimator = build_part(cfg, "estimator", solver=build_part(cfg, "solver"))
    measurements = [build_part(cfg, name) for name in measurements_in(cfg)]
    adaptation, stages = build_adaptation(cfg), build_stages(cfg)
    metrics = [
        build_part(OmegaConf.create({f"metrics[{name}]": made}), f"metrics[{name}]")
        for name, made in plain_config(cfg)["metrics"].items()
    ]
    with bad_values_named():
        return MetaTraining(
            model,
            dataset,
            estimator,
            settings,
            lambda p: build_part(cfg, "optimizer", params=p),
            measurements,
            adaptation,
            stages,
            metrics,
        )


def build_adaptation(cfg: DictConfig) -> Adaptation | None:
    """Of validation and meta-test tasks: ``eval.solver``, what it does not say from ``solver`` if both make the same,
    and ``eval.lam``. None: as in training. Raises ConfigError."""
    plain, lam = plain_config(cfg), cfg.eval.lam
    if not isinstance(said := plain["eval"]["solver"], dict | None):
        raise ConfigError(str(refuse("eval.solver", said, "settings of a solver, or null")))
    with bad_values_named():
        if lam is not None:
            number("eval.lam", lam, at_least=0.0)
    solver = evaluation_solver(plain)
    if solver is None:
        return None if lam is None else Adaptation(lam=lam)
    return Adaptation(build_part(OmegaConf.create({"eval.solver": solver}), "eval.solver"), lam)


def build_stages(cfg: DictConfig) -> list[Stage]:
    """``inner``: what each stage says of its solver, the rest from ``solver``. Raises ConfigError."""
    plain, stages = plain_config(cfg), []
    said = [] if plain["inner"] is None else plain["inner"]
    if not isinstance(said, list):
        raise ConfigError(str(refuse("inner", said, "null, or a list of stages: [{until: 0.5, steps: 5}]")))
    for i, stage in enumerate(said):
        name = f"inner[{i}]"
        if not isinstance(stage, dict) or "until" not in stage or "_target_" in stage:
            raise ConfigError(str(refuse(name, stage, "until and settings of the solver: {until: 0.5, steps: 5}")))
        until = stage.pop("until")
        solver = build_part(OmegaConf.create({name: plain["solver"] | stage}), name)
        with bad_values_named(f"{name}."):
            stages.append(Stage(until, solver))
    return stages


def build_part(cfg: DictConfig, group: str, **given: Any) -> Any:
    """What a group's ``_target_`` makes of its settings. Raises ConfigError."""
    try:
        part = hydra.utils.instantiate(cfg[group], **given, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | TypeError):
            raise
        text = str(error.__cause__)
        key = text.split("=", 1)[0]
        if key in cfg[group]:  # a setting taken from elsewhere, like width, is named as it is there
            written = cast(dict[str, Any], OmegaConf.to_container(cfg[group], resolve=False))[key]
            said = re.fullmatch(r"\$\{([\w.]+)\}", str(written))
            text = f"{said[1] if said else f'{group}.{key}'}{text.removeprefix(key)}"
        elif group in GROUPS and (unknown := re.search("unexpected keyword argument '(.*)'", text)):
            text = f"{group}.{unknown[1]}: {group}={choices()[group]} has no such setting; ~{group}.{unknown[1]}"
            text += " takes it back, where another choice sets it"
        else:
            text = f"{group}={choices()[group]}: {text}" if group in GROUPS else f"{group}: {text}"
        raise ConfigError(text) from error
    kind = KINDS.get(group.split("[")[0], Measurement)
    if not isinstance(part, kind):
        raise ConfigError(
            f"{group}._target_={cfg[group].get('_target_')}: takes one that makes a "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return part


@contextmanager
def bad_values_named(group: str = "") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{group}{error}") from error


def choose_device(name: str) -> torch.device:
    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cuda" and distributed.size() > 1:  # each of a machine's processes has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise refuse("device", name, "auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(f"{name}:0".split(":")[1]) >= found:
        raise refuse("device", name, f"a GPU that is there, and PyTorch finds {found}; device=cpu works everywhere")
    return torch.device(name)
