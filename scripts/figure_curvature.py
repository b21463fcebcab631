"""Draws curvature.png and .pdf: the parts of the support loss's Hessian during meta-training, and FO-MAML's error."""

from pathlib import Path

from drawing import draw_alone, groups, label_ends, load, save

from fobmaml.run.plotting import method, new_figure

LOSSES = {"cross_entropy": "cross-entropy", "mse": "mean squared error"}
PARTS = {
    "hessian": ("Hessian", "#000000", "s"),
    "gauss_newton": ("Gauss–Newton part", "#332288", "p"),
    "network": ("network's own curvature", "#44AA99", "X"),
}
ERRORS = {
    "fomaml_error": ("FO-MAML:\nwithout the Hessian", method("fomaml").colour, "^"),
    "gauss_newton_error": ("with the Gauss–\nNewton part only", *PARTS["gauss_newton"][1:]),
}


def draw(folder: Path) -> None:
    rows = [
        row
        for row in load(folder, "curvature_curves", columns=("dataset.loss",))
        if row["curvature/hessian"] is not None
    ]
    by_loss = groups(rows, "dataset.loss")
    figure, axes = new_figure(len(by_loss), 7.0, 3.8, rows=2, sharex=True, sharey="row")
    for column, (loss, found) in enumerate(by_loss.items()):
        for ax, parts in zip(axes[column :: len(by_loss)], (PARTS, ERRORS), strict=True):
            for key, (label, colour, marker) in parts.items():
                for index, run in enumerate(groups(found, "run").values()):
                    ax.plot(
                        [row["step"] for row in run],
                        [row[f"curvature/{key}"] for row in run],
                        color=colour,
                        marker=marker,
                        markersize=3.5,
                        linewidth=1.0,
                        label=None if index else label,
                    )
            ax.set_yscale("log")
        axes[column].set_title(f"{LOSSES[loss]} (a line a run)", fontsize=8)
        axes[len(by_loss) + column].set_xlabel("meta-step of MAML's training")
    axes[0].set_ylabel("spectral norm at θ")
    axes[len(by_loss)].set_ylabel("error, ‖g − ∇F‖ / ‖∇F‖")
    label_ends(figure, axes[len(by_loss) - 1], axes[-1])
    save(figure, folder, "curvature")


if __name__ == "__main__":
    draw_alone(draw)
