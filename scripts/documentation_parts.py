"""What pages of the site ask others for, as Markdown: files, tables, claims, keys, settings, kinds of modules."""

import importlib
import inspect
import posixpath
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tables
from claims import CLAIMS
from drawing import RESULTS, Missing, Row
from summary import InFolder

import fobmaml
from fobmaml import measure
from fobmaml.files import read_csv
from fobmaml.logged import KEYS
from fobmaml.run.plotting import method

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "results/README.md": "claims.md",
    "results/protocol.md": "protocol.md",
    "configs/train.yaml": "settings.md",
    "examples/own_project/README.md": "own_project.md",
}
"""Files of the repository that are pages of the site."""
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def include(name: str) -> str:
    """A file of the repository, its links seen from docs/: to pages where they are, else to the files."""
    folder = posixpath.dirname(name)

    def seen_from_docs(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor or ''})"
        if picture and not (ROOT / path).exists():
            return f"*No picture yet: {text}.*"
        if (ROOT / path).is_dir():
            return f"`{path}/`"
        return f"{picture}[{text}](../{path})"

    return LINK.sub(seen_from_docs, (ROOT / name).read_text(encoding="utf-8"))


def table(name: str) -> str:
    """One of those of scripts/tables.py, from results/. Raises Missing."""
    return tables.TABLES[name](RESULTS)


def csv(name: str, *columns: str) -> str:
    """Columns of results/NAME.csv, all if none is named, numbers with four digits; COLUMN=TITLE gives it another title.

    Raises Missing.
    """
    rows = _read(name)
    asked = [column.partition("=") for column in columns or rows[0]]
    titles = [(title or column).replace("_", " ") for column, _, title in asked]
    return _table(titles, [[_number(row[column]) for column, _, _ in asked] for row in rows])


def chunks() -> str:
    """Of results/bench_chunks.csv: what ``task_chunk=auto`` takes, and its time beside the best fixed choice's.

    Raises Missing.
    """
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in _read("bench_chunks"):
        found.setdefault((row["estimator"], row["width"]), []).append(row)
    lines = []
    for (name, width), rows in found.items():
        (auto,) = [row for row in rows if row["auto"] == "true"]
        best = min((row for row in rows if row["auto"] != "true"), key=lambda row: float(row["seconds_median"]))
        taken, times = ([f"{row[key]}" for row in (auto, best)] for key in ("task_chunk", "seconds_median"))
        lines.append(
            [method(name).label, width, auto["tasks"], taken[0], taken[1]]
            + [f"{1000 * float(seconds):.0f} ms" for seconds in times]
            + [f"{float(auto['ratio_to_best_fixed']):.2f}"]
        )
    sides = ("time of `auto`", "of the best fixed", "ratio")
    header = ("method", "channels", "tasks", "`auto` takes", "best fixed", *sides)
    return _table(header, lines)


def _read(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise Missing(f"{path} is missing")
    return read_csv(path)


def _number(text: str) -> str:
    try:
        return text if text.isdigit() else f"{float(text):.4g}"
    except ValueError:
        return text or "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


@dataclass(frozen=True)
class Noting(InFolder):
    """Tables that note which of them were read."""

    read: list[str] = field(default_factory=list)

    def rows(self, name: str, made_by: str | None = None) -> list[Row]:
        self.read.append(name)
        return super().rows(name, made_by)


def claims() -> str:
    """Each claim with its verdict, and what measures it again."""
    rows = []
    for claim in CLAIMS:
        asked = Noting(RESULTS)
        try:
            verdict = str(claim.examine(asked).verdict)
        except Missing:
            verdict = "not measured"
        names = dict.fromkeys(re.sub("_(curves|slopes|examples)$", "", name) for name in asked.read)
        again = [f"`make {name}`" if name in ("bench", "race") else f"`make reproduce ARGS={name}`" for name in names]
        rows.append([claim.title, claim.paper, verdict, "<br>".join(again)])
    return _table(("claim", "what is claimed", "verdict", "measured again by"), rows)


def keys() -> str:
    """All keys that a run may write, as the parts of the program declare them."""
    classes = [(name, getattr(measure, name)) for name in measure.__all__ if inspect.isclass(getattr(measure, name))]
    declared = [("Training itself", KEYS)] + [
        (f"{{py:class}}`~fobmaml.measure.{name}`", each.keys)
        for name, each in classes
        if issubclass(each, measure.Measurement) and each.keys
    ]
    metrics = {
        key: f"{text}: {{py:class}}`~fobmaml.measure.{name}`"
        for name, each in classes
        if issubclass(each, measure.Metric) and hasattr(each, "name")
        for key, text in (
            (f"val/{each.name}", "of validation tasks, mean"),
            (f"test/{each.name}", "of meta-test tasks, mean"),
            (f"test/{each.name}_ci95", "half width of its 95 % interval"),
        )
    }
    declared.append(("Metrics, those that `metrics` names", metrics))
    sections, seen = [], set[str]()
    for title, found in declared:
        rows = [[f"`{key}`", text] for key, text in found.items() if key not in seen]
        seen |= found.keys()
        sections.append(f"### {title}\n\n" + _table(("key", "what it is"), rows))
    return "\n\n".join(sections)


def settings() -> str:
    """Every file of configs/, as it is."""
    sections = [_yaml("## train.yaml", ROOT / "configs" / "train.yaml")]
    for group in sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir()):
        files = [(path.relative_to(group).with_suffix("").as_posix(), path) for path in sorted(group.rglob("*.yaml"))]
        sections += [f"## {group.name}", *(_yaml(f"### {name}", path) for name, path in files)]
    return "\n\n".join(sections)


def _yaml(heading: str, path: Path) -> str:
    return f"{heading}\n\n````yaml\n{path.read_text(encoding='utf-8')}````"


def modules() -> str:
    """The cases of tests/module_cases.py, and what computes a symmetric meta-gradient of each."""
    cases = importlib.import_module("module_cases")
    sections = []
    for title, names in (("Models", cases.CASES), ("Losses, with a small network", cases.LOSSES)):
        rows = []
        for name in names:
            make, x = cases.CASES.get(name, cases.CASES["mlp"])
            loss_fn, y = cases.LOSSES.get(name, cases.LOSSES["cross_entropy"])
            tasks = cases.tasks(x, y)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, on what it has no batching rule for
                model = cases.made(make, tasks.support_x[0])
                used = fobmaml.meta_gradient(cases.ESTIMATORS["symmetric"], model, loss_fn, tasks).engine
            refused = cases.FIRST_DERIVATIVES_ONLY.get(name)
            rows.append([name, f"`{used}`", f"refused: {refused}" if refused else "yes"])
        sections.append(f"## {title}\n\n" + _table(("case", "how", "MAML, iMAML"), rows))
    return "\n\n".join(sections)
