"""Runs a little of each kind of experiment again and compares it with results/: python scripts/verify.py"""

import shutil
import sys

from drawing import RESULTS, load
from reproduce import ROOT, collect, faults, jobs_of, sweep

from fobmaml.files import read_csv

# Experiment: (the part of its jobs that is run, {column: (relative, absolute) tolerance}). Training in float32 takes
# other roundings on another processor, and forty steps magnify them; float64 measurements and memory do not.
CHECKS: dict[str, tuple[list[str], dict[str, tuple[float, float]]]] = {
    "verify": ([], {"test/accuracy": (0.0, 0.03), "val/loss": (0.0, 0.05)}),
    "memory": (["estimator=symmetric,maml", "width=25,100", "solver.steps=10,50"], {"memory/peak_bytes": (0.02, 0.0)}),
    "bias_delta": (
        ["seed=0", "solver.delta=1e-6,1e-3", "estimator.nu=1e-2,0.1"],
        {"bias/relative_error": (0.02, 1e-9)},
    ),
    "bias_floor": (["seed=0", "solver.delta=1e-6"], {"bias/relative_error": (0.02, 1e-9)}),
}
FOLDER = ROOT / "outputs" / "verify"


def main() -> None:
    committed = {name: {row["run"]: row for row in load(RESULTS, name)} for name in CHECKS}
    shutil.rmtree(FOLDER, ignore_errors=True)  # run again, not continued
    ended = sweep({name: overrides for name, (overrides, _) in CHECKS.items()}, FOLDER, at_once=2)
    differing = compared = 0
    wrong = []
    for name, (overrides, tolerances) in CHECKS.items():
        wrong += faults(name, jobs_of(name, overrides), FOLDER / name, ended[name])
        collect(name, FOLDER / name, FOLDER)
        for row in read_csv(FOLDER / f"{name}.csv") if (FOLDER / f"{name}.csv").exists() else []:
            for column, (relative, absolute) in tolerances.items():
                wanted, found = committed[name][row["run"]][column], float(row[column] or "nan")
                compared += 1
                if not abs(found - wanted) <= absolute + relative * abs(wanted):
                    differing += 1
                    print(f"{name} {row['run']}: {column} is {found:g}, and results/{name}.csv has {wanted:g}")
    print(f"{compared} numbers compared with results/, {differing} differ")
    if differing or wrong:
        sys.exit("\n".join(f"error: {fault}" for fault in wrong) or 1)


if __name__ == "__main__":
    main()
