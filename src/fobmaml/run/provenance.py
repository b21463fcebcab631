"""What a measurement was made with: commit, versions, machine."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device | str = "cpu", engine: str | None = None) -> dict[str, Any]:
    """Commit (None outside a checkout; ``dirty`` if files differ from it, other than results), versions, processor,
    threads, device, and if it is given the ``engine`` that has computed gradients."""
    ours = _git("ls-files", "--error-unmatch", Path(__file__).name)  # not those of a checkout around an installation
    commit = _git("rev-parse", "HEAD") if ours else None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
    return {
        "commit": commit,
        "dirty": bool(changed) if commit else None,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "numpy", "mnist1d")}},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        **({} if engine is None else {"engine": engine}),
    }


def distinct(made_with: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each provenance once, in their order: what measurements of one table were made with."""
    return [one for place, one in enumerate(made_with) if one not in made_with[:place]]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
