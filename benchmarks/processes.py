"""Time of a meta-step by processes of one run (torchrun), a thread each, into results/bench_processes.csv."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import existing_folder
from tqdm import tqdm

from fobmaml.files import write_csv, write_json
from fobmaml.run.provenance import provenance

ROOT = Path(__file__).parents[1]
RUN = ("steps=40", "log_every=1000", "eval.tasks=0", "eval.validation_tasks=0", "bias.every=0", "wandb.mode=disabled")


def seconds(processes: int, width: int) -> float:
    """The median meta-step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
                str(ROOT / "train.py"),
                *RUN,
                f"width={width}",
                f"hydra.run.dir={folder}/run",
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return json.loads((Path(folder) / "run" / "summary.json").read_text())["time/meta_step_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    counts, rows = range(1, (os.cpu_count() or 1) + 1), []
    plan = [(width, repeat, count) for width in (32, 64) for repeat in range(arguments.repeats) for count in counts]
    found: dict[tuple[int, int], list[float]] = {}
    for width, _, count in tqdm(plan, unit="run", disable=None):
        found.setdefault((width, count), []).append(seconds(count, width))
    for (width, count), times in sorted(found.items()):
        median = statistics.median(times)
        rows.append(
            {
                "width": width,
                "processes": count,
                "seconds": median,
                "least": min(times),
                "most": max(times),
                "speedup": statistics.median(found[width, 1]) / median,
            }
        )
    write_csv(arguments.folder / "bench_processes.csv", rows)
    write_json(
        arguments.folder / "bench_processes.json",
        {
            "command": "make bench",
            "repeats": arguments.repeats,
            "run": " ".join(RUN),
            "what": "seconds of a meta-step of 16 tasks by processes of one thread each; speedup over one process",
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    main()
