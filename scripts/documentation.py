"""Builds the site, from docs/ and from docstrings: python scripts/documentation.py [FOLDER]

FOLDER is where it goes, by default outputs/site. A page of docs/ is Markdown. Between its lines it may ask for what
others know, by a comment ``<!-- site: PART ARGUMENTS -->``, and gets it when the site is built: the functions of
documentation_parts.py and ``reference``. A page that begins with ``executed: true`` between two lines of dashes has its
blocks run, with what they print put below: documentation_blocks.py.

Sphinx, Furo and MyST, since what they make is read without a network: search works from disk, mathematics is MathML,
which browsers draw by themselves, fonts are the reader's own, and ``[source]`` leads to pages of the site.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import documentation_parts as parts
from documentation_blocks import BlockFailed, executed, one_thread
from documentation_reference import method_docs, reference, undocumented
from drawing import Missing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MARKER = re.compile(r"^<!-- site: (\w+) ?(.*?) -->$", re.MULTILINE)
FRONT = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)
LABEL = re.compile(r"^(?=[^\s>-])(.*?[.;)] )?(Cost:|Memory:|References?:|Raises )", re.MULTILINE)
"""What begins a paragraph of its own, at the start of a docstring's line or after the end of a sentence in it."""
UNIT = re.compile(r"(?<=\d) (?=(?:%|ms|s|M|MB|GB)(?![\w.]))|(?<=\d) (?=±)|(?<=±) (?=\d)")
"""The blanks in numbers of tables, which no line is to end with."""
PARTS: Mapping[str, Callable[..., str]] = {
    "include": parts.include,
    "table": parts.table,
    "csv": parts.csv,
    "chunks": parts.chunks,
    "claims": parts.claims,
    "keys": parts.keys,
    "settings": parts.settings,
    "modules": parts.modules,
    "reference": reference,
}


def is_executed(text: str) -> bool:
    front = FRONT.match(text)
    return front is not None and "executed: true" in front[1].splitlines()


def filled(text: str) -> str:
    """A page with what it asks for. Raises Missing."""
    whole = MARKER.sub(lambda found: PARTS[found[1]](*found[2].split()), text)
    return re.sub(r"^\|.*$", lambda line: UNIT.sub("\N{NO-BREAK SPACE}", line[0]), whole, flags=re.MULTILINE)


def connect(app: Any) -> None:
    """What docs/conf.py hands over: pages, docstrings and mathematics. Raises RuntimeError for an undocumented name."""
    if missing := undocumented():
        raise RuntimeError(f"public names without documentation: {', '.join(missing)}")
    running: dict[str, Future[str]] = {}
    app.connect("env-before-read-docs", partial(_run, running))
    app.connect("source-read", partial(_read, running))
    app.connect("autodoc-process-docstring", _describe)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


def _run(running: dict[str, Future[str]], _app: Any, _environment: Any, names: Sequence[str]) -> None:
    """Begins to run the blocks of pages, as many pages at once as there are processors, one thread each."""
    texts = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in names}
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), one_thread)
    running |= {name: pool.submit(executed, text) for name, text in texts.items() if is_executed(text)}
    pool.shutdown(wait=False)  # when all are through


def _read(running: Mapping[str, Future[str]], _app: Any, name: str, source: list[str]) -> None:
    try:
        source[0] = filled(running[name].result() if name in running else source[0])
    except (Missing, BlockFailed) as error:
        raise RuntimeError(f"docs/{name}.md: {error}") from error


def _describe(_app: Any, what: str, name: str, value: object, _options: object, lines: list[str]) -> None:
    kind, _, method = name.rpartition(".")
    if not (getattr(value, "__module__", None) or "fobmaml").startswith("fobmaml"):  # torch's, as a class holds it
        lines[:] = [f"``{getattr(value, '__module__', '')}.{getattr(value, '__name__', method)}``"]
    elif what == "method" and not lines:
        module, _, owner = kind.rpartition(".")
        lines += method_docs(getattr(importlib.import_module(module), owner), method).splitlines()
    text = "\n".join(lines)
    while (labelled := LABEL.sub(lambda found: f"{found[1] or ''}\n\n**{found[2].strip()}** ", text)) != text:
        text = labelled
    lines[:] = text.split("\n")


def _inline(translator: Any, node: Any) -> None:
    _write(translator, node, "inline")


def _display(translator: Any, node: Any) -> None:
    _write(translator, node, "block")


def _write(translator: Any, node: Any, display: str) -> None:
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    drawn = convert(node.astext(), display=display)
    if "\\" in drawn:
        raise ValueError(f"latex2mathml does not know all commands in {node.astext()}")
    translator.body.append(drawn)
    raise SkipNode


PAGE = ROOT / "outputs" / "explorer.html"


def _interactive_page() -> subprocess.Popen[bytes] | None:
    """What builds the interactive page, where it is not there or older than what it is made of."""
    made_of = [*(ROOT / "scripts").glob("explorer*.py"), *(ROOT / "scripts" / "explorer_page").iterdir()]
    if PAGE.exists() and PAGE.stat().st_mtime >= max(path.stat().st_mtime for path in made_of):
        return None
    return subprocess.Popen([sys.executable, str(ROOT / "scripts" / "explorer.py"), "--no-pictures", f"--page={PAGE}"])


def main() -> None:
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs" / "site"
    options = ["-W", "--keep-going", "-E", "-q", "-b", "html", "-d", str(site.parent / f".{site.name}")]
    beside = _interactive_page()  # most of both is work of one thread
    try:
        if subprocess.run([sys.executable, "-m", "sphinx", *options, str(DOCS), str(site)], check=False).returncode:
            sys.exit("error: the site was not built, for the reasons above")
        if beside and beside.wait():
            sys.exit("error: the interactive page was not built, for the reasons above")
    finally:
        if beside and beside.poll() is None:
            beside.terminate()
    shutil.copy(PAGE, site / "interactive.html")
    print(f"{os.path.relpath(site)}/index.html opens in a browser as it is")


if __name__ == "__main__":
    main()
