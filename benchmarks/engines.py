"""A gradient of modules that no engine by hand takes, by ``autograd`` and ``loop``, and which of them ``auto`` measures
to be the faster: bench_engines.csv."""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rate import seconds
from timing import Row, existing_folder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fobmaml.engine import Learner
from fobmaml.engine.trial import LOOP_FROM
from fobmaml.files import write_csv, write_json
from fobmaml.run.provenance import provenance

ROOT = Path(__file__).parents[1]
CLASSES = 5


class Attention(nn.Module):
    """A pre-norm encoder layer on sequences of numbers, [N, length] -> [N, classes]."""

    def __init__(self, width: int):
        super().__init__()
        self.into, self.head = nn.Linear(1, width), nn.Linear(width, CLASSES)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.into(x.unsqueeze(-1))).mean(1))


class Scaled(nn.Module):
    """A network with an operation that the engines by hand do not know."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * torch.ones((), dtype=x.dtype).exp()


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(40, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, CLASSES))


def conv1d(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, width, 5, 2, 1),
        nn.SiLU(),
        nn.Conv1d(width, width, 3, 2, 1),
        nn.SiLU(),
        nn.Conv1d(width, width, 3, 2, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(5 * width, CLASSES),
    )


def conv2d(width: int) -> nn.Module:
    blocks = [
        (nn.Conv2d(1 if block == 0 else width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU(), nn.MaxPool2d(2))
        for block in range(3)
    ]
    return nn.Sequential(*itertools.chain(*blocks), nn.Flatten(), nn.Linear(9 * width, CLASSES))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "mlp": (mlp, (40,), (16, 64, 256, 1024)),
    "conv1d": (conv1d, (40,), (16, 32, 64, 128)),
    "conv2d": (conv2d, (1, 28, 28), (8, 32)),
    "attention": (Attention, (40,), (16, 64)),
}


def measured(setting: tuple[str, int, int, int], repeats: int) -> Row:
    name, width, examples, rows = setting
    make, shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    model, x, y = Scaled(make(width)), torch.randn(rows, examples, *shape), torch.randint(CLASSES, (rows, examples))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[0])
    learners = {engine: Learner(model, F.cross_entropy, engine) for engine in ("auto", "autograd", "loop")}
    learners["auto"].measure(x, examples, second_order=False)
    ways = {engine: learner.rows_at_once(x, examples, second_order=False) for engine, learner in learners.items()}
    calls = {engine: partial(gradients, learners[engine], x, y, at_once) for engine, at_once in ways.items()}
    calls["autograd, all rows"] = partial(gradients, learners["autograd"], x, y, rows)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(repeats + 1):
        for way, call in calls.items():
            times[way].append(seconds(call))
    medians = {way: statistics.median(spent[1:]) for way, spent in times.items()}  # the first warms up
    return {
        "network": name,
        "width": width,
        "rows": rows,
        "examples": examples,
        "flops_a_row": counter.get_total_flops(),
        **{f"{way.replace(', ', '_').replace(' ', '_')}_seconds": round(spent, 6) for way, spent in medians.items()},
        "autograd_rows_at_once": ways["autograd"],
        "auto": learners["auto"].used,
        "auto_rows_at_once": ways["auto"],
        "auto_over_best": round(medians["auto"] / min(medians.values()), 3),
    }


def gradients(learner: Learner, x: Tensor, y: Tensor, at_once: int) -> None:
    for inputs, labels in zip(x.split(at_once), y.split(at_once), strict=True):
        learner.engine_for(inputs, learner.row_loss(labels)).gradient(learner.theta().expand(len(inputs), -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    plan = [
        (name, width, examples, rows)
        for name, (_, _, widths) in NETWORKS.items()
        for width in widths
        for examples, rows in ((25, 8), (100, 32))
    ]
    rows = [measured(setting, arguments.repeats) for setting in tqdm(plan, unit="setting", disable=None)]
    write_csv(arguments.folder / "bench_engines.csv", rows)
    write_json(
        arguments.folder / "bench_engines.json",
        {
            "command": "python benchmarks/engines.py",
            "repeats": arguments.repeats,
            "loop_from_flops": LOOP_FROM,
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    main()
