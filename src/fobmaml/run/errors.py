"""How a run may end, and each end in one line."""

import re
import sys
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from fobmaml.distributed import ProcessLost
from fobmaml.estimators import NotConverged
from fobmaml.files import CannotWrite
from fobmaml.saved.checkpoints import CheckpointError
from fobmaml.training import Diverged


class ConfigError(ValueError):
    """A setting that cannot work; the text is one line that names it."""


class FolderInUse(RuntimeError):
    """Another process works in a run's folder."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop."""

    status = "interrupted"
    advice = "{error}; {again} continues"


# What a user can put right: reported in one line. Set HYDRA_FULL_ERROR=1 for the traceback.
EXPECTED = (
    ConfigError,
    CannotWrite,
    CheckpointError,
    Diverged,
    FolderInUse,
    NotConverged,
    ProcessLost,
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
)


def command() -> str:
    """How this program was started, for messages that say it."""
    return "fobmaml" if Path(sys.argv[0]).stem == "fobmaml" else "python train.py"


def one_line(error: BaseException) -> str:
    """What was wrong, as one line with the cause."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: takes one of {', '.join(error.options)}"
    text, _, looked_in = str(error).partition("Config search path:")
    lines = [
        line.strip()
        for line in text.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "").splitlines()
        if line.strip()
        and "://hydra.cc" not in line
        and not line.strip().startswith(("object_type=", "reference_type="))
    ]
    unknown = re.match("Could not override '(.+)'", text)
    if isinstance(error, OverrideParseException) and error.override:
        lines.insert(0, error.override)
    if unknown:
        return f"{unknown[1]}: there is no such setting ({command()} --help lists them)"
    if places := re.findall("path=file://(.+)", looked_in):
        lines.append(f"looked in {', '.join(places)}")
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if reason not in text:
            lines.append(reason)
    return "; ".join(line.removesuffix(".").removesuffix(":") for line in lines)
