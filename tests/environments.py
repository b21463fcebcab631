"""Fresh environments with the wheel of this checkout, far from the repository."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from conftest import ROOT
from packaging.requirements import Requirement


def files() -> list[str]:
    """What a clone has, and what is new in this one."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def build(below: Path) -> tuple[Path, Path]:
    """A wheel, made from a source distribution of what a clone has, and that."""
    clone, folder = below / "clone", below / "built"
    for name in files():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", f"--dist-dir={folder}"],
        cwd=clone,
        check=True,
        capture_output=True,
    )
    (source,) = folder.glob("*.tar.gz")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            folder,
            source,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel, source


def pip(environment: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", *arguments]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def install(environment: Path, wheel: Path, extra: str) -> None:
    """The same by pip."""
    what = f"{wheel}[{extra}]" if extra else wheel
    pip(environment, "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt", what)


def link(environment: Path, wheel: Path, extra: str) -> None:
    """The wheel with what it says it needs and no more, as links to the packages beside this Python: in seconds."""
    pip(environment, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = environment.glob("lib/*/site-packages")
    (own,) = distributions(name="fobmaml", path=[str(site)])
    waiting, seen = [*_needs(own, extra)], {("fobmaml", "")}
    while waiting:
        requirement = waiting.pop()
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), f"{requirement}: {found.version}"
        for name in {"", *requirement.extras} - {name for key, name in seen if key == requirement.name}:
            seen.add((requirement.name, name))
            waiting += _needs(found, name)
        for entry in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(found.locate_file(entry))


def _needs(found: Distribution, extra: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def elsewhere(cache: Path) -> dict[str, str]:
    """No way back to the repository, and no arrays of earlier runs."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "XDG_CACHE_HOME": str(cache)}
