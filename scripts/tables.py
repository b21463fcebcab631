"""Writes the README's tables from results/: python scripts/tables.py (--check: only says whether they are)."""

import sys
from pathlib import Path

from fobmaml.files import read_csv, write_atomically
from fobmaml.plotting import method

ROOT = Path(__file__).parents[1]


def accuracy() -> str:
    runs = read_csv(ROOT / "results" / "accuracy.csv")
    lines = [f"MNIST-1D, 5-way 5-shot 15-query, CNN of width {runs[0]['width']}, {runs[0]['steps']} meta-steps of 16 "
             f"tasks, {runs[0]['solver.steps']} inner steps, 600 meta-test tasks; settings chosen by the same number "
             "of trials for each method on validation tasks ([results/tuning.csv](results/tuning.csv)).", "",
             "| method | seed | meta-test accuracy | memory of a meta-gradient | a meta-step, on "
             f"{runs[0]['threads']} thread{'s' * (runs[0]['threads'] != '1')} | outer steps |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {method(run['estimator']).label} | {run['seed']} | {100 * float(run['test/accuracy']):.1f} ± "
              f"{100 * float(run['test/accuracy_ci95']):.1f} % | {float(run['memory/peak_bytes']) / 1e6:.0f} MB | "
              f"{1e3 * float(run['time/meta_step_s']):.0f} ms | {run['optimizer']}, lr {run['optimizer.lr']}; "
              f"inner lr {run['solver.lr']} |" for run in runs]
    return "\n".join(lines)


def speed() -> str:
    rows = read_csv(ROOT / "results" / "bench.csv")
    widths, steps = ([*dict.fromkeys(int(row[key]) for row in rows)] for key in ("width", "inner_steps"))
    cells = {(row["estimator"], int(row["width"]), int(row["inner_steps"])): row for row in rows}

    def seconds(name: str, width: int) -> str:
        row = cells[name, width, steps[0]]
        return f"{1e3 * float(row['seconds_16_tasks']):.0f} ms, {100 * float(row['fraction_of_limit']):.0f} %"

    def megabytes(name: str, count: int) -> str:
        row = cells[name, widths[-1], count]
        return f"{float(row['peak_bytes']) / float(row['tasks_at_once']) / 1e6:.0f}"

    header = [f"one meta-gradient of 16 tasks, {steps[0]} inner steps", *(f"{width} channels" for width in widths),
              f"MB a task alive, {widths[-1]} channels, {' / '.join(map(str, steps))} inner steps"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        lines.append(" | ".join([f"| {method(name).label}", *(seconds(name, width) for width in widths),
                                 " / ".join(megabytes(name, count) for count in steps) + " |"]))
    return "\n".join(lines)


TABLES = {"accuracy": accuracy, "speed": speed}


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- table:{name} -->\n", "<!-- end -->"
        before, rest = text.split(begin)
        text = before + begin + table() + "\n" + end + rest.split(end, 1)[1]
    if "--check" in sys.argv:
        if text != path.read_text():
            sys.exit("error: README.md differs from results/: python scripts/tables.py")
    else:
        write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
