"""Draws convergence.png and .pdf: the norm of the exact meta-gradient along training by each method."""

from pathlib import Path

from drawing import draw_alone, groups, label_ends, load, save, style

from fobmaml.run.plotting import new_figure


def draw(folder: Path) -> None:
    rows = [row for row in load(folder, "convergence_curves") if row["bias/exact_norm"] is not None]
    figure, (ax,) = new_figure(width_in=4.5, height_in=2.8)
    for name, found in groups(rows, "estimator").items():
        ax.plot([row["step"] for row in found], [row["bias/exact_norm"] for row in found], **style(name, markevery=5))
    ax.set_yscale("log")
    ax.set_xlabel("meta-step t")
    ax.set_ylabel("‖∇F(θₜ)‖")
    ax.set_title("logistic tasks, gradient descent on fixed tasks", fontsize=8)
    label_ends(figure, ax)
    save(figure, folder, "convergence")


if __name__ == "__main__":
    draw_alone(draw)
