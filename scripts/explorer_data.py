"""What the interactive page shows: this project's estimators on two tasks with two parameters, and rows of results/.

What the page computes itself, by its own formulas, is checked against the estimators by the tests.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from drawing import groups, load
from explorer_sinusoid import packed
from figure_bias import best_nu, mean_error
from figure_race import middle
from statistics_of_runs import interval
from tables import work
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fobmaml import Learner, TaskBatch
from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Estimator, Exact, Forward, Reptile, Symmetric
from fobmaml.run.plotting import METHODS, OF_OTHERS
from fobmaml.solvers import GradientDescent, Inexact, InnerProblem, NewtonCG

LAMS = (0.25, 0.5, 1.0, 2.0)
STEPS = (1, 2, 5, 10, 50)
NUS = (0.01, 0.03, 0.1, 0.3, 0.6)
INNER_LR = 0.2
NODES, SPACING, FIRST = 41, 0.06, (0.2, -0.3)
"""Of the grid of θ: nodes a side, their distance, and the first of each coordinate."""

POINT, POINT_LAM = (1.125, 2.375), 0.5
"""Of the panel on ν and δ: θ and λ, with the first task."""
FINE_NUS = tuple(0.6 * 10 ** (0.12 * (i - 23)) for i in range(24))
DELTAS = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TOL = 1e-10


class OneUnit(nn.Module):
    """x ↦ w₂ tanh(w₁ x), at w = (1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w[1] * torch.tanh(self.w[0] * x)


def learner() -> Learner:
    return Learner(OneUnit(), mse_loss)


def tasks() -> TaskBatch:
    """A flat and a steep curve, 5 noisy support and 15 query examples each."""
    generator = torch.Generator().manual_seed(0)
    x = 4.0 * torch.rand(2, 20, 1, generator=generator, dtype=torch.float64) - 2.0
    height, steepness = torch.tensor([[2.0, 0.8], [0.5, 2.5]], dtype=torch.float64)
    y = height.view(2, 1, 1) * torch.tanh(steepness.view(2, 1, 1) * x)
    y += 0.2 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return TaskBatch(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])


def examples() -> list[dict[str, list[list[float]]]]:
    """The tasks as the page has them: support and query examples [x, y]."""
    return [
        {
            "support": torch.cat([task.support_x[0], task.support_y[0]], 1).tolist(),
            "query": torch.cat([task.query_x[0], task.query_y[0]], 1).tolist(),
        }
        for task in tasks().split(1)
    ]


def estimators(lam: float, steps: int, nu: float) -> dict[str, Estimator]:
    """Those of the page, all with the same inner problem; ``exact`` takes neither steps nor ν."""
    gd = GradientDescent(steps, INNER_LR)
    return {
        "maml": MAML(gd, lam),
        "fomaml": FOMAML(gd, lam),
        "reptile": Reptile(gd, lam, data="support"),
        "imaml": IMAML(gd, lam),
        "forward": Forward(gd, lam, nu),
        "symmetric": Symmetric(gd, lam, nu),
        "exact": Exact(NewtonCG(tol=TOL), lam, TOL),
    }


def axes(nodes: int = NODES, margin: int = 0) -> Tensor:
    """The grid's coordinates, [2, nodes], with ``margin`` more on either side. Fewer nodes stand further apart."""
    first = torch.tensor(FIRST, dtype=torch.float64).view(2, 1)
    return first + SPACING * (NODES - 1) / (nodes - 1) * torch.arange(-margin, nodes + margin)


def grid(nodes: int = NODES, margin: int = 0) -> Tensor:
    """Every θ of the grid, [nodes · nodes, 2]; the second coordinate changes slowly, from its top."""
    first, second = axes(nodes, margin)
    rows, columns = torch.meshgrid(second.flip(0), first, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], 1)


def mean_over_tasks(call: Callable[[Tensor, TaskBatch], Tensor], thetas: Tensor) -> Tensor:
    """The mean over the tasks of ``call(rows, tasks)``, for many θ [N, 2] at once: each θ with each task is a row.

    Estimators take one θ a row as well as one for all.
    """
    both = tasks()
    rows = thetas.repeat_interleave(len(both), 0)
    many = TaskBatch(
        *(
            part.repeat(len(thetas), *[1] * (part.dim() - 1))
            for part in (both.support_x, both.support_y, both.query_x, both.query_y)
        )
    )
    found = call(rows, many)
    return found.view(len(thetas), len(both), *found.shape[1:]).mean(1)


def meta_gradients(estimator: Estimator, thetas: Tensor) -> Tensor:
    """[N, 2] at [N, 2]."""
    return mean_over_tasks(lambda rows, many: estimator(learner(), rows, many).gradients, thetas)


def meta_loss(lam: float, thetas: Tensor) -> Tensor:
    """F(θ), the query loss at the solution of the inner problem, [N]."""

    def call(rows: Tensor, many: TaskBatch) -> Tensor:
        solution = NewtonCG(tol=TOL).solve(InnerProblem(learner(), rows, many, lam))
        return learner().query_loss(solution.phi, many)

    return mean_over_tasks(call, thetas)


def optimum(lam: float, start: Tensor) -> Tensor:
    """The minimiser of F near ``start`` [2]: Newton's method, the exact meta-gradient's derivative by differences."""
    exact, theta, apart = estimators(lam, 1, 1.0)["exact"], start, 1e-5
    for _ in range(50):
        here, *beside = meta_gradients(exact, torch.stack([theta, *(theta + apart * torch.eye(2))]))
        move = torch.linalg.solve((torch.stack(beside) - here) / apart, here)
        theta = theta - move
        if move.norm() < 1e-9:
            return theta
    raise RuntimeError(f"no minimum of the meta-loss was found near {start.tolist()}")


def compare(nodes: int) -> dict[str, Any]:
    """The tasks, and the meta-loss on the grid and one node more on every side: [λ, θ]."""
    wider = grid(nodes, margin=1)
    losses = [meta_loss(lam, wider) for lam in LAMS]
    return {
        "lams": LAMS,
        "steps": STEPS,
        "nus": NUS,
        "axes": axes(nodes).tolist(),
        "inner_lr": INNER_LR,
        "tasks": examples(),
        "loss": packed(torch.stack(losses)),
        "optima": [optimum(lam, wider[loss.argmin()]).tolist() for lam, loss in zip(LAMS, losses, strict=True)],
    }


def tradeoff(nus: Sequence[float]) -> dict[str, Any]:
    """Of one task: the solutions φ_−ν, φ_0, φ_ν and the bias of each stencil, by δ (of the solves) and ν."""
    first, theta, model = tasks()[:1], torch.tensor(POINT, dtype=torch.float64), learner()
    exact = Exact(NewtonCG(tol=TOL), POINT_LAM, TOL)(model, theta, first).gradients[0]
    every = torch.linspace(-nus[-1], nus[-1], 81, dtype=torch.float64)
    path = NewtonCG(tol=TOL).solve(InnerProblem(model, theta, first, POINT_LAM, every)).phi
    centre = NewtonCG(tol=TOL).solve(InnerProblem(model, theta, first, POINT_LAM)).phi[0]
    points, errors = [], []
    for delta in DELTAS:
        for nu in nus:
            offsets = torch.tensor([nu, -nu], dtype=torch.float64)
            pair = Inexact(delta).solve(InnerProblem(model, theta, first, POINT_LAM, offsets)).phi  # symmetric's own
            middle = Inexact(delta, seed=1).solve(InnerProblem(model, theta, first, POINT_LAM)).phi[0]
            points.append({"plus": pair[0].tolist(), "zero": middle.tolist(), "minus": pair[1].tolist()})
            stencils = {
                "forward": Forward(Inexact(delta), POINT_LAM, nu),
                "symmetric": Symmetric(Inexact(delta), POINT_LAM, nu),
                "central4": Central(Inexact(delta), POINT_LAM, nu, order=4),
            }
            errors.append(
                {
                    name: float((stencil(model, theta, first).gradients[0] - exact).norm() / exact.norm())
                    for name, stencil in stencils.items()
                }
            )
    return {
        "nus": nus,
        "deltas": DELTAS,
        "lam": POINT_LAM,
        "theta": POINT,
        "path": path.tolist(),
        "centre": centre.tolist(),
        "tangent": (-exact / POINT_LAM).tolist(),
        "points": points,
        "errors": errors,
    }


def curvature(folder: Path) -> list[dict[str, float]]:
    """Before and after meta-training with a cross-entropy: the norm of the support loss's Hessian at θ, and FO-MAML's
    relative error, means over runs."""
    rows = [
        row
        for row in load(folder, "curvature_curves")
        if row["dataset.loss"] == "cross_entropy" and row["curvature/hessian"] is not None
    ]
    steps = groups(rows, "step")
    keys = ("curvature/hessian", "curvature/fomaml_error")
    return [
        {"step": step} | {key: sum(row[key] for row in steps[step]) / len(steps[step]) for key in keys}
        for step in (min(steps), max(steps))
    ]


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows {method, x, y, ...} of each chart of measured results."""
    accuracy = []
    for (name, step), rows in groups(load(folder, "accuracy_curves"), "estimator", "step").items():
        values = [100 * row["val/accuracy"] for row in rows if row["val/accuracy"] is not None]
        if values:
            mean, half = interval(values)
            accuracy.append(
                {"method": name, "x": step, "y": mean, "low": mean - half, "high": mean + half, "seeds": len(values)}
                | {"work": statistics.median(work(row) / 1e6 for row in rows)}
            )
    by_work = [row | {"x": row["work"]} for row in accuracy if row["work"]]
    raced = [row for row in load(folder, "race_curves", "make race") if row["times"] == 1]
    narrowest = min(row["width"] for row in raced)
    race = [
        dict(zip(("x", "y"), middle(rows, "work"), strict=True)) | {"method": name, "seeds": len(rows)}
        for (name, _, width), rows in groups(raced, "estimator", "number", "width").items()
        if width == narrowest
    ]
    charts = {"accuracy": accuracy, "work": by_work, "race": race}
    for chart, table, x in (
        ("width", "memory", "width"),
        ("steps", "memory_steps", "solver.steps"),
        ("depth", "memory_depth", "depth"),
    ):
        rows = load(folder, table)
        longest = max((row["solver.steps"] for row in rows), default=None) if chart == "width" else None
        charts[chart] = sorted(
            (
                {"method": row["estimator"], "x": row[x], "y": row["memory/peak_bytes"] / 1e6}
                for row in rows
                if longest is None or row["solver.steps"] == longest
            ),
            key=lambda row: (row["method"], row["x"]),
        )
    best = {name: best_nu(rows) for name, rows in groups(load(folder, "bias_delta"), "estimator").items()}
    others = groups([row for name in ("bias_floor", "bias_imaml") for row in load(folder, name)], "estimator")
    charts["bias"] = [
        {"method": name, "x": delta, "y": mean_error(at), "nu": at[0].get("estimator.nu")}
        for name, rows in (best | others).items()
        for delta, at in sorted(groups(rows, "solver.delta").items())
    ]
    return charts


def methods() -> dict[str, dict[str, str]]:
    """As in every figure."""
    return {
        name: {"label": look.label, "colour": look.colour, "marker": look.marker, "line": look.linestyle}
        for name, look in METHODS.items()
        if name not in OF_OTHERS
    }
