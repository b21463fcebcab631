"""Writes results/README.md, claim by claim, from the tables: python scripts/summary.py [FOLDER] (--check: only says
whether it is up to date)."""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims import CLAIMS
from drawing import Missing, Row, folder_given, groups, load, settings

from fobmaml.files import write_text
from fobmaml.run.plotting import method


@dataclass(frozen=True)
class InFolder:
    """The tables of a folder."""

    folder: Path

    def rows(self, name: str, made_by: str | None = None) -> list[Row]:
        return load(self.folder, name, made_by)

    def settings(self, name: str) -> dict[str, Any]:
        return settings(self.folder, name)


def tuning(folder: Path) -> str:
    """What was tried for each method, and the settings that were chosen."""
    try:
        rows = load(folder, "tuning", "python scripts/tune.py")
    except Missing as missing:
        return f"Not measured: {missing}."
    lines = [
        "| experiment | method | runs | diverged | chosen, on validation tasks | its settings |",
        "|---|---|---|---|---|---|",
    ]
    for (experiment, name), found in groups(rows, "experiment", "estimator").items():
        chosen = [row for row in found if row["chosen"] == "true"]
        if not chosen:
            continue
        diverged = sum(row["diverged"] == "true" for row in found)
        lines.append(
            f"| {experiment} | {method(name).label} | {len(found)} | {diverged} | "
            f"{100 * statistics.fmean(row['accuracy'] for row in chosen):.1f} % | {chosen[0]['settings']} |"
        )
    return "\n".join(lines)


def costs(folder: Path) -> str:
    """What each experiment took."""
    lines = ["| table | jobs | minutes, one thread each | commit |", "|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        if "jobs" in about:
            commits = dict.fromkeys(made["commit"][:7] for made in about["provenance"])
            lines.append(
                f"| [{path.stem}]({path.stem}.csv) | {about['jobs']} | {about['seconds'] / 60:.0f} | "
                f"{', '.join(commits)} |"
            )
    return "\n".join(lines)


def page(folder: Path) -> str:
    sections, verdicts = [], ["| claim | verdict |", "|---|---|"]
    for claim in CLAIMS:
        try:
            found = claim.examine(InFolder(folder))
            measured, verdict = found.measured, str(found.verdict)
        except Missing as missing:
            measured, verdict = f"{missing}.", "not measured"
        verdicts.append(f"| {claim.title} | {verdict} |")
        picture = f"\n\n![{claim.title}](figures/{claim.figure}.png)" if claim.figure else ""
        sections.append(
            f"## {claim.title}: {verdict}\n\n*Claim:* {claim.paper}\n\n*Holds if:* {claim.rule}\n\n"
            f"*Measured:* {measured}{picture}\n"
        )
    return (
        "# What was claimed and what was measured\n\nWritten by `make figures` from the tables beside it; each "
        "`NAME.json` has the commit, versions, machine and settings of `NAME.csv`, and `make reproduce ARGS=NAME` "
        "makes it again. Intervals are 95 %. The rules are those of [protocol.md](protocol.md); a claim of several "
        "parts holds if they all do, holds in part if some do, and is not decided otherwise, unless none does. Noise "
        "decides nothing.\n\n"
        + "\n".join(verdicts)
        + "\n\n"
        + "\n".join(sections)
        + "\n## Tuning\n\nThe same trials for every method, on validation tasks, by the rule that stands in "
        "[tune.py](../scripts/tune.py); every trial is in [tuning.csv](tuning.csv).\n\n"
        + tuning(folder)
        + "\n\n## What it took\n\n"
        + costs(folder)
        + "\n"
    )


def write(folder: Path) -> None:
    path, text = folder / "README.md", page(folder)
    write_text(path, text)
    print(os.path.relpath(path))


def main() -> None:
    folder = folder_given()
    if "--check" not in sys.argv:
        write(folder)
    elif not (folder / "README.md").exists() or (folder / "README.md").read_text() != page(folder):
        sys.exit(f"error: {os.path.relpath(folder / 'README.md')} differs from the tables: make figures")


if __name__ == "__main__":
    main()
