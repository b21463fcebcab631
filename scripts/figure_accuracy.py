"""Draws results/figures/accuracy.png and .pdf: validation accuracy by meta-step, test accuracy at the end."""

import sys
from pathlib import Path

from fobmaml.files import read_csv
from fobmaml.plotting import method, new_figure

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    tables = [RESULTS / "accuracy.csv", RESULTS / "accuracy_curves.csv"]
    for table in tables:
        if not table.exists():
            sys.exit(f"error: {table.relative_to(RESULTS.parent)} is missing: make reproduce ARGS=accuracy makes it")
    runs, curves = map(read_csv, tables)
    figure, (ax,) = new_figure(width_in=3.5, height_in=2.8)
    for run in runs:
        look = method(run["estimator"])
        points = [(int(row["step"]), 100 * float(row["val/accuracy"])) for row in curves if row["run"] == run["run"]]
        accuracy, half = 100 * float(run["test/accuracy"]), 100 * float(run["test/accuracy_ci95"])
        ax.plot(*zip(*points, strict=True), color=look.colour, marker=look.marker, markevery=4, markersize=3.5,
                linewidth=1.0, label=f"{look.label}\ntest {accuracy:.1f} ± {half:.1f} %")
    ax.set_xlabel("meta-step")
    ax.set_ylabel("validation accuracy (%)")
    ax.set_title("MNIST-1D, 5-way 5-shot", fontsize=8)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    (RESULTS / "figures").mkdir(exist_ok=True)
    for suffix in ("png", "pdf"):
        path = RESULTS / "figures" / f"accuracy.{suffix}"
        figure.savefig(path, metadata={"CreationDate": None} if suffix == "pdf" else {"Software": None})
        print(path.relative_to(RESULTS.parent))


if __name__ == "__main__":
    main()
