"""The look of every figure: one name, colour and marker a method throughout, and the learning curve of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Method:
    """How a method is drawn. Colours: Okabe & Ito's set for colour-blind readers."""

    label: str
    colour: str
    marker: str
    linestyle: str = "-"


METHODS = {
    "maml": Method("MAML", "#000000", "s"),
    "maml_plus": Method("MAML, with remedies", "#000000", "s", "--"),
    "fomaml": Method("FO-MAML", "#E69F00", "^"),
    "reptile": Method("Reptile", "#CC79A7", "v"),
    "imaml": Method("iMAML", "#009E73", "D"),
    "imaml_damped": Method("iMAML, damped", "#009E73", "D", "--"),
    "forward": Method("FO-B-MAML, forward", "#56B4E9", "<"),
    "symmetric": Method("FO-B-MAML, symmetric", "#0072B2", "o"),
    "forward_envelope": Method("FO-B-MAML, with envelope", "#56B4E9", ">", "--"),
    "fobmaml": Method("FO-B-MAML", "#56B4E9", "<"),
    "symmetric_all": Method("symmetric, all examples a step", "#0072B2", "o", "--"),
    "symmetric_operators": Method("symmetric, torch's operators", "#0072B2", "o", ":"),
    "tangent": Method("FO-B-MAML, tangent", "#0072B2", "d", "--"),
    "exact": Method("exact meta-gradient", "#777777", "*"),
    "central4": Method("FO-B-MAML, central 4", "#D55E00", "P"),
    "maml_checkpoint": Method("MAML, checkpointed", "#000000", "s", ":"),
    "higher": Method("MAML by higher", "#555555", "x"),
    "torchopt": Method("MAML by TorchOpt", "#999999", "h", "--"),
    "loop_maml": Method("MAML, plain torch", "#8C6D31", "s", "--"),
    "loop_symmetric": Method("symmetric, plain torch", "#8C6D31", "o"),
    "jax_maml": Method("MAML by JAX", "#882255", "s", "--"),
    "jax_symmetric": Method("symmetric by JAX", "#882255", "o"),
}
OF_OTHERS = ("higher", "torchopt", "loop_maml", "loop_symmetric", "jax_maml", "jax_symmetric")
"""What the benchmark compares with: the same methods, not by this library."""


def method(name: str) -> Method:
    """A method of the user's own is drawn in grey under its own name."""
    return METHODS.get(name, Method(name, "#777777", "X"))


def new_figure(
    columns: int = 1, width_in: float = 3.5, height_in: float = 2.6, rows: int = 1, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure for a paper's column (3.5 in) or two (7 in), 8-point type, its axes line by line; needs no display.

    ``shared``: ``sharex`` and ``sharey`` of matplotlib's ``subplots``.
    """
    figure = Figure(figsize=(width_in, height_in), layout="constrained", dpi=200)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for ax in axes:
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(8)
        ax.yaxis.label.set_fontsize(8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.5)
    return figure, axes


def learning_curve(events: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """A run's picture: validation accuracy (or loss, where there is no accuracy) and training loss by meta-step."""
    look = method(summary["choices"]["estimator"])
    figure, (left, right) = new_figure(columns=2, width_in=7.0)
    accurate = any(e.get("val/accuracy") is not None for e in events)
    steps, values = series(events, "val/accuracy" if accurate else "val/loss")
    scale = 100.0 if accurate else 1.0
    left.plot(
        steps,
        [scale * v for v in values],
        color=look.colour,
        marker=look.marker,
        markersize=3,
        linewidth=1.2,
        label="validation tasks",
    )
    final = summary.get("test/accuracy" if accurate else "test/loss")
    if final is not None:
        half = summary.get("test/accuracy_ci95")
        text = (
            f"{final:.3f}"
            if not accurate
            else f"{scale * final:.1f} %"
            if half is None
            else (f"{scale * final:.1f} ± {scale * half:.1f} % (95 % interval)")
        )
        left.errorbar(
            [summary["step"]],
            [scale * final],
            yerr=None if half is None else [scale * half],
            color="#D55E00",
            marker="*",
            markersize=8,
            capsize=3,
            linestyle="none",
            label=f"test tasks: {text}",
            zorder=3,
        )
    left.set_xlabel("meta-step")
    loss = summary.get("loss/name") or "loss"
    left.set_ylabel("accuracy (%)" if accurate else loss)
    left.legend(fontsize=8, frameon=False, loc="lower right" if accurate else "upper right")
    left.set_title(look.label, fontsize=8)
    steps, values = series(events, "train/loss")
    right.plot(steps, values, color=look.colour, linewidth=0.8)
    right.set_xlabel("meta-step")
    right.set_ylabel(f"query loss, training tasks:\n{loss}")
    right.set_title(f"{summary.get('model/parameters', 0):,} parameters", fontsize=8)
    figure.savefig(path)


def series(events: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of the events that have ``key``."""
    found = [(e["step"], e[key]) for e in events if e.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
