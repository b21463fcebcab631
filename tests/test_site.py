"""The site as it is built: nothing is broken, nothing comes from elsewhere, and a browser has nothing to complain of.

Its tests are `make test-site`: they take packages that `make test` does without, and minutes.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT
from environments import build, elsewhere, link
from test_docs import filled

DOCS = ROOT / "docs"
has_sphinx = pytest.mark.skipif(
    not (find_spec("sphinx") and find_spec("furo") and find_spec("myst_parser")), reason="sphinx: make docs installs it"
)
pytestmark = [pytest.mark.site]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built once for all processes of the test run, with all warnings as errors and every tutorial run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", tmp_path_factory.getbasetemp().name)
    folder = tmp_path_factory.getbasetemp().parent / f"site-{run}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "interactive.html").exists():
            command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
            done = subprocess.run(command, text=True, capture_output=True, timeout=1500)
            assert done.returncode == 0, done.stderr
            (folder / "interactive.html").write_text(
                "<!doctype html><html lang='en'><title>in its place</title></html>"
            )
    return folder


class Page(HTMLParser):
    """What a page asks for, where it links to, and the places in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.asked, self.linked, self.places = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.linked.add(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.asked.add(given["href"])
        elif given.get("src"):
            self.asked.add(given["src"])


@has_sphinx
class TestSite:
    def test_links_are_alive_and_nothing_comes_from_elsewhere(self, site):
        pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
        reached = {(site / "index.html").resolve()}
        for path, page in pages.items():
            for target in page.asked:
                assert not urlsplit(target).netloc, f"{path}: {target}"
            for target in page.asked | page.linked:
                parts = urlsplit(target)
                if parts.scheme or parts.netloc:
                    continue
                there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                assert there.exists(), f"{path.name}: {target}"
                reached.add(there)
                if parts.fragment and there in pages and there.name != "search.html":
                    assert unquote(parts.fragment) in pages[there].places, f"{path.name}: {target}"
        assert {*pages} <= reached

    def test_style_sheets_ask_for_nothing_elsewhere(self, site):
        for path in site.rglob("*.css"):
            assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", path.read_text(errors="ignore")), path

    def test_formulas_lead_to_their_source(self, site):
        method = (site / "method.html").read_text()
        for name in ("Symmetric", "Tangent", "Exact", "Reptile"):
            assert f'href="reference/estimators.html#fobmaml.estimators.{name}"' in method
            reference = (site / "reference" / "estimators.html").read_text()
            (line,) = {*re.findall(rf'href="\.\./(_modules/[\w/]+\.html#{name})"', reference)}
            file, _, anchor = line.partition("#")
            assert f'id="{anchor}"' in (site / file).read_text()
        assert "<math" in method

    @pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
    def test_in_a_browser(self, site, width, scheme):
        explorer = pytest.importorskip("explorer", reason="the packages of `make explorer` are not installed")
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        if explorer.chromium() is None:
            pytest.skip("there is no Chromium: apt-get install chromium")
        pages = [path for path in site.rglob("*.html") if "_modules" not in path.parts and path.stem != "interactive"]
        with explorer.browser() as started:
            tab = started.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said, asked = [], []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            for path in pages:
                tab.goto(path.as_uri())
                tab.wait_for_load_state("load")
                assert not said, f"{path.name}: {said}"
                found = axe.run(tab, options={"preload": False, "resultTypes": ["violations"]})  # no fetching
                assert not found.response["violations"], f"{path.name}: {found.generate_report()}"
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, path.name
            assert all(url.startswith(("file:", "data:")) for url in asked)

    def test_search_works_from_disk(self, site):
        explorer = pytest.importorskip("explorer", reason="the packages of `make explorer` are not installed")
        if explorer.chromium() is None:
            pytest.skip("there is no Chromium: apt-get install chromium")
        with explorer.browser() as started:
            tab = started.new_page()
            tab.goto((site / "search.html").as_uri() + "?q=truncation")
            tab.wait_for_selector("#search-results li a")
            assert any("method" in link.get_attribute("href") for link in tab.locator("#search-results li a").all())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """The Python of an environment with the wheel and what it needs, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    wheel, _ = build(tmp_path_factory.mktemp("built"))
    link(folder, wheel, "run")
    return folder / "bin" / "python"


RUN = "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from blocks import run_blocks"
PRINT = "print(json.dumps([*run_blocks(Path(sys.argv[2]).read_text(), Path.cwd())]))"


def test_a_reader_who_copies_each_block_ends_with_a_prediction(fresh, tmp_path):
    """Of the start page and of the one on own images, one after the other in one empty folder."""
    scripts, folder = tmp_path / "scripts", tmp_path / "folder"
    scripts.mkdir()
    folder.mkdir()
    shutil.copy(ROOT / "scripts" / "documentation_blocks.py", scripts / "blocks.py")
    printed = []
    for page in ("start.md", "tutorials/own_images.md"):
        done = subprocess.run(
            [fresh, "-c", f"{RUN}\n{PRINT}", scripts, DOCS / page],
            cwd=folder,
            env=elsewhere(tmp_path),
            text=True,
            capture_output=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    (trained, _, losses, errors), (*_, last) = printed
    assert re.search(r"meta-test accuracy +\d", trained)
    losses = [float(line.split()[1]) for line in losses.splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    errors = [float(line.split()[1]) for line in errors.splitlines()]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.2)
    right = [int(percent) for percent in re.findall(r"(\d+)% of 12 right", last)]
    assert len(right) == 3
    assert sum(right) / 3 > 50  # guessing gets 33
    assert len([*folder.glob("*/checkpoint.pt")]) == 2
    _keys_are_listed(folder / "first")


def _keys_are_listed(folder: Path) -> None:
    """Every key of the run's files stands on the page that says what they are."""
    page = filled(DOCS / "files.md")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    written = {key for event in events for key in event} | json.loads((folder / "summary.json").read_text()).keys()
    assert not [key for key in written if f"| `{key}` |" not in page]
