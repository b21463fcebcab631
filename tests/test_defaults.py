"""A default stands in one place, or in two that say the same."""

import dataclasses
import inspect

import pytest
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from fobmaml.run.settings import measurements_in
from fobmaml.settings import Settings

CONFIGS = ROOT / "configs"
OURS = {
    path.relative_to(CONFIGS).as_posix(): found
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if (found := yaml.safe_load(path.read_text()) or {}).get("_target_", "").startswith("fobmaml.")
}
PRESETS = {"model/linear.yaml": {"depth"}, "estimator/maml_checkpoint.yaml": {"checkpoint"}}
"""A choice that is another's with a setting of its own."""


@pytest.mark.parametrize("name", OURS)
def test_a_choice_has_the_defaults_of_what_it_makes(name):
    parameters = inspect.signature(get_object(OURS[name]["_target_"])).parameters
    for key, value in OURS[name].items():
        if key.startswith("_") or key in {"defaults", *PRESETS.get(name, ())} or str(value).startswith("${"):
            continue
        assert parameters[key].default == value, key


def test_the_program_has_the_defaults_of_its_parts():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["estimator=symmetric"])  # the default one brings settings of its own
    assert {field.name: cfg[field.name] for field in dataclasses.fields(Settings)} == dataclasses.asdict(Settings())
    names = measurements_in(cfg)
    assert names == ["test", "memory", "validation", "bias", "error_estimate", "smoothness", "curvature"]
    for name in names:
        made = instantiate(cfg[name])
        assert vars(made) == vars(type(made)()), OmegaConf.to_container(cfg[name])
