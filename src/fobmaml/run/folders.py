"""The folders of runs and jobs: each has one of its own, and what is in one already is not lost."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from fobmaml import distributed
from fobmaml.files import CannotWrite, failures_named, write_text
from fobmaml.run.errors import FolderInUse, one_line

LONGEST_NAME = 255
"""Bytes that file systems take."""
CONFIG = ".hydra/config.yaml"
"""The first file of a run; with the settings it tells whose folder it is."""
OWN_SETTINGS = {"meta_batch", "checkpoint_every", "wandb"}
"""Settings by which a configuration in a file is known as this program's."""

_made: list[Path] = []
"""Folders that this process has made; those above first."""


def make(folder: Path, new: bool = False) -> Path:
    """Makes a folder and those above it, where they are not there, and remembers which it made. ``new``: with a number
    behind its name if there is one already."""
    for above in reversed(folder.parents):
        _make(above)
    number, made = 2, folder
    while not _make(made) and new:
        made = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return made


def _make(folder: Path) -> bool:
    try:
        folder.mkdir()  # exclusive, unlike a look and a mkdir
    except FileExistsError:
        return False
    except OSError:
        if folder.exists():  # a file system's root, or a read-only one above
            return False
        raise
    _made.append(folder)
    return True


def remove_empty() -> None:
    """Removes the folders that this process has made and left empty."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()


class RunFolder(Callback):
    """Makes the folder of a single run, before Hydra does: one that is named after the time is its own, however many
    runs start in the same second; one that the user names may have been there."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # as Hydra does next: the folder's name may ask for it
        written = OmegaConf.to_container(config.hydra.run, resolve=False)
        with ending_the_program():
            # What is wrong with a setting is said of it, not of the folder that is named after it.
            settings = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            OmegaConf.to_container(settings, resolve=True)
            folder = Path(config.hydra.run.dir).absolute()
        with suppress(OSError), read_write(config.hydra):  # Hydra tries again, and its error is reported
            config.hydra.run.dir = str(make(folder, new="${now:" in str(written)))


@contextmanager
def ending_the_program() -> Iterator[None]:
    """For Hydra's callbacks: it makes warnings of what they raise, and goes on."""
    try:
        yield
    except (CannotWrite, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}" if distributed.rank() == 0 else 1)


def job_folder(settings: str) -> str:
    """The name of a job's folder in its sweep's: its settings, and where they come from if that was said.

    One that is no name for a file, or too long for one, is shortened, with a digest of the whole, which is in
    ``.hydra`` of the job.
    """
    config = HydraConfig.get()
    said = [settings] if settings else []
    if config.job.config_name != "train":
        said.append(f"--config-name={config.job.config_name}")
    said += [
        f"--config-dir={_from(config.runtime.cwd, source.path)}"
        for source in config.runtime.config_sources
        if source.provider == "command-line"
    ]
    whole = ",".join(said) or "defaults"
    name = whole.replace("/", "_").replace("\\", "_").replace("\0", "_")
    if name != whole or len(os.fsencode(name)) > LONGEST_NAME:
        digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
        name = os.fsencode(name)[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + digest
    if config.mode == RunMode.MULTIRUN:  # Hydra asks just before it makes the folder, and where that fails says so
        with suppress(OSError):
            make(Path(config.sweep.dir, name).absolute())
    return name


def _from(here: str, path: str) -> str:
    return os.path.relpath(path, here) if Path(path).is_relative_to(here) else path


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Holds a folder until the end, however it comes. Raises FolderInUse if another process does, CannotWrite."""
    lock = FileLock(folder / ".lock", timeout=0)
    with failures_named(folder):
        try:
            lock.acquire()
        except Timeout:  # an OSError, too
            raise FolderInUse(f"hydra.run.dir={folder}: takes a folder in which no other process works") from None
    try:
        yield
    finally:
        lock.release()


def refuse_foreign(folder: Path, name: str, marker: str, own: Sequence[str]) -> None:
    """Raises CannotWrite if writing to ``folder`` would lose a file that this program did not make.

    Every file of a run or a sweep comes after its ``marker``, a configuration. ``name``: the setting that says
    ``folder``; ``own``: the other files that would be written there.
    """
    there = [file for file in (marker, *own) if (folder / file).exists()]
    if there and not _has_own_settings(folder / marker):
        raise CannotWrite(f"{name}={folder}: takes a folder without {there[0]} of another program, and there is one")


def _has_own_settings(path: Path) -> bool:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # of a parser, which meets any file here
        return False
    return isinstance(content, dict) and content.keys() >= OWN_SETTINGS


def write_settings(folder: Path, config: DictConfig) -> None:
    """``.hydra``, as Hydra itself writes it, though before the settings are checked."""
    hydra: Any = HydraConfig.instance().cfg
    path = folder / CONFIG
    path.parent.mkdir(exist_ok=True)
    for name, content in ((path.name, config), ("hydra.yaml", hydra), ("overrides.yaml", hydra.hydra.overrides.task)):
        save(path.with_name(name), content)


def save(path: Path, content: Any) -> None:
    write_text(path, OmegaConf.to_yaml(content))
