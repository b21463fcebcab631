"""Runs the experiments behind results/ and collects them: python scripts/reproduce.py [experiment ...]

Each run has a folder below outputs/reproduce/. One that is complete is not run again, one that was stopped continues.
``--collect`` only collects what is there.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fobmaml.files import read_events, write_csv, write_json

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "outputs" / "reproduce"
RESULTS = ROOT / "results"

# Ten settings (optimizer, its learning rate, inner learning rate) for each method: a grid of eight, and two beyond the
# edge at which the method's best lay.
GRID = [(optimizer, lr, inner) for optimizer, rates in (("adam", (0.003, 0.01)), ("sngdm", (0.1, 0.3)))
        for lr in rates for inner in (0.1, 0.3)]
TUNING = {"symmetric": [*GRID, ("sngdm", 1.0, 0.1), ("sngdm", 1.0, 0.3)],
          "maml": [*GRID, ("sngdm", 0.03, 0.1), ("adam", 0.001, 0.1)]}

EXPERIMENTS: dict[str, dict[str, list[str]]] = {
    "tuning": {f"{e}-{o}-{lr}-{inner}": [f"estimator={e}", f"optimizer={o}", f"optimizer.lr={lr}", f"solver.lr={inner}"]
               for e, tried in TUNING.items() for o, lr, inner in tried},
    # The defaults of each method, which are what tuning chose.
    "accuracy": {"symmetric-s0": ["estimator=symmetric"], "maml-s0": ["estimator=maml"]},
}

INTERRUPTED = 130

SETTINGS = ("choices.estimator", "choices.optimizer", "config.optimizer.lr", "config.solver.lr", "config.solver.steps",
            "config.estimator.lam", "config.estimator.nu", "config.width", "config.seed", "config.steps",
            "provenance.threads")
MEASURED = ("val/accuracy", "val/loss", "test/accuracy", "test/accuracy_ci95", "test/loss", "memory/peak_bytes",
            "bias/relative_error", "bias/cosine", "bias/reference", "bias/reason", "inner/residual", "time/meta_step_s",
            "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--collect", action="store_true", help="run nothing, collect what is complete")
    arguments = parser.parse_args()
    unknown = set(arguments.experiments) - EXPERIMENTS.keys()
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))}: takes {', '.join(EXPERIMENTS)}")
    for name in arguments.experiments or EXPERIMENTS:
        if not arguments.collect:
            for run, overrides in tqdm(EXPERIMENTS[name].items(), desc=name, unit="run"):
                status = subprocess.run([sys.executable, str(ROOT / "train.py"), f"experiment={name}", *overrides,
                                         f"hydra.run.dir={RUNS / name / run}"], stdout=subprocess.DEVNULL).returncode
                if status == INTERRUPTED:
                    sys.exit(status)  # the same command continues
        collect(name)


def collect(name: str) -> None:
    """Writes results/NAME.csv (a row a run), NAME_curves.csv (validation by step) and NAME.json (provenance)."""
    runs = {run: json.loads(path.read_text()) for run in EXPERIMENTS[name]
            if (path := RUNS / name / run / "summary.json").exists()}
    runs = {run: summary for run, summary in runs.items() if summary["status"] != "interrupted"}
    if not runs:
        print(f"{name}: no run is complete")
        return
    # What an experiment leaves out is left out here: tuning never looks at the meta-test tasks or the bias.
    measured = [key for key in MEASURED if not (name == "tuning" and key.startswith(("test/", "bias/")))]
    rows = [{"run": run, "status": summary["status"], "step": summary["step"],
             **{key.split(".", 1)[1]: _at(summary, key) for key in SETTINGS},
             **{key: summary[key] if summary["status"] == "completed" else None for key in measured},
             "reason": (summary.get("reason") or "").split(":")[0]} for run, summary in runs.items()]
    write_csv(RESULTS / f"{name}.csv", rows)
    curves = [{"run": run, "estimator": runs[run]["choices"]["estimator"], "seed": runs[run]["config"]["seed"],
               "step": event["step"], "val/accuracy": event["val/accuracy"], "val/loss": event["val/loss"]}
              for run in runs for event in read_events(RUNS / name / run / "metrics.jsonl") if "val/loss" in event]
    write_csv(RESULTS / f"{name}_curves.csv", curves)
    write_json(RESULTS / f"{name}.json", {
        "command": f"make reproduce ARGS={name}",
        "seconds": round(sum(summary["seconds"] for summary in runs.values())),
        "runs": {run: {"overrides": [f"experiment={name}", *EXPERIMENTS[name][run]],
                       "provenance": summary["provenance"], "config": summary["config"]}
                 for run, summary in runs.items()}})
    print(f"{name}: {len(runs)} of {len(EXPERIMENTS[name])} runs in results/{name}.csv")


def _at(summary: Mapping[str, Any], path: str) -> Any:
    value: Any = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the run under way has written its checkpoint
        sys.exit("stopped; the same command continues")
