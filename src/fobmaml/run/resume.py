"""Where a run goes on: at a checkpoint, behind its events, or at the beginning."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fobmaml import distributed
from fobmaml.files import CannotWrite
from fobmaml.run import folders
from fobmaml.run.build import build
from fobmaml.run.errors import one_line
from fobmaml.run.events import events_until
from fobmaml.run.settings import same_run
from fobmaml.saved.checkpoints import CheckpointError, load_checkpoint, read_checkpoint
from fobmaml.training import MetaTraining


@dataclass(frozen=True)
class Start:
    """Where a run goes on: at a checkpoint's ``state`` from ``source``, after the events that ``history`` says."""

    source: Path | None
    state: dict[str, Any] | None
    history: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """Of the run that is complete already."""


def resume(cfg: DictConfig, training: MetaTraining, folder: Path) -> Start:
    """Brings ``training`` to where the run goes on. Raises CheckpointError, CannotWrite."""
    source = checkpoint_to_continue(cfg, folder)
    state, history = None, []
    if source:
        try:
            state = load_checkpoint(source, same_run(cfg))
        except CheckpointError as error:
            raise CheckpointError(f"{'checkpoint ' if source.parent == folder else 'resume='}{error}") from None
        try:
            training.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"{source}: takes a whole checkpoint of this program, and this one's state does not "
                f"fit ({one_line(error) or type(error).__name__})"
            ) from None
        history = events_until(source.with_name("metrics.jsonl"), training.step)
    summary = read_summary(folder / "summary.json")
    if source is None or source.parent != folder:
        folders.refuse_foreign(
            folder, "hydra.run.dir", folders.CONFIG, ("summary.json", "metrics.jsonl", "learning_curve.png")
        )
        steps = [event["step"] for event in events_until(folder / "metrics.jsonl", sys.maxsize)]
        if any(steps) or (summary and (summary["step"] or summary["status"] == "completed")):
            raise CannotWrite(
                f"hydra.run.dir={folder}: takes a folder without results, and there are those of a run "
                "whose checkpoint.pt is gone"
            )
        summary = None
    return Start(source, state, history, summary if summary and summary["status"] == "completed" else None)


def begun(cfg: DictConfig, folder: Path | None = None) -> MetaTraining:
    """What ``build`` makes, with the parameters of ``init``. In the only process of a run in ``folder`` not where it
    continues a checkpoint, which has them all; others have from ``init`` what is not trained. Raises ConfigError,
    CheckpointError."""
    training = build(cfg)
    continued = folder is not None and distributed.size() == 1 and checkpoint_to_continue(cfg, folder) is not None
    if cfg.init is None or continued:
        return training
    try:
        state = read_checkpoint(path_of_checkpoint(cfg.init))
        training.outer.begin_from(state)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"init={cfg.init}: {error}") from None
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"init={cfg.init}: takes a whole checkpoint of this program, and this one's state does not fit "
            f"({one_line(error) or type(error).__name__})"
        ) from None
    return training


def read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {**summary, "status": summary["status"], "step": summary["step"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: takes a summary of this program's ({one_line(error)})") from None


def checkpoint_to_continue(cfg: DictConfig, folder: Path) -> Path | None:
    """A run started again in its own folder continues there; else ``resume=``, a checkpoint or a run's folder."""
    own = folder / "checkpoint.pt"
    if own.exists() or cfg.resume is None:
        return own if own.exists() else None
    return path_of_checkpoint(cfg.resume)


def path_of_checkpoint(said: object) -> Path:
    """Of a setting that names it, or its run's folder."""
    path = Path(str(said))
    if HydraConfig.get().job.chdir:  # it is said from where the command is given
        path = Path(hydra.utils.to_absolute_path(str(path)))
    return path / "checkpoint.pt" if path.is_dir() else path
