"""Settings and results of many runs, as rows of a table."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from fobmaml.arguments import refuse
from fobmaml.saved.checkpoints import CheckpointError, read_checkpoint

Row = dict[str, Any]

NOT_SETTINGS = ("wandb.", "resume")
"""What of a configuration does not tell runs apart."""


@overload
def read_runs(folder: str | PathLike[str], frame: Literal[False] = False) -> list[Row]: ...


@overload
def read_runs(folder: str | PathLike[str], frame: Literal[True]) -> Any: ...


def read_runs(folder: str | PathLike[str], frame: bool = False) -> Any:
    """Every run in ``folder`` and below, in the order of their folders: a list of dictionaries, a row each.

    A row has ``folder``, where the run is from there on; ``status`` (completed, interrupted, failed with its
    ``reason``, or unfinished: it runs, or was killed), ``overrides`` (what its command said); the choice of each group
    (``estimator``, ``dataset``, ...) and every setting by its full name (``solver.lr``); and the results, with the keys
    of summary.json (``test/accuracy``, ``seconds``, ...), None where there is none.

    ``frame``: as a pandas.DataFrame; pandas is not among what fobmaml needs. Raises ValueError for what is no folder.

    >>> [(row["folder"], row["status"], row["solver.lr"]) for row in fobmaml.read_runs("outputs")]
    [('first', 'completed', 0.2)]
    """
    root = Path(folder)
    if not root.is_dir():
        raise refuse("folder", folder, "a folder with runs in or below it")
    rows = [row for path in _folders(root) if (row := read_run(path, root)) is not None]
    if not frame:
        return rows
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("frame=True: pandas is not installed: pip install pandas", name=error.name) from None
    return pandas.DataFrame(rows)


def _folders(root: Path) -> Iterable[Path]:
    """Those of runs, which hold no others."""
    for path, below, files in os.walk(root):
        if {"summary.json", "checkpoint.pt"} & set(files):
            yield Path(path)
            below.clear()
        below.sort()


def read_run(folder: Path, root: Path) -> Row | None:
    """The row of one run; None for a folder of something else."""
    summary = _summary(folder)
    if summary is None:
        return None
    about = {"folder": folder.relative_to(root).as_posix(), "status": summary["status"]}
    if "reason" in summary:
        about["reason"] = summary["reason"]
    about["overrides"] = summary.get("overrides")
    results = {key: value for key, value in summary.items() if not isinstance(value, dict) and key not in about}
    return {**about, **(summary.get("choices") or {}), **flat(summary["config"]), **results}


def _summary(folder: Path) -> dict[str, Any] | None:
    """Of a run that has none yet, what its checkpoint says."""
    try:
        if (path := folder / "summary.json").exists():
            summary = json.loads(path.read_text(encoding="utf-8"))
            return summary if isinstance(summary["status"], str) and isinstance(summary["config"], dict) else None
        state = read_checkpoint(folder / "checkpoint.pt")
        told = {key: state.get(key) for key in ("step", "choices", "overrides", "config")}
        return {"status": "unfinished", **told, **state["latest"]}
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None


def flat(settings: Mapping[str, Any], above: str = "") -> Row:
    """{"solver": {"lr": 0.1}} as {"solver.lr": 0.1}."""
    found: Row = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def table(rows: Sequence[Row], folders: bool = True) -> str:
    """The runs as text: the settings in which they differ, status, step, the metrics of meta-test tasks (the loss,
    where there is no accuracy), bias and seconds, and ``folders``.

    Of the settings those that a command said (``overrides``), for an estimator brings others along; of runs made before
    that was kept, all.
    """
    settings, found = differing(rows), [_measured(row) for row in rows]
    names = dict.fromkeys(["accuracy", *(name for each in found for name in each)])
    lines = [[*settings, "status", "step", *names, "bias", "seconds", *["folder"] * folders]]
    for row, measured in zip(rows, found, strict=True):
        line = [*(setting(row, key) for key in settings), row["status"], _number(row, "step", "d")]
        line += [*(measured.get(name, "") for name in names), _number(row, "bias/relative_error", ".3g")]
        lines.append([*line, _number(row, "seconds", ".1f"), *[row["folder"]] * folders])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _measured(row: Row) -> dict[str, str]:
    """The metrics of meta-test tasks, with their intervals."""
    found = {}
    for key, value in row.items():
        if key.startswith("test/") and f"{key}_ci95" in row and value is not None:
            form, scale, unit = (".1f", 100, " %") if key.endswith("accuracy") else (".3g", 1, "")
            half = _number(row, f"{key}_ci95", form, scale)
            found[key.removeprefix("test/")] = _number(row, key, form, scale) + (f" ± {half}" if half else "") + unit
    if "accuracy" not in found and (loss := _number(row, "test/loss", ".3g")):
        found["loss"] = loss
    return found


def _number(row: Row, key: str, form: str, scale: float = 1) -> str:
    value = row.get(key)
    return "" if value is None else format(scale * value, form)


def differing(rows: Sequence[Row]) -> list[str]:
    """The settings in which runs differ, in their order."""
    said: dict[str, None] = {}
    for row in rows:
        names = [key for key in row if "/" not in key] if row.get("overrides") is None else spoken(row["overrides"])
        said |= dict.fromkeys(key for key in names if not key.startswith(NOT_SETTINGS) and "_target_" not in key)
    about = ("folder", "status", "reason", "overrides", "step", "seconds", "engine")
    return [key for key in said if key not in about and len({setting(row, key) for row in rows}) > 1]


def setting(row: Row, key: str) -> str:
    """Of a run, as text: its value, or, of what chooses others, as experiment=, what the command said."""
    value = row.get(key)
    if value is None:
        value = spoken(row.get("overrides") or ()).get(key)
    return "" if value is None else str(value)


def spoken(overrides: Iterable[str]) -> dict[str, str]:
    """The settings that a command says, with their values: +a.b=1 as {"a.b": "1"}; what it takes away has none."""
    pairs = (text.lstrip("+~").partition("=") for text in overrides)
    return {key: value for key, _, value in pairs}
