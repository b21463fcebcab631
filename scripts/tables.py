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


TABLES = {"accuracy": accuracy}


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
