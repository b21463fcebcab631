"""Networks of twelve kinds, most as a user writes them: a symmetric meta-gradient by this library, and by a loop over
tasks and offsets with torch.autograd, taking turns: bench_networks.csv.

In processor seconds of one thread, which other processes disturb less than the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import loop_symmetric
from timing import Row, existing_folder
from torch import Tensor, nn
from tqdm import tqdm

from fobmaml import Learner, TaskBatch
from fobmaml.estimators import Symmetric, chunk_size, estimate
from fobmaml.files import write_csv, write_json
from fobmaml.models import ResNet12
from fobmaml.run.allocator import keep_freed_memory
from fobmaml.run.provenance import provenance
from fobmaml.solvers import GradientDescent

ROOT = Path(__file__).parents[1]
CLASSES, TASKS, SUPPORT, QUERY = 5, 4, 25, 25
STEPS, LR, LAM, NU = 5, 0.1, 0.5, 0.05


class Apply(nn.Module):
    """A function of a module and its inputs."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module, x)


def residual(layers: nn.Module) -> nn.Module:
    return Apply(lambda m, x: F.silu(x + m(x)), layers)


def mean_of(dim: int) -> nn.Module:
    return Apply(lambda m, x: x.mean(dim), nn.Identity())


def normed_conv2d(into: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, 3, stride, 1), nn.GroupNorm(4, out)]


def image_blocks(width: int, blocks: int) -> nn.Module:
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers += [*normed_conv2d(width if block else 1, width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


def resnet(width: int) -> nn.Module:
    def block() -> nn.Module:
        return residual(nn.Sequential(*normed_conv2d(width, width), nn.SiLU(), *normed_conv2d(width, width)))

    stem = [*normed_conv2d(1, width, 2), nn.SiLU(), block(), block()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def recurrent(width: int) -> nn.Module:
    gru = Apply(lambda m, x: m(x)[0][:, -1], nn.GRU(1, width, batch_first=True))
    return nn.Sequential(nn.Unflatten(1, (-1, 1)), gru, nn.Linear(width, CLASSES))


def transformer(width: int) -> nn.Module:
    layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
    into = [nn.Unflatten(1, (-1, 1)), nn.Linear(1, width)]
    return nn.Sequential(*into, *layers, mean_of(1), nn.Linear(width, CLASSES))


def mlp(width: int, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for into in (40, width, width):
        layers += [nn.Linear(into, width), *([nn.LayerNorm(width)] if norm else []), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def words(width: int) -> nn.Module:
    into = [nn.Embedding(1000, width), mean_of(1)]
    return nn.Sequential(*into, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, CLASSES))


def conv1d(width: int, norm: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 40))]
    for block in range(3):
        layers += [nn.Conv1d(width if block else 1, width, 3, 2, 1), *([nn.GroupNorm(4, width)] if norm else [])]
        layers += [nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * width, CLASSES))


def mixer(width: int) -> nn.Module:
    """Depthwise and pointwise convolutions."""

    def block() -> nn.Module:
        depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        return nn.Sequential(residual(nn.Sequential(depthwise, nn.GELU())), nn.Conv2d(width, width, 1), nn.GELU())

    stem = [nn.Conv2d(1, width, 4, 4), nn.GELU()]
    return nn.Sequential(*stem, block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "4 blocks of 64 channels, images": (partial(image_blocks, 64, 4), (1, 28, 28)),
    "2 blocks of 8 channels, images": (partial(image_blocks, 8, 2), (1, 28, 28)),
    "residual blocks, images": (partial(resnet, 16), (1, 28, 28)),
    "ResNet-12 of 32 channels, images": (partial(ResNet12, (1, 28, 28), CLASSES, 32), (1, 28, 28)),
    "depthwise convolutions, images": (partial(mixer, 32), (1, 28, 28)),
    "gru": (partial(recurrent, 32), (40,)),
    "transformer": (partial(transformer, 32), (40,)),
    "mlp": (partial(mlp, 64, False), (40,)),
    "mlp with layer norm": (partial(mlp, 64, True), (40,)),
    "embedding": (partial(words, 64), (20,)),
    "convolutions": (partial(conv1d, 32, False), (40,)),
    "convolutions with group norm": (partial(conv1d, 32, True), (40,)),
}


def tasks_for(shape: tuple[int, ...], words: bool) -> TaskBatch:
    def inputs(count: int) -> Tensor:
        return torch.randint(1000, (TASKS, count, *shape)) if words else torch.randn(TASKS, count, *shape)

    def labels(count: int) -> Tensor:
        return torch.randint(CLASSES, (TASKS, count))

    return TaskBatch(inputs(SUPPORT), labels(SUPPORT), inputs(QUERY), labels(QUERY))


def processor_seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def measured(name: str, repeats: int) -> Row:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, tasks = make(), tasks_for(shape, name == "embedding")
    model(tasks.support_x[0])  # lazy layers
    estimator = Symmetric(GradientDescent(STEPS, LR), LAM, nu=NU)
    learners, chunks = {}, {}
    for engine in ("auto", "autograd", "loop"):
        learner = Learner(model, F.cross_entropy, engine)
        with suppress(ValueError):  # torch.func.vmap does not take all of them
            chunks[engine] = chunk_size(learner, tasks, estimator, measure=True)
            learners[engine] = learner
    calls: dict[str, Callable[[], object]] = {"by hand": partial(loop_symmetric, model, tasks, STEPS, LR, LAM, NU)}
    for engine, learner in learners.items():
        calls[engine] = partial(estimate, estimator, learner, learner.theta(), tasks, chunks[engine], False)
    auto = learners["auto"]
    ours = auto.unflatten(estimate(estimator, auto, auto.theta(), tasks, chunks["auto"], False).gradient)
    wanted = torch.cat([part.flatten() for part in loop_symmetric(model, tasks, STEPS, LR, LAM, NU)])
    error = (torch.cat([part.flatten() for part in ours.values()]) - wanted).norm() / wanted.norm()
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(repeats + 1):
        for way, call in calls.items():
            times[way].append(processor_seconds(call))
    spent = {way: [*each[1:]] for way, each in times.items()}  # the first warms up
    row: Row = {
        "network": name,
        "parameters": auto.parameter_count,
        "engine": auto.used,
        "task_chunk": chunks["auto"],
        "why_not_by_hand": auto.untraced,
        "relative_difference": f"{float(error):.1e}",
    }
    for way in ("by hand", "auto", "autograd", "loop"):
        row[f"{way.replace(' ', '_')}_seconds"] = round(statistics.median(spent[way]), 5) if way in spent else None
    fixed = [spent[way] for way in ("autograd", "loop") if way in spent]
    ratios = [ours / min(others) for ours, *others in zip(spent["auto"], *fixed, strict=True)]
    row["auto_over_best"] = round(statistics.median(ratios), 3)
    for way in ("auto", "autograd", "loop"):
        ratios = [a / b for a, b in zip(spent.get(way, []), spent["by hand"], strict=False)]
        row[f"{way}_over_by_hand"] = round(statistics.median(ratios), 3) if ratios else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--folder", type=existing_folder, default=ROOT / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for name in tqdm(arguments.only, unit="network", disable=None):
        rows.append(measured(name, arguments.repeats))
        tqdm.write(str(rows[-1]))
    write_csv(arguments.folder / "bench_networks.csv", rows)
    write_json(
        arguments.folder / "bench_networks.json",
        {
            "command": "python benchmarks/networks.py",
            "tasks": TASKS,
            "support": SUPPORT,
            "query": QUERY,
            "inner_steps": STEPS,
            "repeats": arguments.repeats,
            "seconds": "of the processor, one thread, medians; ratios are medians of those in one round",
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    main()
