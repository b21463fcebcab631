"""The interactive page in a real browser: every control changes what it should, to what the estimators return."""

import fcntl
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import explorer_data as built
import explorer_sinusoid as trained
import pytest
import torch
from conftest import ROOT
from torch.nn.functional import mse_loss

import fobmaml
from fobmaml import TaskBatch
from fobmaml.estimators import Central, Exact, Forward, Symmetric
from fobmaml.files import read_csv
from fobmaml.run.plotting import METHODS
from fobmaml.solvers import GradientDescent, Inexact, InnerProblem, NewtonCG

FULL = (built.NODES, built.FINE_NUS)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((11, built.FINE_NUS[3::4]), id="small"),
        pytest.param(FULL, id="full", marks=pytest.mark.nightly),
    ],
)
def size(request) -> tuple[int, tuple[float, ...]]:
    """Nodes of the grid of θ, a side, and the ν of the panel on ν and δ."""
    return request.param


@pytest.fixture(scope="module")
def explorer() -> ModuleType:
    found = pytest.importorskip("explorer", reason="the packages of `make explorer` are not installed")
    if found.chromium() is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory, explorer, size) -> Path:
    """Built once for all processes of the test run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", tmp_path_factory.getbasetemp().name)
    path = tmp_path_factory.getbasetemp().parent / f"explorer-{run}-{size[0]}.html"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            if size == FULL:
                subprocess.run(
                    [sys.executable, str(ROOT / "scripts" / "explorer.py"), f"--page={path}", "--no-pictures"],
                    check=True,
                    capture_output=True,
                )
            else:
                explorer.build(path, ROOT / "results", *size)
    return path


class Tab:
    """The page in Chromium, with all that it said and asked for."""

    def __init__(self, page: Path, started, **options):
        self.said, self.asked = [], []
        self.tab = started.new_page(**options)
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(page.as_uri())
        self.tab.wait_for_selector("html[data-ready]")

    def drawn(self, panel: str) -> None:
        self.tab.wait_for_selector(f"#{panel}[data-state=drawn]")

    def numbers(self, panel: str, row: str) -> list[list[float]]:
        """The cells of a row, each with its numbers in full."""
        cells = self.tab.locator(f"#{panel}-{row} td").all()
        return [[float(text) for text in cell.get_attribute("data-value").split()] for cell in cells]

    def slide(self, panel: str, name: str, wanted: int) -> float:
        """To the slider's place ``wanted``, by keys; the number that it then shows."""
        slider = self.tab.locator(f"#{panel}-{name}")
        steps = wanted - int(slider.input_value())
        for _ in range(abs(steps)):
            slider.press("ArrowRight" if steps > 0 else "ArrowLeft")
        self.drawn(panel)
        return self.shown(panel, name)

    def shown(self, panel: str, name: str) -> float:
        said = self.tab.locator(f"output[for={panel}-{name}]").inner_text()
        return float(said.split()[0].replace("−", "-"))

    def drag(self, panel: str, x: float, y: float) -> None:
        """From the middle to a place in the plot, as fractions of its width and height from the lower left."""
        self.tab.locator(f"#{panel} .plot").first.scroll_into_view_if_needed()
        box = self.tab.locator(f"#{panel} .plot g.surface path.background").first.bounding_box()
        self.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.tab.mouse.down()
        self.tab.mouse.move(box["x"] + x * box["width"], box["y"] + (1 - y) * box["height"], steps=3)
        self.tab.mouse.up()
        self.tab.wait_for_timeout(50)
        self.drawn(panel)

    def arrows(self, panel: str) -> list[tuple[float, float]]:
        """Where each arrow goes, in pixels from the point."""
        lines = self.tab.locator(f"#{panel} .plot g.mark-rule.role-mark line").all()
        return [(float(line.get_attribute("x2") or 0), float(line.get_attribute("y2") or 0)) for line in lines]

    def contours(self, panel: str) -> str:
        return self.tab.locator(f"#{panel} .plot").evaluate(
            "plot => [...plot.querySelectorAll('g.mark-path path')].map(path => path.getAttribute('d')).join()"
        )


@pytest.fixture(scope="module")
def started(page, explorer) -> Iterator:
    with explorer.browser() as browser:
        yield browser


@pytest.fixture
def tab(page, started) -> Iterator[Tab]:
    found = Tab(page, started, viewport={"width": 1280, "height": 900})
    yield found
    assert found.said == []
    assert [url for url in found.asked if not url.startswith(("data:", page.as_uri()))] == []
    found.tab.close()


def _estimates(theta: tuple[float, float], lam: float, steps: int, nu: float) -> dict[str, torch.Tensor]:
    """By the library's own call, one θ at a time."""
    model = built.OneUnit()
    with torch.no_grad():
        model.w.copy_(torch.tensor(theta, dtype=torch.float64))
    return {
        name: fobmaml.meta_gradient(estimator, model, mse_loss, built.tasks()).gradient["w"]
        for name, estimator in built.estimators(lam, steps, nu).items()
    }


def test_the_grid_is_what_single_estimates_are():
    thetas = built.grid()[[0, 40, 700, 1680]]
    estimators = built.estimators(0.5, 5, 0.1)
    many = {name: built.meta_gradients(estimator, thetas) for name, estimator in estimators.items()}
    for i, theta in enumerate(thetas.tolist()):
        for name, gradient in _estimates(theta, 0.5, 5, 0.1).items():
            torch.testing.assert_close(many[name][i], gradient, rtol=0, atol=1e-8)  # iterative solves


def test_the_meta_loss_has_the_exact_gradient():
    theta = torch.tensor([[1.1, 0.7]], dtype=torch.float64)
    step = 1e-4 * torch.eye(2, dtype=torch.float64)
    slopes = [(built.meta_loss(1.0, theta + e) - built.meta_loss(1.0, theta - e)) / 2e-4 for e in step]
    exact = built.meta_gradients(built.estimators(1.0, 1, 1.0)["exact"], theta)
    torch.testing.assert_close(torch.stack(slopes, 1), exact, rtol=1e-6, atol=1e-8)


def test_the_optimum_is_the_lowest_place_of_the_meta_loss():
    optimum = built.optimum(1.0, torch.tensor([1.5, 0.6], dtype=torch.float64))
    around = optimum + 0.01 * torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1]])
    assert int(built.meta_loss(1.0, around).argmin()) == 0
    assert built.meta_loss(1.0, optimum[None]) < built.meta_loss(1.0, built.grid(11)).min()


def test_methods_look_as_in_the_figures():
    assert built.methods()["symmetric"] == {
        "label": METHODS["symmetric"].label,
        "marker": METHODS["symmetric"].marker,
        "colour": METHODS["symmetric"].colour,
        "line": "-",
    }


def test_networks_for_the_sinusoid_are_meta_trained():
    saved = trained.networks(ROOT / "results")
    losses = {name: trained.query_loss(trained.unpacked(text), 5) for name, text in saved["parameters"].items()}
    for name, loss in losses.items():
        assert loss == pytest.approx(saved["test_loss"][name]["5"], rel=1e-3)
        assert (loss < 0.1 * losses[trained.UNTRAINED]) == (name != trained.UNTRAINED)
    assert losses.keys() == {trained.UNTRAINED, *trained.estimators()}
    for estimator in trained.estimators().values():
        assert trained.query_loss(trained.train(estimator, 60), 5, 50) < trained.query_loss(
            trained.learner().theta(), 5, 50
        )


def test_the_work_of_every_method_is_in_the_measured_curves():
    rows = read_csv(ROOT / "results" / "accuracy_curves.csv")
    found = built.measured(ROOT / "results")["work"]
    assert {row["method"] for row in found} == {row["estimator"] for row in rows}
    last = max(float(row["step"]) for row in rows)
    for name in ("maml", "reptile"):
        spent = [
            float(row["work/example_gradients"]) + 8 / 3 * float(row["work/hessian_products"])
            for row in rows
            if row["estimator"] == name and float(row["step"]) == last
        ]
        assert max(row["x"] for row in found if row["method"] == name) == pytest.approx(statistics.median(spent) / 1e6)


@pytest.mark.site
class TestPage:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [390, 1280])
    def test_opens_from_disk(self, page, started, scheme, width):
        assert page.stat().st_size < 10e6
        found = Tab(page, started, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert found.said == []
        assert found.asked == [page.as_uri()] + [url for url in found.asked if url.startswith("data:")]
        assert found.tab.evaluate("document.documentElement.scrollWidth") <= width
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe().run(found.tab)
        assert axe.violations_count == 0, axe.generate_report()  # names, contrast, order of headings, ...
        found.tab.close()

    def test_curvature(self, tab):
        def agrees(a: float, b: float, c: float, x1: float, x2: float) -> None:
            gradient = (a * (x1 - 0.5) + b * (x2 - 0.5) + 0.1, b * (x1 - 0.5) + c * (x2 - 0.5) - 0.1)
            assert tab.numbers("curvature", "gradient")[0] == pytest.approx(gradient, abs=1e-6)
            assert tab.numbers("curvature", "first-order")[0] == pytest.approx((0.1, -0.1), abs=1e-6)
            apart = math.degrees(math.atan2(gradient[1], gradient[0]) - math.atan2(-0.1, 0.1))
            assert tab.numbers("curvature", "angle")[0] == [pytest.approx(abs((apart + 180) % 360 - 180), abs=1e-6)]
            error = math.dist(gradient, (0.1, -0.1)) / math.hypot(*gradient)
            assert tab.numbers("curvature", "error")[0] == [pytest.approx(error, abs=1e-6)]

        said = tab.tab.locator("#curvature-measured").inner_text()
        rows = [row for row in read_csv(ROOT / "results" / "curvature_curves.csv") if row["dataset.loss"][0] == "c"]
        for key, pair in zip(
            ("hessian", "fomaml_error"), re.findall(r"from ([\d.]*\d) to ([\d.]*\d)", said), strict=True
        ):
            for step, shown in zip(("0", "400"), pair, strict=True):
                values = [float(row[f"curvature/{key}"]) for row in rows if row["step"] == step]
                assert float(shown) == pytest.approx(sum(values) / len(values), rel=0.02)
        setting = {"a": 0.5, "b": -0.1, "c": 0.0, "x1": 0.3, "x2": 0.1}
        agrees(**setting)
        assert tab.numbers("curvature", "gradient")[0] == pytest.approx((0.04, -0.08), abs=1e-12)
        for name in setting:
            before, arrows = tab.contours("curvature"), tab.arrows("curvature")
            place = int(tab.tab.locator(f"#curvature-{name}").input_value())
            setting[name] = tab.slide("curvature", name, place + 7)
            agrees(**setting)
            assert (tab.contours("curvature") != before) == (name in ("a", "b", "c"))
            assert tab.arrows("curvature") != arrows
        tab.tab.locator("#curvature-flat").click()
        tab.drawn("curvature")
        agrees(0.0, 0.0, 0.0, setting["x1"], setting["x2"])
        first, second = tab.arrows("curvature")
        assert first == second
        tab.drag("curvature", 0.25, 0.8)
        assert tab.shown("curvature", "x1") == pytest.approx(-0.4 + 0.25 * 1.4, abs=0.011)
        assert tab.shown("curvature", "x2") == pytest.approx(-0.4 + 0.8 * 1.4, abs=0.011)

    @pytest.mark.parametrize(("lam", "steps", "nu"), [(0.25, 1, 0.6), (0.25, 10, 0.1), (0.5, 50, 0.01), (2.0, 5, 0.3)])
    def test_formulas(self, started, lam, steps, nu):
        """All over the plane, those of the page are the library's, the exact one from the same minimum."""
        tab, thetas = started.new_page(), built.grid(9)
        tab.add_script_tag(content=(ROOT / "scripts" / "explorer_page" / "formulas.js").read_text(encoding="utf-8"))
        at = {"lam": lam, "steps": steps, "nu": nu, "lr": built.INNER_LR}
        for name, estimator in built.estimators(lam, steps, nu).items():
            found = tab.evaluate(
                "([name, tasks, thetas, at]) => thetas.map(theta => meta_gradient(name, tasks, theta, at))",
                [name, built.examples(), thetas.tolist(), at],
            )
            wanted = built.meta_gradients(estimator, thetas)
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-6, atol=1e-6)
        tab.close()

    def test_compare(self, tab, size):
        nodes, _ = size

        def agrees() -> None:
            place = {name: int(tab.tab.locator(f"#compare-{name}").input_value()) for name in ("lam", "steps", "nu")}
            theta = (tab.shown("compare", "theta1"), tab.shown("compare", "theta2"))
            wanted = _estimates(theta, built.LAMS[place["lam"]], built.STEPS[place["steps"]], built.NUS[place["nu"]])
            exact = wanted["exact"]
            for name, gradient in wanted.items():
                angle, error, vector, _ = tab.numbers("compare", name)
                assert vector == pytest.approx(gradient.tolist(), abs=1e-6)
                assert error == [pytest.approx(float((gradient - exact).norm() / exact.norm()), rel=1e-6, abs=1e-6)]
                cross = abs(float(gradient[0] * exact[1] - gradient[1] * exact[0]))
                assert math.radians(angle[0]) == pytest.approx(math.atan2(cross, float(gradient @ exact)), abs=1e-6)

        agrees()
        for name, place in (
            ("lam", 2),
            ("steps", 4),
            ("nu", 0),
            ("theta1", 163),
            ("theta2", 190),
            ("lam", 3),
            ("nu", 4),
        ):
            before, contours = tab.arrows("compare"), tab.contours("compare")
            tab.slide("compare", name, place)
            agrees()
            assert tab.arrows("compare") != before
            assert (tab.contours("compare") != contours) == (name == "lam")
        tab.drag("compare", 0.7, 0.3)
        (low1, *_, high1), (low2, *_, high2) = built.axes(nodes).tolist()
        assert tab.shown("compare", "theta1") == pytest.approx(low1 + 0.7 * (high1 - low1), abs=0.012)
        assert tab.shown("compare", "theta2") == pytest.approx(low2 + 0.3 * (high2 - low2), abs=0.012)
        agrees()
        before = tab.arrows("compare")
        tab.tab.locator("#compare-lengths").check()
        tab.drawn("compare")
        assert tab.arrows("compare") != before
        for left, name in zip(range(6, -1, -1), built.estimators(1.0, 1, 1.0), strict=True):
            tab.tab.locator(f"#compare-show-{name}").uncheck()
            tab.drawn("compare")
            assert len(tab.arrows("compare")) == left
            assert tab.tab.locator(f"#compare-{name}").get_attribute("class") == "off"

    def test_map_of_the_bias(self, tab, size):
        theta = tuple(tab.shown("compare", name) for name in ("theta1", "theta2"))
        for name, nu in (("symmetric", 2), ("fomaml", 2), ("forward", 0)):
            tab.slide("compare", "nu", nu)
            tab.tab.locator("#compare-of").select_option(name)
            tab.drawn("compare")
            cells = tab.tab.locator("#compare-map td").all()
            assert [cell.get_attribute("class") for cell in cells].index("now") == built.STEPS.index(10)
            shown = [float(cell.get_attribute("data-value")) for cell in cells]
            for cell, (lam, steps) in zip(shown, itertools.product(built.LAMS, built.STEPS), strict=True):
                found = _estimates(theta, lam, steps, built.NUS[nu])
                wanted = float((found[name] - found["exact"]).norm() / found["exact"].norm())
                assert cell == pytest.approx(wanted, rel=1e-5, abs=1e-6)

    def test_paths_end_where_their_method_does(self, tab, size):
        """At a zero of its own field, and the exact one's at the optimum that Newton's method found."""
        nodes, _ = size
        cell = built.SPACING * (built.NODES - 1) / (nodes - 1)

        def lines() -> int:
            return tab.tab.locator("#compare .plot g.mark-line path").count()

        found = []
        for lam, steps, nu in ((0, 3, 2), (2, 4, 0)):
            for name, place in (("lam", lam), ("steps", steps), ("nu", nu)):
                tab.slide("compare", name, place)
            theta = [tab.shown("compare", name) for name in ("theta1", "theta2")]
            fields = built.estimators(built.LAMS[lam], built.STEPS[steps], built.NUS[nu])
            ends = {name: tab.numbers("compare", name)[3] for name in fields}
            for name, field in fields.items():
                start, end = built.meta_gradients(field, torch.tensor([theta, ends[name]], dtype=torch.float64))
                assert end.norm() < 0.1 * cell * start.norm(), name
            optimum = built.optimum(built.LAMS[lam], torch.tensor(ends["exact"], dtype=torch.float64)).tolist()
            assert ends["exact"] == pytest.approx(optimum, abs=0.2 * cell)
            found.append({name: math.dist(end, optimum) for name, end in ends.items()})
        few, many = found
        assert min(few["fomaml"], few["reptile"], few["symmetric"], many["reptile"]) > 0.2
        assert max(many["symmetric"], many["maml"], many["imaml"]) < 0.02
        assert lines() == len(fields)
        tab.tab.locator("#compare-paths").uncheck()
        tab.drawn("compare")
        assert lines() == 0

    def test_tradeoff(self, tab, size):
        _, nus = size
        model, first = built.learner(), built.tasks()[:1]
        theta, lam = torch.tensor(built.POINT, dtype=torch.float64), built.POINT_LAM
        exact = Exact(NewtonCG(tol=built.TOL), lam, built.TOL)(model, theta, first).gradients[0]

        def agrees(nu: float, delta: float) -> None:
            stencils = {
                "forward": Forward(Inexact(delta), lam, nu),
                "symmetric": Symmetric(Inexact(delta), lam, nu),
                "central4": Central(Inexact(delta), lam, nu, order=4),
            }
            found = {name: stencil(model, theta, first).gradients[0] for name, stencil in stencils.items()}
            for name, gradient in found.items():
                bias = float((gradient - exact).norm() / exact.norm())
                assert tab.numbers("tradeoff", name) == [[pytest.approx(bias, rel=1e-6, abs=1e-9)]]
            plus, minus = (
                torch.tensor(tab.numbers("tradeoff", name)[0], dtype=torch.float64) for name in ("plus", "minus")
            )
            secant = -lam * (plus - minus) / (2 * nu)
            torch.testing.assert_close(secant, found["symmetric"], rtol=0, atol=1e-6)
            for point, sign in ((plus, 1), (minus, -1)):
                offset = torch.tensor([sign * nu], dtype=torch.float64)
                solved = NewtonCG(tol=built.TOL).solve(InnerProblem(model, theta, first, lam, offset)).phi[0]
                assert float((point - solved).norm()) == pytest.approx(delta, abs=1e-6)

        def drawing() -> str:
            return "".join(plot.inner_html() for plot in tab.tab.locator("#tradeoff .plot").all())

        last = len(nus) - 1
        for nu, delta in ((last, 0), (last, 3), ((last + 1) // 2, 3), (last // 4, 5), (3 * (last + 1) // 4, 1)):
            before = drawing()
            tab.slide("tradeoff", "nu", nu)
            tab.slide("tradeoff", "delta", delta)
            agrees(nus[nu], built.DELTAS[delta])
            assert drawing() != before

    def test_sinusoid(self, tab):
        found = trained.networks(ROOT / "results")
        model, x = trained.learner().in_double(), torch.linspace(-5, 5, 101, dtype=torch.float64).view(1, -1, 1)

        def points() -> list[list[float]]:
            return json.loads(tab.tab.locator("#sinusoid").get_attribute("data-points"))

        def agrees() -> None:
            steps, lr, height, phase = (tab.shown("sinusoid", of) for of in ("steps", "lr", "amplitude", "phase"))
            given = torch.tensor([points()], dtype=torch.float64)
            task = TaskBatch(given[..., :1], given[..., 1:], x, height * torch.sin(x - phase))
            for name, text in found["parameters"].items():
                problem = InnerProblem(model, trained.unpacked(text).double(), task, 0.0)
                phi = GradientDescent(int(steps), lr).solve(problem).phi if steps else problem.theta
                wanted = [float(problem.objective(phi)), float(model.query_loss(phi, task))]
                shown = [number for (number,) in tab.numbers("sinusoid", name)]
                assert shown == pytest.approx(wanted, rel=1e-6, abs=1e-6)

        def curves() -> list[str]:
            lines = tab.tab.locator("#sinusoid .plot").first.locator("g.mark-line path").all()
            return [line.get_attribute("d") for line in lines]

        agrees()
        before = curves()
        assert len(before) == 1 + len(found["parameters"])
        for name, place in (("steps", 17), ("lr", 1), ("amplitude", 34), ("phase", 26), ("count", 6), ("steps", 0)):
            tab.slide("sinusoid", name, place)
            agrees()
            assert curves() != before
            before = curves()
        assert len(points()) == 7
        on_the_curve = points()
        tab.drag("sinusoid", 0.8, 0.9)
        assert sum(old != new for old, new in zip(on_the_curve, points(), strict=True)) == 1
        assert min(math.dist((3.0, 4.8), point) for point in points()) < 0.05
        dragged = points()
        assert (tab.slide("sinusoid", "which", 4), tab.slide("sinusoid", "y", 90)) == (5.0, 3.0)
        assert [point for point, old in zip(points(), dragged, strict=True) if point != old] == [[dragged[4][0], 3.0]]
        tab.slide("sinusoid", "x", 20)
        assert points()[4] == [-3.0, 3.0]
        tab.slide("sinusoid", "steps", 12)
        agrees()
        tab.tab.locator("#sinusoid-again").click()
        tab.drawn("sinusoid")
        assert points() == on_the_curve
        tab.tab.locator("#sinusoid-show-maml").uncheck()
        tab.drawn("sinusoid")
        assert len(curves()) == len(before) - 1

    def test_measured(self, tab):
        measured = built.measured(ROOT / "results")

        def lines(plot: int) -> int:
            return tab.tab.locator("#measured .plot").nth(plot).locator("g.mark-line path").count()

        def hover(plot: int, mark: str) -> dict[str, str]:
            place = tab.tab.locator("#measured .plot").nth(plot)
            place.scroll_into_view_if_needed()
            place.locator(f"g.mark-symbol path{mark}").hover(force=True)
            tab.tab.wait_for_selector("#vg-tooltip-element.visible")
            cells = [row.inner_text().split("\t") for row in tab.tab.locator("#vg-tooltip-element tr").all()]
            return {key.strip(" :"): value.strip() for key, value in cells}

        counts = [len({row["method"] for row in measured[chart]}) for chart in ("work", "race", "steps", "bias")]
        assert [lines(plot) for plot in range(4)] == counts
        row = next(
            row
            for row in read_csv(ROOT / "results" / "memory_steps.csv")
            if row["estimator"] == "maml" and float(row["solver.steps"]) == 200
        )
        said = hover(2, "[aria-label^='inner steps K: 200;'][aria-label$='method: MAML']")
        assert float(said["memory, one task (MB)"]) == pytest.approx(float(row["memory/peak_bytes"]) / 1e6, rel=1e-3)
        assert said["method"] == METHODS["maml"].label
        first = min((row for row in measured["work"] if row["method"] == "maml_plus"), key=lambda row: row["x"])
        said = hover(0, f"[aria-label$='method: {METHODS['maml_plus'].label}'] >> nth=0")
        assert float(said["million example-gradients"]) == pytest.approx(first["x"], rel=1e-3)
        assert float(said["validation accuracy (%)"]) == pytest.approx(first["y"], rel=1e-3)
        labels = tab.tab.locator("#measured .plot").nth(0).locator("[aria-label*='validation accuracy (%)']")
        assert f"validation accuracy (%): {first['y']:.1f};" in " ".join(
            mark.get_attribute("aria-label") for mark in labels.all()
        )
        tab.tab.locator("#measured-show-maml").uncheck()
        tab.drawn("measured")
        assert [lines(plot) for plot in range(4)] == [counts[0] - 1, counts[1] - 1, counts[2] - 1, counts[3]]
        for choice, title in (("accuracy", "meta-step"), ("work", "million example-gradients")):
            tab.tab.locator("#measured-accuracy").select_option(choice)
            tab.drawn("measured")
            assert tab.tab.locator("#measured .plot").nth(0).get_by_text(title, exact=True).count() == 1
            assert lines(0) == counts[0] - 1
        for choice, title in (("width", "channels"), ("depth", "convolutions"), ("steps", "inner steps K")):
            tab.tab.locator("#measured-memory").select_option(choice)
            tab.drawn("measured")
            assert tab.tab.locator("#measured .plot").nth(2).get_by_text(title, exact=True).count() == 1
            assert lines(2) == len({row["method"] for row in measured[choice]} - {"maml"})

    def test_every_control_is_reached_by_keyboard(self, tab):
        reached = set()
        for _ in range(80):
            tab.tab.keyboard.press("Tab")
            reached.add(tab.tab.evaluate("document.activeElement.id"))
        controls = tab.tab.locator("input, select, button").evaluate_all("all => all.map(control => control.id)")
        assert len(controls) == len(set(controls)) > 20
        assert set(controls) <= reached
        assert all(
            re.search(r"\w", label)
            for label in tab.tab.locator("input[type=range]").evaluate_all(
                "all => all.map(control => control.getAttribute('aria-valuetext'))"
            )
        )

    def test_pictures_and_times_are_taken(self, page, explorer, size, tmp_path):
        (tmp_path / "figures").mkdir()
        call = (
            f"import pathlib, explorer; explorer.MOVES = {explorer.MOVES if size == FULL else 2}; "
            f"explorer.look(pathlib.Path({str(page)!r}), pathlib.Path({str(tmp_path)!r}))"
        )
        subprocess.run([sys.executable, "-c", call], cwd=ROOT / "scripts", check=True, capture_output=True)
        assert {path.name for path in (tmp_path / "figures").iterdir()} == {
            f"explorer_{name}.png" for name in explorer.PANELS
        }
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())
        rows = read_csv(tmp_path / "explorer.csv")
        assert {row["panel"] for row in rows} == {"curvature", "compare", "tradeoff", "sinusoid"}
        assert len({row["slider"] for row in rows}) == len(rows)
        assert all(0 < float(row["milliseconds"]) <= float(row["most"]) < 60_000 for row in rows)
