"""Draws curvature.png and .pdf: the parts of the support loss's Hessian during meta-training, and FO-MAML's error."""

from pathlib import Path

from drawing import draw_alone, groups, legend_below, load, save

from fobmaml.run.plotting import method, new_figure

LOSSES = {"cross_entropy": "cross-entropy", "mse": "mean squared error"}
PARTS = {
    "hessian": ("Hessian", "#000000", "s", "-"),
    "gauss_newton": ("Gauss–Newton part", "#0072B2", "o", "-"),
    "network": ("network's own curvature", "#D55E00", "P", "--"),
}
ERRORS = {
    "fomaml_error": ("FO-MAML: without the Hessian", method("fomaml").colour, "^", "-"),
    "gauss_newton_error": ("without the network's own curvature", "#D55E00", "P", "--"),
}


def draw(folder: Path) -> None:
    rows = [
        row
        for row in load(folder, "curvature_curves", columns=("dataset.loss",))
        if row["curvature/hessian"] is not None
    ]
    figure, axes = new_figure(columns=4, width_in=7.0, height_in=2.9)
    for column, (loss, found) in enumerate(groups(rows, "dataset.loss").items()):
        for ax, parts in ((axes[column], PARTS), (axes[2 + column], ERRORS)):
            for key, (label, colour, marker, line) in parts.items():
                for index, run in enumerate(groups(found, "run").values()):
                    ax.plot(
                        [row["step"] for row in run],
                        [row[f"curvature/{key}"] for row in run],
                        color=colour,
                        marker=marker,
                        markersize=3.5,
                        linewidth=1.0,
                        linestyle=line,
                        label=None if index else label,
                    )
            ax.set_title(LOSSES[loss], fontsize=8)
            ax.set_xlabel("meta-step")
            ax.set_yscale("log")
    for pair, label in ((axes[:2], "spectral norm at θ"), (axes[2:], "relative error")):
        pair[0].set_ylabel(label)
        limits = [f(ax.get_ylim()[i] for ax in pair) for i, f in enumerate((min, max))]
        for ax in pair:
            ax.set_ylim(*limits)
    legend_below(figure, axes, 3)
    save(figure, folder, "curvature")


if __name__ == "__main__":
    draw_alone(draw)
