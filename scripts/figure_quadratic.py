"""Draws quadratic.png and .pdf: the gradient of f(x) = ½(x − ½)ᵀC(x − ½) + gᵀx and what is left of it at C = 0.

Nothing is measured: contours and arrows are the formula. The numbers beside them go to quadratic.csv.
"""

from pathlib import Path

import numpy as np
from drawing import LABEL_PT, draw_alone, save

from fobmaml.files import write_csv
from fobmaml.run.plotting import method, new_figure

CURVATURES = [(0.0, 0.0, 0.0), (0.1, 0.0, 0.1), (0.5, -0.1, 0.0), (0.5, 0.3, 0.5)]
ARROWS = (("maml", "∇f(x)", 0.018, 2.8), ("fomaml", "∇f with C = 0", 0.009, 4.5))
"""Method whose colour it has, label, width of the shaft as a part of the axes, and of the head as a multiple of it."""
G, X = np.array([0.1, -0.1]), np.array([0.3, 0.1])


def draw(folder: Path) -> None:
    figure, axes = new_figure(columns=4, width_in=7.0, height_in=2.5, sharey=True)
    grid = np.linspace(-0.7, 0.8, 81)
    points = np.stack(np.meshgrid(grid, grid), axis=-1) - 0.5
    table = []
    for ax, (a, b, c) in zip(axes, CURVATURES, strict=True):
        curvature = np.array([[a, b], [b, c]])
        values = 0.5 * np.einsum("xyi,ij,xyj->xy", points, curvature, points) + (points + 0.5) @ G
        gradient = curvature @ (X - 0.5) + G
        error = float(np.linalg.norm(gradient - G) / np.linalg.norm(gradient))
        across = gradient[0] * G[1] - gradient[1] * G[0]
        angle = float(np.degrees(np.arctan2(abs(across), gradient @ G)))
        table.append(
            {
                "a": a,
                "b": b,
                "c": c,
                "gradient_1": gradient[0],
                "gradient_2": gradient[1],
                "first_order_1": G[0],
                "first_order_2": G[1],
                "relative_error": error,
                "angle_degrees": angle,
            }
        )
        ax.contour(grid, grid, values, 12, colors="#999999", linewidths=0.6, linestyles="solid")
        for vector, (name, label, width, head) in zip((gradient, G), ARROWS, strict=True):
            ax.quiver(
                *X,
                *vector,
                angles="xy",
                scale_units="xy",
                scale=0.5,
                width=width,
                headwidth=head,
                headlength=head,
                headaxislength=head,
                color=method(name).colour,
                label=label,
                zorder=3,
            )
        ax.plot(*X, "o", color="#333333", markersize=2.5, zorder=4)
        ax.set_title(
            f"C = [[{a:g}, {b:g}], [{b:g}, {c:g}]]\nerror {100 * error:.0f} %, {angle:.0f}°", fontsize=LABEL_PT
        )
        ax.set_aspect("equal")
        ax.set_xlabel("$x_1$")
        ax.grid(visible=False)
        ax.set_xticks([-0.5, 0, 0.5])
        ax.set_yticks([-0.5, 0, 0.5])
    axes[0].set_ylabel("$x_2$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    write_csv(folder / "quadratic.csv", table)
    save(figure, folder, "quadratic")


if __name__ == "__main__":
    draw_alone(draw)
