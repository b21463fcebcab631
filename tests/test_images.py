"""The compiled kernel for images: its gradients are autograd's, and nothing that does not fit reaches it."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fobmaml
from fobmaml import Learner, TaskBatch
from fobmaml.engine import library
from fobmaml.engine.described import Described, described
from fobmaml.engine.images import FusedImages, ImageGradient
from fobmaml.engine.losses import Loss, Part
from fobmaml.engine.nodes import (
    Activate,
    Attention,
    Conv,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MeanOfPlaces,
    Node,
    Pool,
    Reshape,
    RMSNorm,
    Shift,
    Sum,
    Take,
)
from fobmaml.engine.trial import Trial
from fobmaml.estimators import MAML, Symmetric, Tangent
from fobmaml.models import ResNet12, Transformer
from fobmaml.solvers import GradientDescent

NAMES = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh", nn.GELU: "gelu"}


@pytest.fixture(autouse=True)
def _seeded(used_memory):
    torch.manual_seed(0)


def _pair(size: int | tuple[int, ...], first: int) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (first, *size) if len(size) == 1 else size


def nodes_of(model: nn.Sequential) -> list[Node]:
    """What the layers say of themselves, one by one."""
    nodes: list[Node] = []
    for name, layer in model.named_children():
        weight, bias = (
            f"{name}.{part}" if getattr(layer, part, None) is not None else None for part in ("weight", "bias")
        )
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            size = (_pair(layer.stride, 1), _pair(layer.padding, 0), _pair(layer.dilation, 1), layer.groups)
            nodes.append(Conv(weight, bias, *size))
        elif isinstance(layer, nn.Linear):
            nodes.append(Linear(weight, bias))
        elif isinstance(layer, nn.GroupNorm):
            nodes.append(GroupNorm(layer.num_groups, weight, bias, layer.eps))
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max" if isinstance(layer, nn.MaxPool2d) else "average"
            nodes.append(Pool(kind, *(_pair(size, 1) for size in (layer.kernel_size, layer.stride, layer.padding))))
        elif isinstance(layer, nn.Flatten):
            nodes.append(Flatten())
        elif isinstance(layer, nn.Unflatten):
            nodes.append(Reshape(layer.unflattened_size))
        else:
            nodes.append(Activate(NAMES[type(layer)]))
    return nodes


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _rows(model: nn.Module, rows: int) -> torch.Tensor:
    """Parameters near the model's, where nothing is zero or one by initialisation."""
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return theta + 0.1 * theta.square().mean().sqrt() * torch.randn(rows, len(theta))


def _wanted(model: nn.Module, phi: torch.Tensor, x: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor):
    """The gradient of one row's loss by plain autograd in float64."""
    leaf, shapes = phi.detach().double().requires_grad_(), _shapes(model)
    parts = leaf.split([shape.numel() for shape in shapes.values()])
    parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    outputs = functional_call(model.double(), parameters, (x.double() if x.is_floating_point() else x,))
    loss = F.cross_entropy(outputs, targets, reduction="none") @ weights.double()
    return torch.autograd.grad(loss, leaf)[0]


def _check(model: nn.Module, x: torch.Tensor, nodes: list[Node] | None = None) -> ImageGradient:
    """``x`` [R, N, ...]. Returns the kernel's gradient, whose numbers are autograd's."""
    nodes = nodes or nodes_of(model)
    with torch.no_grad():
        classes = model.float()(x[0]).shape[1]
    rows, examples = x.shape[:2]
    targets, weights = torch.randint(classes, (rows, examples)), torch.rand(rows, examples)
    phi, before = _rows(model, rows), torch.randn(rows, sum(p.numel() for p in model.parameters()))
    gradient = ImageGradient.of(nodes, _shapes(model), x, F.one_hot(targets, classes).float(), weights)
    found = torch.full_like(before, torch.nan)  # is not read
    gradient.add(phi, None, found, 0.0, 1.0)
    again = before.clone()
    gradient.add(phi, None, again, 0.9, -0.1)
    for r in range(rows):
        wanted = _wanted(model, phi[r], x[r], targets[r], weights[r])
        assert (found[r] - wanted).norm() <= 1e-5 * wanted.norm()
        moved = 0.9 * before[r] - 0.1 * wanted
        assert (again[r] - moved).norm() <= 1e-5 * moved.norm()
    return gradient


def _by_chance(seed: int) -> tuple[nn.Sequential, torch.Tensor]:
    """A network and inputs [R, N, channels, height, width], with sizes on both sides of all that the kernel cuts into
    blocks."""
    torch.manual_seed(seed)
    chance = np.random.default_rng(seed)

    def one(low: int, high: int) -> int:
        return int(chance.integers(low, high + 1))

    def fitting(most: int = 4) -> tuple[int, int]:
        return min(one(1, most), size[0]), min(one(1, most), size[1])

    x = torch.randn(one(1, 3), one(1, 12), one(1, 4), one(1, 16), one(1, 16))
    channels, size = x.shape[2], x.shape[3:]
    layers: list[nn.Module] = []
    for _ in range(one(0, 3)):
        out, kernel = one(1, 70), fitting()
        padding = one(0, kernel[0]), one(0, kernel[1])
        layers.append(nn.Conv2d(channels, out, kernel, (one(1, 3), one(1, 2)), padding, bias=bool(one(0, 1))))
        if one(0, 1):
            groups = next(g for g in (one(1, out), out, 1) if out % g == 0)
            layers.append(nn.GroupNorm(groups, out, affine=bool(one(0, 1)), eps=0.1))
        for _ in range(one(0, 2)):
            layers.append([nn.SiLU, nn.ReLU, nn.Tanh, nn.GELU][one(0, 3)]())
        size = nn.Sequential(*layers)(x[0, :1]).shape[2:]
        if one(0, 1):
            kernel = fitting(3)
            padding = one(0, kernel[0] // 2), one(0, kernel[1] // 2)
            layers.append([nn.MaxPool2d, nn.AvgPool2d][one(0, 1)](kernel, (one(1, 3), one(1, 3)), padding))
            size = nn.Sequential(*layers)(x[0, :1]).shape[2:]
        channels = out
    layers.append(nn.Flatten())
    values = channels * size[0] * size[1]
    for _ in range(one(0, 2)):
        layers += [nn.Linear(values, values := one(1, 40), bias=bool(one(0, 1))), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(values, one(2, 40))), x


@pytest.mark.parametrize("seed", range(24))
def test_gradients_equal_autograd(instructions, seed):
    _check(*_by_chance(seed))


EDGES = {
    "one place, one channel, one row, one example": (
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU(), nn.Flatten(), nn.Linear(1, 2)),
        (1, 1, 1, 1, 1),
    ),
    "padding wider than the image": (
        nn.Sequential(
            nn.Conv2d(2, 3, 5, 4, 5),
            nn.Tanh(),
            nn.Conv2d(3, 17, (1, 4), 1, (3, 3)),
            nn.Flatten(),
            nn.Linear(17 * 8 * 5, 2),
        ),
        (2, 3, 2, 2, 2),
    ),
    "a stride that leaves places out": (
        nn.Sequential(nn.Conv2d(1, 16, 2, 3), nn.ReLU(), nn.AvgPool2d(1, 2), nn.Flatten(), nn.Linear(64, 3)),
        (2, 5, 1, 10, 10),
    ),
    "windows that overlap, padded": (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(72, 3)),
        (2, 5, 1, 5, 5),
    ),
    "tiles of odd images": (
        nn.Sequential(
            nn.Conv2d(2, 17, 2),
            nn.SiLU(),
            nn.Conv2d(17, 70, 3, padding=1, bias=False),
            nn.Flatten(),
            nn.Linear(2450, 3),
        ),
        (2, 5, 2, 8, 6),
    ),
    "tiles of three lines": (
        nn.Sequential(
            nn.Conv2d(2, 17, 1),
            nn.SiLU(),
            nn.Conv2d(17, 35, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(35, 7, 3, padding=1),
            nn.Flatten(),
            nn.Linear(210, 3),
        ),
        (2, 70, 2, 6, 5),
    ),
    "a tile of three lines an image": (
        nn.Sequential(nn.Conv2d(1, 16, 1), nn.Conv2d(16, 40, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(360, 3)),
        (2, 9, 1, 3, 3),
    ),
    "many tiles": (
        nn.Sequential(
            nn.Conv2d(1, 9, 1), nn.Tanh(), nn.Conv2d(9, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 399, 3)
        ),
        (2, 7, 1, 21, 23),
    ),
    "tiles, padded by more than the window": (
        nn.Sequential(
            nn.Conv2d(1, 5, 1), nn.Conv2d(5, 33, 3, padding=(3, 0)), nn.ReLU(), nn.Conv2d(33, 2, 3), nn.Flatten()
        ).append(nn.Linear(2 * 5 * 4, 3)),
        (2, 3, 1, 3, 8),
    ),
    "signals": (
        nn.Sequential(
            nn.Conv1d(2, 20, 5, 2, 1),
            nn.GroupNorm(4, 20),
            nn.SiLU(),
            nn.Conv1d(20, 9, 3),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(9 * 17, 4),
        ),
        (2, 30, 2, 40),
    ),
    "vectors": (
        nn.Sequential(nn.Linear(7, 100), nn.GELU(), nn.GroupNorm(5, 100), nn.Linear(100, 3, bias=False)),
        (3, 60, 7),
    ),
    "an image at once": (nn.Sequential(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 33)), (2, 3, 2, 3, 4)),
    "vectors that are images": (
        nn.Sequential(nn.Unflatten(1, (1, 4, 6)), nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(24, 2)),
        (2, 3, 24),
    ),
    "one number for an image": (
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten()),
        (2, 4, 1, 6, 6),
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges(instructions, case):
    model, shape = EDGES[case]
    _check(model, torch.randn(shape))


class Branches(nn.Module):
    """The activated sum of what several modules give of the same."""

    def __init__(self, *ways: nn.Module, then: nn.Module | None = None):
        super().__init__()
        self.ways, self.then = nn.ModuleList(ways), then or nn.Identity()

    def forward(self, x):
        return self.then(sum((way(x) for way in self.ways[1:]), self.ways[0](x)))


def _conv(into: int, out: int, size: int = 3, **options) -> nn.Module:
    return nn.Conv2d(into, out, size, padding=size // 2, **options)


def _check_graph(model: nn.Module, x: torch.Tensor) -> ImageGradient:
    nodes = Trial(Learner(model.float(), F.cross_entropy), "auto").nodes(x)
    assert nodes is not None
    return _check(model, x, nodes)


GRAPHS = {
    "residual": nn.Sequential(_conv(2, 6), Branches(nn.Identity(), _conv(6, 6)), nn.Flatten(), nn.Linear(180, 3)),
    "residual, before norm and activation": nn.Sequential(
        _conv(2, 6),
        nn.SiLU(),
        Branches(nn.Sequential(nn.GroupNorm(3, 6), nn.Tanh(), _conv(6, 6)), nn.Identity(), then=nn.GELU()),
        Branches(nn.Identity(), nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU()), then=nn.GroupNorm(1, 6)),
        nn.Flatten(),
        nn.Linear(180, 3),
    ),
    "ways from the inputs": nn.Sequential(
        Branches(_conv(2, 5, 1), _conv(2, 5, 5, bias=False), nn.Sequential(_conv(2, 3), nn.Tanh(), _conv(3, 5))),
        nn.AvgPool2d((5, 6)),
        nn.Flatten(),
        nn.Linear(5, 3),
    ),
    "windows of all sizes on one signal": nn.Sequential(
        _conv(2, 17),
        Branches(_conv(17, 4), _conv(17, 4, 5), nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(17, 4, 1)), then=nn.SiLU()),
        Branches(nn.MaxPool2d(2), nn.Conv2d(4, 4, 4, 2, 1), nn.AvgPool2d((2, 2)), then=nn.MaxPool2d(2, 1, 1)),
        nn.Flatten(),
        nn.Linear(4 * 3 * 4, 3),
    ),
    "an activation of what is taken again": nn.Sequential(
        _conv(2, 4),
        nn.GroupNorm(2, 4),
        Branches(nn.Identity(), nn.Sequential(nn.SiLU(), _conv(4, 4)), nn.Tanh()),
        Branches(nn.Identity(), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(120, 3),
    ),
    "vectors": nn.Sequential(
        nn.Flatten(),
        nn.Linear(60, 20),
        Branches(nn.Identity(), nn.Sequential(nn.SiLU(), nn.Linear(20, 20)), then=nn.Tanh()),
        nn.Linear(20, 3),
    ),
    "within each other": nn.Sequential(
        _conv(2, 4),
        Branches(
            nn.Identity(),
            Branches(nn.Identity(), nn.Sequential(nn.Tanh(), _conv(4, 4)), then=_conv(4, 4)),
            then=nn.AvgPool2d(2),
        ),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_signals_that_are_taken_twice(instructions, case):
    _check_graph(GRAPHS[case], torch.randn(2, 5, 2, 5, 6))


class Heads(nn.Module):
    """Attention of a sequence of vectors, by the queries, keys and values that a linear layer gives of each."""

    def __init__(self, into: int, heads: int, size: int):
        super().__init__()
        self.heads, self.into, self.out = heads, nn.Linear(into, 3 * heads * size), nn.Linear(heads * size, into)

    def forward(self, x):
        parts = self.into(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        return self.out(F.scaled_dot_product_attention(*parts).transpose(-3, -2).flatten(-2))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def _attending(places: int, into: int, heads: int, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    layers = Branches(nn.Identity(), nn.Sequential(nn.LayerNorm(6), Heads(6, heads, size)))
    return nn.Sequential(nn.Linear(into, 6), layers, Mean(), nn.Linear(6, 3)), (places, into)


SEQUENCES = {
    "two places": _attending(2, 2, 1, 1),
    "places and sizes around a register's": _attending(17, 1, 3, 5),
    "several panels of places": _attending(70, 3, 2, 8),
    "a size of several panels": _attending(9, 2, 1, 70),
    "places that fill panels": _attending(64, 1, 2, 16),
    "vectors": (
        nn.Sequential(
            nn.Linear(7, 33), nn.LayerNorm(33), nn.SiLU(), nn.Linear(33, 16), nn.LayerNorm(16, bias=False)
        ).append(nn.Linear(16, 3)),
        (7,),
    ),
    "vectors by their mean square": (
        nn.Sequential(nn.Linear(7, 33), nn.RMSNorm(33), nn.SiLU(), nn.Linear(33, 16), nn.RMSNorm(16, eps=0.5)).append(
            nn.Linear(16, 3)
        ),
        (7,),
    ),
    "a sequence by its mean square": (
        nn.Sequential(nn.Linear(3, 18), nn.RMSNorm(18, elementwise_affine=False), Heads(18, 2, 5), Mean()).append(
            nn.Linear(18, 4)
        ),
        (5, 3),
    ),
    "no mean at the end": (
        nn.Sequential(nn.Linear(3, 18), nn.LayerNorm(18, elementwise_affine=False), nn.GELU(), nn.Flatten()).append(
            nn.Linear(90, 4)
        ),
        (5, 3),
    ),
    "values, with places": (Transformer((11,), 3, width=12, heads=3), (11,)),
    "vectors, with places": (Transformer((6, 3), 3, width=8, heads=2, depth=1), (6, 3)),
    "torch's own": (
        nn.Sequential(
            nn.Unflatten(1, (4, 3)),
            nn.Linear(3, 8),
            nn.TransformerEncoderLayer(8, 2, 10, 0.0, batch_first=True, norm_first=True),
            nn.TransformerEncoderLayer(8, 4, 17, 0.0, F.gelu, batch_first=True),
            Mean(),
            nn.Linear(8, 3),
        ),
        (12,),
    ),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequences(instructions, case):
    model, shape = SEQUENCES[case]
    x = torch.randn(2, 5, *shape)
    _check_graph(model, x)
    learner = Learner(model.float(), F.cross_entropy)
    learner.engine_for(x, learner.row_loss(torch.ones(2, 5).long()))
    assert learner.used.startswith("images-")
    phi = _rows(model, 2)
    wanted = Learner(model, F.cross_entropy, "loop").outputs(phi, x)
    torch.testing.assert_close(learner.outputs(phi, x), wanted, rtol=1e-4, atol=1e-5)


WORDS = {
    "a mean of words": (nn.Sequential(nn.Embedding(11, 5), Mean(), nn.Tanh(), nn.Linear(5, 3)), 7, 11),
    "words in their order": (nn.Sequential(nn.Embedding(4, 17), nn.Flatten(), nn.Linear(51, 3)), 3, 4),
    "a transformer": (Transformer((6,), 3, width=8, heads=2, depth=1, tokens=40), 6, 40),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(instructions, case):
    model, places, words = WORDS[case]
    x = torch.randint(words, (2, 5, places))
    x[0, 0, 0], x[1, 1, 1] = 0, words - 1
    gradient = _check_graph(model, x)
    learner = Learner(model.float(), F.cross_entropy)
    targets = torch.ones(2, 5).long()
    engine = learner.engine_for(x, learner.row_loss(targets))
    assert learner.used.startswith("images-")
    phi, plain = _rows(model, 2), Learner(model, F.cross_entropy, "loop")
    wanted = plain.engine_for(x, plain.row_loss(targets)).gradient(phi)
    assert (engine.gradient(phi) - wanted).norm() <= 1e-4 * wanted.norm()
    torch.testing.assert_close(learner.outputs(phi, x), plain.outputs(phi, x), rtol=1e-4, atol=1e-5)
    for wrong in (-1, words):
        x[0, 2, 1] = wrong
        with pytest.raises(ValueError, match=f"^inputs={wrong}: takes whole numbers from 0 to {words - 1}"):
            learner.engine_for(x, learner.row_loss(targets))
    assert gradient.data["inputs"].max() == words - 1


def test_attention_of_large_numbers(instructions):
    model, shape = _attending(9, 3, 2, 4)
    _check_graph(model, 40.0 * torch.randn(2, 3, *shape))


@pytest.mark.parametrize("model", ["transformer", "resnet"])
def test_the_meta_gradient_of_a_graph_is_that_of_a_loop(instructions, model):
    network = Transformer((64,), 5, width=8, heads=2) if model == "transformer" else ResNet12((1, 8, 8), 5, 4, 2)
    tasks, found = _tasks(), {}
    if model == "transformer":
        tasks = replace(tasks, support_x=tasks.support_x.flatten(2), query_x=tasks.query_x.flatten(2))
    for dtype, engine in ((torch.float32, "auto"), (torch.float64, "loop")):
        learner = Learner(network.to(dtype), F.cross_entropy, engine)
        estimator = Symmetric(GradientDescent(3, 0.05), lam=0.5, nu=0.5)
        found[engine] = fobmaml.estimators.estimate(estimator, learner, learner.theta(), tasks.to(dtype=dtype))
        assert learner.used.startswith("images-") == (engine == "auto")
    assert (found["auto"].gradient - found["loop"].gradient).norm() <= 1e-3 * found["loop"].gradient.norm()


def test_the_residual_network(instructions):
    model = ResNet12((2, 9, 8), 3, width=4, depth=2)
    gradient = _check_graph(model, torch.randn(2, 30, 2, 9, 8))
    phi, x = _rows(model.float(), 2), gradient.data["inputs"]
    torch.testing.assert_close(
        gradient.outputs(phi), Learner(model, F.cross_entropy, "loop").outputs(phi, x), rtol=1e-4, atol=1e-5
    )


def test_equal_maxima_give_to_the_first_as_in_torch(instructions):
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    _check(model, torch.randint(2, (2, 4, 1, 6, 6)).float())
    _check(model, torch.ones(1, 2, 1, 6, 6))


def test_saturated_units(instructions):
    for kind in NAMES:
        model = nn.Sequential(nn.Conv2d(1, 5, 3), kind(), nn.Flatten(), nn.Linear(20, 3))
        _check(model, 30.0 * torch.randn(2, 4, 1, 4, 4))


def _conv4(width: int = 8) -> nn.Sequential:
    """Without kinks, at which roundings decide."""
    blocks = [
        (nn.Conv2d(width if block else 1, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU(), nn.AvgPool2d(2))
        for block in range(3)
    ]
    return nn.Sequential(*itertools.chain(*blocks), nn.Flatten(), nn.Linear(width, 5))


@pytest.mark.parametrize("examples", [7, 120])
def test_descent_on_mini_batches_equals_autograd(instructions, examples):
    """Examples taken twice among them, in several blocks; steps of their own lengths."""
    model, rows, times, chosen = _conv4(), 2, 3, examples // 2
    x, targets = torch.randn(rows, examples, 1, 8, 8), torch.randint(5, (rows, examples))
    order, weights = torch.randint(examples, (rows, times, chosen)), torch.rand(rows, times, chosen) / chosen
    theta, (scales, steps) = _rows(model, 1), torch.rand(2, times).tolist()
    gradient = ImageGradient.of(
        nodes_of(model), _shapes(model), x, F.one_hot(targets, 5).float(), torch.zeros(targets.shape)
    )
    found = torch.zeros(rows, theta.shape[1])
    gradient.add(theta, found, found, scales, [-step for step in steps], times, order, weights)
    for r in range(rows):
        wanted = torch.zeros(theta.shape[1], dtype=torch.float64)
        for t, (scale, step) in enumerate(zip(scales, steps, strict=True)):
            which = order[r, t]
            slope = _wanted(model, theta[0] + wanted, x[r, which], targets[r, which], weights[r, t])
            wanted = scale * wanted - step * slope
        assert (found[r] - wanted).norm() <= 1e-5 * wanted.norm()


def test_gradients_do_not_depend_on_threads(instructions):
    model, x, targets = _conv4(), torch.randn(5, 3, 1, 8, 8), torch.eye(5).expand(5, 5, 5)[:, :3]
    phi, found = _rows(model, 5), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gradient = ImageGradient.of(nodes_of(model), _shapes(model), x, targets, torch.ones(5, 3))
        into = torch.zeros_like(phi)
        gradient.add(phi, into, into, 0.9, -0.1, times=2)
        found.append(into)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_not_a_number_stays_in_its_row(instructions):
    model, x = _conv4(), torch.randn(2, 3, 1, 8, 8)
    x[0, 1, 0, 3, 3] = torch.nan
    gradient = ImageGradient.of(nodes_of(model), _shapes(model), x, torch.eye(5)[:3].expand(2, 3, 5), torch.ones(2, 3))
    phi = _rows(model, 2)
    found = torch.zeros_like(phi)
    gradient.add(phi, None, found, 0.0, 1.0)
    assert not found[0].isfinite().all()
    assert found[1].isfinite().all()
    gradient.add(1e30 * phi, None, found, 0.0, 1.0)
    assert not found.isfinite().all(1).any()


# in the learner


def _tasks(support: int = 5, query: int = 10) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, support + query, 1, 8, 8, generator=g), torch.randint(5, (3, support + query), generator=g)
    return TaskBatch(x[:, :support], y[:, :support], x[:, support:], y[:, support:]).keyed(g)


SOLVERS = [
    GradientDescent(steps=12, lr=0.05),
    GradientDescent(steps=3, lr=0.2, momentum=0.5),
    GradientDescent(steps=3, lr=0.2, batch=3, query_batch=4),
]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_meta_gradient_is_that_of_a_loop(instructions, solver):
    model, tasks, found = _conv4(), _tasks(), {}
    for dtype, engine in ((torch.float32, "auto"), (torch.float64, "loop")):
        learner = Learner(model.to(dtype), F.cross_entropy, engine)
        estimator = Symmetric(solver, lam=0.5, nu=0.5)
        found[engine] = fobmaml.estimators.estimate(estimator, learner, learner.theta(), tasks.to(dtype=dtype))
        assert learner.used.startswith("images-") == (engine == "auto")
    assert (found["auto"].gradient - found["loop"].gradient).norm() <= 1e-4 * found["loop"].gradient.norm()
    torch.testing.assert_close(found["auto"].query_loss.double(), found["loop"].query_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", [MAML, Tangent])
def test_what_takes_second_derivatives_takes_autograd(instructions, estimator):
    learner = Learner(_conv4(), F.cross_entropy)
    solver = GradientDescent(steps=2, lr=0.2)
    chosen = estimator(solver) if estimator is MAML else estimator(solver, lam=0.5)
    found = fobmaml.estimators.estimate(chosen, learner, learner.theta(), _tasks()).gradient
    plain = Learner(_conv4(), F.cross_entropy, "loop")
    wanted = fobmaml.estimators.estimate(chosen, plain, learner.theta(), _tasks()).gradient
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_the_kernel_is_for_what_it_knows(instructions):
    def used(model: nn.Module, loss=F.cross_entropy, engine: str = "auto", second_order: bool = False) -> str:
        learner = Learner(model, loss, engine)
        dtype = next(model.parameters()).dtype
        learner.engine_for(
            torch.randn(2, 3, 1, 8, 8, dtype=dtype), learner.row_loss(torch.ones(2, 3).long()), second_order
        )
        return learner.used.split("-")[0]

    assert used(_conv4()) == "images"
    assert used(_conv4(), second_order=True) == "autograd"
    assert used(_conv4(), engine="loop") == "loop"
    assert used(_conv4().double()) == "autograd"
    assert used(_conv4(), loss=lambda outputs, y: F.cross_entropy(outputs, y) * 2) == "autograd"
    assert used(_dilated()) == "autograd"


@pytest.mark.parametrize("last", [nn.AdaptiveAvgPool1d(1), nn.Identity()])
def test_signals_whose_weights_are_turned_in_a_row(instructions, last):
    length = 1 if isinstance(last, nn.AdaptiveAvgPool1d) else 17
    model = nn.Sequential(
        nn.Conv1d(2, 20, 5, 2, 1), nn.GroupNorm(4, 20), nn.SiLU(), nn.Conv1d(20, 9, 3), nn.SiLU(), last
    )
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(9 * length, 4))
    learner, exact = Learner(model, F.cross_entropy), Learner(model, F.cross_entropy, "loop").in_double()
    x, y = torch.randn(2, 30, 2, 40), torch.randint(4, (2, 30))
    found = learner.engine_for(x, learner.row_loss(y)).gradient(learner.theta().expand(2, -1))
    wanted = exact.engine_for(x.double(), exact.row_loss(y)).gradient(exact.theta().expand(2, -1))
    assert learner.used.startswith("images-")
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def _dilated() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 2, dilation=2), nn.Flatten(), nn.Linear(144, 5))


def test_an_engine_of_some_examples(instructions):
    model = _conv4()
    learner = Learner(model, F.cross_entropy)
    x, y = torch.randn(2, 6, 1, 8, 8), torch.randint(5, (2, 6))
    loss = Loss(F.cross_entropy)
    engine = FusedImages(
        described(nodes_of(model), learner, (1, 8, 8)), learner, x, loss.rows(y, [Part(slice(None), 1.0)])
    )
    order = torch.tensor([[1, 5], [0, 2]])
    some = engine.of_examples(order, [Part(slice(None), 1.0)])
    phi = _rows(model, 2)
    for r, which in enumerate(order):
        wanted = _wanted(model, phi[r], x[r, which], y[r, which], torch.full((2,), 0.5))
        assert (some.gradient(phi)[r] - wanted).norm() <= 1e-5 * wanted.norm()


# the boundary

CONV, LINEAR = Conv("0.weight", "0.bias", (1, 1), (0, 0), (1, 1), 1), Linear("2.weight", "2.bias")
RIGHT = [CONV, Activate("relu"), Flatten(), LINEAR]
WRONG_NODES = {
    "nothing": [],
    "no end": RIGHT[:-1],
    "no vector": [CONV, LINEAR],
    "no image": [Flatten(), CONV, LINEAR],
    "a parameter twice": [CONV, Flatten(), LINEAR, Activate("relu"), LINEAR],
    "a parameter left out": [CONV, Flatten(), Linear("2.weight", None)],
    "an unknown parameter": [CONV, Flatten(), Linear("3.weight", "2.bias")],
    "a bias for a weight": [Conv("2.bias", "0.bias", (1, 1), (0, 0), (1, 1), 1), Flatten(), LINEAR],
    "a bias for a matrix": [CONV, Flatten(), Linear("0.bias", "2.bias")],
    "a bias of another size": [CONV, Flatten(), Linear("2.weight", "0.bias")],
    "a weight of another size": [Conv("2.weight", "0.bias", (1, 1), (0, 0), (1, 1), 1), Flatten(), LINEAR],
    "dilation": [Conv("0.weight", "0.bias", (1, 1), (1, 1), (2, 2), 1), Flatten(), LINEAR],
    "groups": [Conv("0.weight", "0.bias", (1, 1), (0, 0), (1, 1), 2), Flatten(), LINEAR],
    "no stride": [Conv("0.weight", "0.bias", (0, 1), (0, 0), (1, 1), 1), Flatten(), LINEAR],
    "a stride that is no number": [Conv("0.weight", "0.bias", (1.0, 1), (0, 0), (1, 1), 1), Flatten(), LINEAR],
    "a padding below zero": [Conv("0.weight", "0.bias", (1, 1), (0, -1), (1, 1), 1), Flatten(), LINEAR],
    "a large padding": [Conv("0.weight", "0.bias", (1, 1), (2**41, 2), (1, 1), 1), Flatten(), LINEAR],
    "a padding as large as the window": [CONV, Pool("max", (2, 2), (2, 2), (2, 2)), Flatten(), LINEAR],
    "a window that does not fit": [CONV, Pool("max", (5, 2), (2, 2), (0, 0)), Flatten(), LINEAR],
    "another pool": [CONV, Pool("least", (1, 1), (1, 1), (0, 0)), Flatten(), LINEAR],
    "a pool of no stride": [CONV, Pool("max", (1, 1), (1, 0), (0, 0)), Flatten(), LINEAR],
    "another activation": [CONV, Activate("softplus"), Flatten(), LINEAR],
    "a norm first": [GroupNorm(1, None, None, 1e-5), CONV, Flatten(), LINEAR],
    "groups that do not divide": [CONV, GroupNorm(2, None, None, 1e-5), Flatten(), LINEAR],
    "no groups": [CONV, GroupNorm(0, None, None, 1e-5), Flatten(), LINEAR],
    "an eps below zero": [CONV, GroupNorm(1, None, None, -1.0), Flatten(), LINEAR],
    "a norm of values": [CONV, Flatten(), GroupNorm(1, None, None, 1e-5), LINEAR],
    "another shape": [Reshape((1, 4, 4)), CONV, Flatten(), LINEAR],
    "another shape in between": [CONV, Reshape((3, 4, 2)), Flatten(), LINEAR],
    "too many": [CONV, *[Activate("relu")] * library.MOST_LAYERS, Flatten(), LINEAR],
    "what is no node": [CONV, "flatten", LINEAR],
    "what comes later": [CONV, Take(1), Flatten(), LINEAR],
    "what is not there": [CONV, Take(-2), Flatten(), LINEAR],
    "a sum of two shapes": [CONV, Flatten(), Sum(0), LINEAR],
    "a sum with the inputs": [CONV, Sum(-1), Flatten(), LINEAR],
    "a sum with itself": [CONV, Sum(0), Flatten(), LINEAR],
    "nobody's result": [CONV, Activate("relu"), Take(0), Flatten(), LINEAR],
    "an end that goes back": [CONV, Flatten(), LINEAR, Activate("relu"), Take(2)],
    "inputs first": [Activate("relu"), Take(-1), *RIGHT],
    "a padded pool of what others take": [
        CONV,
        Pool("max", (3, 3), (1, 1), (1, 1)),
        Sum(0),
        Flatten(),
        LINEAR,
    ],
}


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(24, 4))


def _given(**changes) -> dict:
    return {
        "nodes": RIGHT,
        "shapes": _shapes(_small()),
        "x": torch.randn(2, 3, 1, 3, 5),
        "targets": torch.eye(4)[:3].expand(2, 3, 4),
        "weights": torch.ones(2, 3),
    } | changes


@pytest.mark.parametrize("case", WRONG_NODES)
def test_networks_that_the_kernel_does_not_know(instructions, case):
    network = Learner(_small(), F.cross_entropy)
    assert described(RIGHT, network, (1, 3, 5))
    assert not described(WRONG_NODES[case], network, (1, 3, 5))
    with pytest.raises(ValueError, match=r"^(model|inputs|stride|padding|kernel|groups|eps|step)=.*: takes "):
        ImageGradient.of(**_given(nodes=WRONG_NODES[case]))


VECTORS = [Linear("a", None), Shift("p"), Attention(2), MeanOfPlaces(), Linear("b", None)]
OF_VECTORS = {"a": torch.Size((12, 2)), "p": torch.Size((5, 12)), "b": torch.Size((3, 4))}
WRONG_VECTORS = {
    "heads that do not divide": [*VECTORS[:2], Attention(3), *VECTORS[3:]],
    "no heads": [*VECTORS[:2], Attention(0), *VECTORS[3:]],
    "attention of what is no threes": [*VECTORS[:3], Attention(1), *VECTORS[3:]],
    "attention of inputs": [Attention(1), *VECTORS],
    "another shift": [VECTORS[0], Shift("b"), *VECTORS[2:]],
    "a shift behind": [VECTORS[0], *VECTORS[2:4], Shift("p"), VECTORS[4]],
    "a norm of another size": [VECTORS[0], LayerNorm("p", None, 1e-5), *VECTORS[2:]],
    "a norm of inputs": [LayerNorm(None, None, 1e-5), *VECTORS],
    "an eps below zero": [*VECTORS[:2], LayerNorm(None, None, -1.0), *VECTORS[2:]],
    "an eps below zero, of the mean square": [*VECTORS[:2], RMSNorm(None, -1.0), *VECTORS[2:]],
    "a gain of another size": [VECTORS[0], RMSNorm("p", 1e-5), *VECTORS[2:]],
    "a norm of channels": [*VECTORS[:2], GroupNorm(2, None, None, 1e-5), *VECTORS[2:]],
    "a pool": [*VECTORS[:2], Pool("max", (1, 1), (1, 1), (0, 0)), *VECTORS[2:]],
    "a convolution": [Linear("a", None), Conv("p", None, (1, 1), (0, 0), (1, 1), 1), *VECTORS[2:]],
    "no end": [*VECTORS[:2], Attention(2)],
    "a mean of one vector": [*VECTORS[:4], MeanOfPlaces(), VECTORS[4]],
    "words": [Embedding("a"), *VECTORS[1:]],
    "inputs as signals, too": [*VECTORS, Take(-1), Flatten(), Linear("c", None), Sum(4)],
    "inputs of another shape, too": [*VECTORS, Take(-1), Reshape((2, 5)), Linear("c", None), MeanOfPlaces(), Sum(4)],
}


@pytest.mark.parametrize("case", WRONG_VECTORS)
def test_sequences_that_the_kernel_does_not_know(instructions, case):
    shapes = OF_VECTORS | ({"c": torch.Size((3, 10) if "signals" in case else (3, 5))} if "too" in case else {})
    assert Described(VECTORS, OF_VECTORS, (5, 2)).classes == 3
    with pytest.raises(ValueError, match=r"^(model|heads|eps|groups)=.*: takes "):
        Described(WRONG_VECTORS[case], shapes, (5, 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.randn(2, 3, 1, 3, 5).double()}, "inputs=torch.float64"),
        ({"x": torch.randn(2, 3, 1, 3, 6)}, "model=2.weight (4, 24)"),
        ({"x": torch.randn(2, 3, 2, 3, 5)}, "model=0.weight (3, 1, 2, 2)"),
        ({"x": torch.randn(2, 3)}, "inputs=()"),
        ({"x": torch.randn(2, 3, 1, 1, 3, 5)}, "inputs=(1, 1, 3, 5)"),
        ({"x": torch.randn(2, 3, 1, 1, 5)}, "inputs=Signal"),
        ({"x": torch.empty(1, 1, 1, 1, 1).expand(2, 3, 1, 3, 5).to("meta")}, "inputs="),
        ({"targets": torch.zeros(2, 3, 5)}, "targets="),
        ({"targets": torch.zeros(2, 3, 4).long()}, "targets="),
        ({"weights": torch.ones(2, 4)}, "weights="),
        ({"weights": torch.ones(2, 3).double()}, "weights="),
    ],
)
def test_what_does_not_fit_is_refused_by_name(instructions, change, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}.*: takes "):
        ImageGradient.of(**_given(**change))


def test_what_was_described_for_other_examples_is_refused(instructions):
    given = _given()
    network = Described(given["nodes"], given["shapes"], (1, 3, 5))
    with pytest.raises(ValueError, match=r"^inputs=\(2, 3, 1, 5, 3\): takes \[rows, examples, \*\(1, 3, 5\)\]"):
        ImageGradient(network, given["x"].mT, given["targets"], given["weights"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"start": torch.zeros(2, 114)}, "start="),
        ({"into": torch.zeros(2, 116)}, "into="),
        ({"displacement": torch.zeros(3, 115)}, "displacement="),
        ({"order": torch.full((2, 1, 4), 3), "weights": torch.zeros(2, 1, 4)}, "order=3"),
        ({"times": 0}, "times=0"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_what_a_call_cannot_take_is_refused_by_name(instructions, change, says):
    told = {"start": torch.zeros(1, 115), "displacement": None, "into": torch.zeros(2, 115), "scale": 0.0, "step": 1.0}
    ImageGradient.of(**_given()).add(**told)
    with pytest.raises(ValueError, match=f"^{re.escape(says)}.*: takes "):
        ImageGradient.of(**_given()).add(**(told | change))


@pytest.mark.parametrize(("rows", "examples"), [(0, 3), (2, 0), (0, 0)])
def test_no_rows_and_no_examples(instructions, rows, examples):
    x, targets = torch.zeros(rows, examples, 1, 3, 5), torch.zeros(rows, examples, 4)
    gradient = ImageGradient.of(**_given(x=x, targets=targets, weights=torch.zeros(rows, examples)))
    into = torch.full((rows, 115), 2.0)
    gradient.add(torch.zeros(1, 115), None, into, 0.5, 1.0)
    assert torch.equal(into, torch.ones(rows, 115))
