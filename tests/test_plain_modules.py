"""Plain modules become nodes, and the engines by hand compute what autograd does on the module itself."""

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fobmaml import Learner, TaskBatch
from fobmaml.engine import library
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
    Pool,
    Reshape,
    RMSNorm,
    Shift,
    Sum,
    Take,
    as_module,
)
from fobmaml.engine.trial import Trial
from fobmaml.estimators import FOMAML, IMAML, MAML, Symmetric, estimate
from fobmaml.solvers import GradientDescent

KERNELS = ("fused", "images")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Of(nn.Module):
    """A forward in one line, of layers by name."""

    def __init__(self, call, **layers):
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.call(self, x)


def _nodes(model, *shape):
    """The nodes, and why there are none."""
    trial = Trial(Learner(model, F.cross_entropy), "auto")
    return trial.nodes(torch.randn(2, 3, *shape)), trial.untraced


def _line(**options):
    return nn.Conv1d(1, 4, 3, **options), nn.Linear(4 * 8, 5)


CONV = Conv("a.weight", "a.bias", (1, 1), (0, 1), (1, 1), 1)
ENDS = [Flatten(), Linear("b.weight", "b.bias")]
WAYS = {
    "unsqueeze": lambda m, x: m.b(m.a(x.unsqueeze(1)).flatten(1)),
    "index": lambda m, x: m.b(m.a(x[:, None]).reshape(len(x), -1)),
    "view": lambda m, x: m.b(m.a(x.view(x.shape[0], 1, -1)).view(x.size(0), 32)),
    "back and forth": lambda m, x: m.b(m.a(x.view(-1, 2, 4).flatten(1).unsqueeze(-2)).contiguous().flatten(1)),
    "functions": lambda m, x: F.linear(
        F.conv1d(x[:, None], m.a.weight, m.a.bias, padding=1).flatten(1), m.b.weight, m.b.bias
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_written(way):
    a, b = _line(padding=1)
    assert _nodes(Of(WAYS[way], a=a, b=b), 8) == ([Reshape((1, 8)), CONV, *ENDS], "")


def test_images():
    model = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), (1, 2), bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 1, 1),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),
        nn.GELU(),
        nn.AvgPool2d((2, 1)),
        nn.GroupNorm(4, 4, affine=False, eps=1e-3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    nodes, why = _nodes(model, 2, 9, 8)
    assert why == ""
    assert nodes == [
        Conv("0.weight", None, (2, 1), (1, 0), (1, 2), 1),
        GroupNorm(2, "1.weight", "1.bias", 1e-5),
        Activate("relu"),
        Pool("max", (2, 2), (1, 1), (1, 1)),
        Conv("4.weight", "4.bias", (1, 1), (1, 1), (1, 1), 2),
        Activate("gelu"),
        Pool("average", (2, 1), (2, 1), (0, 0)),
        GroupNorm(4, None, None, 1e-3),
        Pool("average", (3, 7), (3, 7), (0, 0)),
        Flatten(),
        Linear("10.weight", "10.bias"),
    ]
    x = torch.randn(3, 2, 9, 8)
    torch.testing.assert_close(as_module(nodes)(dict(model.named_parameters()), x), model(x))


def test_what_writes_in_place_or_is_not_used_is_known_too():
    def call(m, x):
        h = torch.tanh_(m.a(x))
        h.mean(), m.b(h).sum(0)
        out = m.b(h)
        seen = out.view(-1, 5, 1)
        out.relu_()
        return seen.flatten(1)

    model = nn.Sequential(nn.ReLU(inplace=True), Of(call, a=nn.Linear(8, 6), b=nn.Linear(6, 5)))
    trial = Trial(Learner(model, F.cross_entropy), "auto")
    found = trial.nodes(torch.randn(2, 3, 8))
    assert found is not None, trial.untraced
    assert [type(node) for node in found] == [Activate, Linear, Activate, Linear, Activate]
    assert [node.activation for node in found if isinstance(node, Activate)] == ["relu", "tanh", "relu"]


@pytest.mark.parametrize(
    ("layer", "node"),
    [
        (nn.MaxPool1d(2), Pool("max", (1, 2), (1, 2), (0, 0))),
        (nn.AvgPool1d(3, 2, 1), Pool("average", (1, 3), (1, 2), (0, 1))),
        (nn.AdaptiveAvgPool1d(2), Pool("average", (1, 4), (1, 4), (0, 0))),
        (Of(lambda m, x: x.mean(-1)), Pool("average", (1, 8), (1, 8), (0, 0))),
    ],
)
def test_pools_of_sequences_have_height_1(layer, node):
    nodes, why = _nodes(nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3, padding=1), layer, nn.Flatten()), 8)
    assert why == ""
    assert [part for part in nodes if isinstance(part, Pool)] == [node]


def _written_through_a_view(h):
    h.view(-1).relu_()
    return h


def _attended(qkv, order=(0, 1, 2), **options):
    """By one head, of queries, keys and values that lie beside each other."""
    parts = qkv.unflatten(-1, (3, 1, -1)).unbind(-3)
    return F.scaled_dot_product_attention(*(parts[i].transpose(1, 2) for i in order), **options).flatten(1)


def _by_root(x):
    return x / torch.sqrt((x * x).mean(1, keepdim=True) + 0.125)


def _ones(count):
    return nn.Parameter(torch.ones(count))


def _eights():
    return nn.Linear(8, 8)


def _bare():
    return nn.RMSNorm(8, elementwise_affine=False)


GRAPHS = {
    "a sum with the inputs": (
        Of(lambda m, x: m.b(x + m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 5)),
        [Linear("a.weight", "a.bias"), Sum(-1), Linear("b.weight", "b.bias")],
    ),
    "two ways": (
        Of(lambda m, x: (m.a(x).tanh() + m.b(x)).relu(), a=nn.Linear(8, 5), b=nn.Linear(8, 5)),
        [
            Linear("a.weight", "a.bias"),
            Activate("tanh"),
            Take(-1),
            Linear("b.weight", "b.bias"),
            Sum(1),
            Activate("relu"),
        ],
    ),
    "written in place": (
        Of(lambda m, x: m.a(x).add_(x), a=nn.Linear(8, 8)),
        [Linear("a.weight", "a.bias"), Sum(-1)],
    ),
    "written through a view": (
        Of(lambda m, x: _written_through_a_view(m.a(x)), a=nn.Linear(8, 8)),
        [Linear("a.weight", "a.bias"), Activate("relu")],
    ),
    "images": (
        Of(
            lambda m, x: m.c((m.a(x.view(-1, 1, 2, 4)) + m.b(x.view(-1, 1, 2, 4))).mean((2, 3))),
            a=nn.Conv2d(1, 3, 3, padding=1),
            b=nn.Conv2d(1, 3, 1),
            c=nn.Linear(3, 5),
        ),
        [
            Reshape((1, 2, 4)),
            Conv("a.weight", "a.bias", (1, 1), (1, 1), (1, 1), 1),
            Take(-1),
            Reshape((1, 2, 4)),
            Conv("b.weight", "b.bias", (1, 1), (0, 0), (1, 1), 1),
            Sum(1),
            Pool("average", (2, 4), (2, 4), (0, 0)),
            Flatten(),
            Linear("c.weight", "c.bias"),
        ],
    ),
    "a sequence": (
        Of(
            lambda m, x: m.c(F.gelu(m.b(m.a(x.unsqueeze(-1)) + m.places)).mean(1)),
            a=nn.Linear(1, 3),
            b=nn.LayerNorm(3, bias=False),
            c=nn.Linear(3, 5),
            places=nn.Parameter(torch.ones(8, 3)),
        ),
        [
            Reshape((8, 1)),
            Linear("a.weight", "a.bias"),
            Shift("places"),
            LayerNorm("b.weight", None, 1e-5),
            Activate("gelu"),
            MeanOfPlaces(),
            Linear("c.weight", "c.bias"),
        ],
    ),
    "torch's attention, whose sequences lie across": (
        Of(
            lambda m, x: m.b(m.a(*[x.view(-1, 2, 4)] * 3, need_weights=False)[0].flatten(1)),
            a=nn.MultiheadAttention(4, 2, batch_first=True),
            b=nn.Linear(8, 5),
        ),
        [
            Reshape((2, 4)),
            Linear("a.in_proj_weight", "a.in_proj_bias"),
            Attention(2),
            Linear("a.out_proj.weight", "a.out_proj.bias"),
            Flatten(),
            Linear("b.weight", "b.bias"),
        ],
    ),
    "norms by the root of the mean square": (
        Of(
            lambda m, x: m.d(m.w * _by_root(m.c(m.b(m.a(x.view(-1, 4, 2))).mT.mT).flatten(1))),
            a=nn.Linear(2, 3),
            b=nn.RMSNorm(3, eps=0.25),
            c=nn.RMSNorm(3, eps=0.5, elementwise_affine=False),
            d=nn.Linear(12, 5),
            w=nn.Parameter(torch.arange(12.0)),
        ),
        [
            Reshape((4, 2)),
            Linear("a.weight", "a.bias"),
            RMSNorm("b.weight", 0.25),
            RMSNorm(None, 0.5),
            Flatten(),
            RMSNorm("w", 0.125),
            Linear("d.weight", "d.bias"),
        ],
    ),
    "attention": (
        Of(lambda m, x: _attended(m.a(x.view(-1, 4, 2))), a=nn.Linear(2, 6, bias=False)),
        [Reshape((4, 2)), Linear("a.weight", None), Attention(1), Flatten()],
    ),
}


def test_words():
    model = nn.Sequential(nn.Embedding(9, 4), Of(lambda m, x: x.mean(1)), nn.Linear(4, 5))
    wanted = [Embedding("0.weight"), MeanOfPlaces(), Linear("2.weight", "2.bias")]
    x = torch.randint(9, (2, 3, 6))
    assert Trial(Learner(model, F.cross_entropy), "auto").nodes(x) == wanted
    padded = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), *model[1:])
    trial = Trial(Learner(padded, F.cross_entropy), "auto")
    assert trial.nodes(x) is None
    assert trial.untraced == "Embedding '0' (aten.embedding.default)"


@pytest.mark.parametrize("case", GRAPHS)
def test_what_is_used_twice_and_what_sequences_take(case):
    model, nodes = GRAPHS[case]
    assert _nodes(model, 8) == (nodes, "")
    x = torch.randn(5, 8)
    torch.testing.assert_close(as_module(nodes)(dict(model.named_parameters()), x), model(x))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return F.silu(x)

    @staticmethod
    def backward(context, g):
        return -g


def _constant(layer, x):
    with torch.no_grad():
        return layer(x)


def _frozen():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 5))
    model[0].bias.requires_grad_(False)
    return model


def _tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def _hooked():
    model = nn.Sequential(nn.Linear(8, 5))
    model[0].register_forward_hook(lambda *_: None)
    return model


UNKNOWN = {
    "a layer": (nn.Sequential(nn.Linear(8, 8), nn.CELU()), "CELU '1' (aten.celu.default)"),
    "a factor": (Of(lambda m, x: 2 * m.a(x), a=nn.Linear(8, 8)), "Of '' (aten.mul.Tensor)"),
    "an activation's setting": (
        nn.Sequential(nn.Linear(8, 8), nn.Softplus(2.0)),
        "Softplus '1' (aten.softplus.default)",
    ),
    "other padding": (
        nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")),
        "Conv1d '1' (aten.copy_.default)",
    ),
    "norms of two axes": (
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.LayerNorm((2, 4)), nn.Flatten(), nn.Linear(8, 2)),
        "LayerNorm '1' (aten.native_layer_norm.default)",
    ),
    "sums of others' places": (
        Of(lambda m, x: (m.a(x.view(-1, 4, 2)) + m.a(x.view(-1, 4, 2)).transpose(1, 2)).flatten(1), a=nn.Linear(2, 4)),
        "Linear 'a' (aten.addmm.default)",
    ),
    "twice itself": (Of(lambda m, x: m.a(x + x), a=nn.Linear(8, 8)), "Of '' (aten.add.Tensor)"),
    "a gain without a norm": (Of(lambda m, x: m.a(x * m.w), a=nn.Linear(8, 8), w=_ones(8)), "Of '' (aten.mul.Tensor)"),
    "a gain of one number": (
        Of(lambda m, x: m.a(m.b(x) * m.w), a=nn.Linear(8, 8), b=_bare(), w=_ones(1)),
        "Of '' (aten.mul.Tensor)",
    ),
    "two gains": (
        Of(lambda m, x: m.a(m.b(x) * m.w), a=nn.Linear(8, 8), b=nn.RMSNorm(8), w=_ones(8)),
        "Of '' (aten.mul.Tensor)",
    ),
    "a gain of what is used twice": (
        Of(lambda m, x: m.a((y := m.b(x)) * m.w + y), a=nn.Linear(8, 8), b=_bare(), w=_ones(8)),
        "Of '' (aten.mul.Tensor)",
    ),
    "another's mean square": (
        Of(lambda m, x: m.a(m.b(x) * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()), a=_eights(), b=_eights()),
        "Of '' (aten.mul.Tensor)",
    ),
    "a mean square alone": (
        Of(lambda m, x: m.a(x.square().mean(-1, keepdim=True) + 0.1), a=nn.Linear(1, 8)),
        "Linear 'a' (aten.addmm.default)",
    ),
    "a mean square used besides": (
        Of(
            lambda m, x: m.a(x * (r := (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()) + r),
            a=nn.Linear(8, 8),
        ),
        "Of '' (aten.add.Tensor)",
    ),
    "mean cubes": (
        Of(lambda m, x: m.a(x * (x.pow(3).mean(-1, keepdim=True) + 0.1).rsqrt()), a=_eights()),
        "Of '' (aten.pow.Tensor_Scalar)",
    ),
    "mean squares of examples": (
        Of(lambda m, x: m.a(x * (x.square().mean(0, keepdim=True) + 0.1).rsqrt()), a=_eights()),
        "Of '' (aten.mean.dim)",
    ),
    "an eps of each type": (
        Of(lambda m, x: F.layer_norm(m.a(x), (8,), eps=0.5 if x.dtype == torch.float32 else 0.25), a=_eights()),
        "other operations in torch.float32 than in float64",
    ),
    "an activation of each type": (
        Of(lambda m, x: m.a(F.silu(x) if x.dtype == torch.float32 else x.tanh()), a=_eights()),
        "other operations in torch.float32 than in float64",
    ),
    "a number added": (Of(lambda m, x: m.a(x + 1.0), a=nn.Linear(8, 8)), "Of '' (aten.add.Tensor)"),
    "numbers of other examples": (
        Of(lambda m, x: m.a(x.t().reshape(x.shape)), a=nn.Linear(8, 8)),
        "Linear 'a' (aten.addmm.default)",
    ),
    "a part of the numbers": (Of(lambda m, x: m.a(x[:, 4:].tanh()), a=nn.Linear(4, 8)), "Of '' (aten.tanh.default)"),
    "a part of a parameter": (
        Of(lambda m, x: m.b(m.a(x) + m.w[:5]), a=nn.Linear(8, 5), b=nn.Linear(5, 5), w=nn.Parameter(torch.ones(6))),
        "Of '' (aten.add.Tensor)",
    ),
    "masked attention": (
        Of(lambda m, x: _attended(m.a(x.view(-1, 4, 2)), is_causal=True), a=nn.Linear(2, 6)),
        "Of '' (aten._scaled_dot_product_flash_attention_for_cpu.default)",
    ),
    "attention of keys by keys": (
        Of(lambda m, x: _attended(m.a(x.view(-1, 4, 2)), order=(1, 1, 2)), a=nn.Linear(2, 6)),
        "Of '' (aten._scaled_dot_product_flash_attention_for_cpu.default)",
    ),
    "frozen": (_frozen(), "Linear '0' ("),
    "tied": (_tied(), "Linear '2' ("),
    "hooked": (_hooked(), "Linear '0' has hooks"),
    "unused": (Of(lambda m, x: m.a(x), a=nn.Linear(8, 8), b=nn.Linear(2, 2)), "parameter 'b.weight' is not used"),
    "its own backward": (Of(lambda m, x: Reversed.apply(m.a(x)), a=nn.Linear(8, 8)), ""),
    "a constant": (
        Of(lambda m, x: m.b(_constant(m.a, x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        "One of the differentiated|a forward or backward that",
    ),
    "no backward": (
        Of(lambda m, x: m.b(m.a(x).detach()), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        "Of '' (aten.detach.default)",
    ),
    "a question": (
        Of(lambda m, x: m.a(x) if m.a(x).sum() > 0 else m.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        "Of '' (aten._local_scalar_dense.default)",
    ),
    "numbers as Python's": (
        Of(lambda m, x: m.a(x) if x.tolist()[0][0] > 0 else m.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        "",
    ),
    "numbers as NumPy's": (Of(lambda m, x: m.a(x * float(x.detach().numpy().max())), a=nn.Linear(8, 8)), ""),
    "writing into its own": (
        Of(lambda m, x: m.b(torch.empty(len(x), 8, dtype=x.dtype).copy_(m.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        "Of '' (aten.copy.default)",
    ),
    "the whole set": (Of(lambda m, x: m.a(x).view(-1, 4), a=nn.Linear(8, 8)), "the module (output)"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_not_traced(case):
    model, why = UNKNOWN[case]
    nodes, said = _nodes(model, 8)
    assert nodes is None
    assert said.startswith(tuple(why.split("|"))), said


def _random(choose):
    """A sequence of layers as a user writes it, the shape of its examples, and whether the kernel takes it."""

    def size(low, high):
        return int(choose.integers(low, high + 1))

    channels, length = size(1, 3), size(6, 30)
    shape = [(channels, length), (channels * length,), (length,)][size(0, 2)]
    kinds = [nn.SiLU, nn.SiLU, nn.Tanh, nn.Softplus, nn.GELU]
    same = bool(size(0, 1))
    layers = [] if len(shape) == 2 else [nn.Unflatten(1, (-1, length))]
    channels = channels if len(shape) == 2 else shape[0] // length
    for _ in range(size(0, 3)):
        out, places, stride, padding = size(1, 7), size(1, 5), size(1, 3), 1 if same else size(0, 4)
        if length + 2 * padding < places:
            break
        layers.append(nn.Conv1d(channels, out, places, stride, padding, bias=same or bool(size(0, 1))))
        length, channels = (length + 2 * padding - places) // stride + 1, out
        layers.append(nn.SiLU() if same else kinds[size(0, 4)]())
    layers.append(nn.Flatten())
    values = channels * length
    for _ in range(size(0, 2)):
        out = size(1, 9)
        layers += [nn.Linear(values, out, same or bool(size(0, 1))), nn.SiLU() if same else kinds[size(0, 4)]()]
        values = out
    layers.append(nn.Linear(values, 5))
    return nn.Sequential(*layers), shape, same


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences_equal_autograd_on_the_module(seed):
    choose = np.random.default_rng(seed)
    model, shape, known = _random(choose)
    support, query, count = 4, 3, 2
    batch = TaskBatch(
        torch.randn(count, support, *shape),
        torch.randint(5, (count, support)),
        torch.randn(count, query, *shape),
        torch.randint(5, (count, query)),
    )
    solver = GradientDescent(3, 0.1, momentum=(0.0, 0.5)[seed % 2])
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model, tasks = model.to(dtype), batch.to(dtype=dtype)
        plain = Learner(model, F.cross_entropy, "loop")
        for estimator in (Symmetric(solver, 0.5), MAML(solver), IMAML(solver, 0.5), FOMAML(solver)):
            learner = Learner(model, F.cross_entropy)
            found, wanted = (estimate(estimator, ours, ours.theta(), tasks).gradient for ours in (learner, plain))
            assert (found - wanted).norm() <= tol * wanted.norm(), (model, dtype)
            assert {*learner.used.split("+")} <= {"stacked", *(f"{n}-{library.instructions()}" for n in KERNELS)}
            if known and dtype == torch.float32 and library.kernel() is not None:
                assert learner.used == f"fused-{library.instructions()}"


def test_a_weight_that_is_no_layers_own_is_read_by_torch():
    """A row has it in the module's order, which ``fused.c`` does not read."""
    model = Of(
        lambda m, x: m.b(F.silu(F.conv1d(x.view(-1, 2, 4), m.w, m.a.bias, padding=1)).flatten(1)),
        a=nn.Linear(2, 4),
        b=nn.Linear(16, 5),
    )
    del model.a.weight
    model.a.weight = None
    model.w = nn.Parameter(torch.randn(4, 2, 3))
    x, y = torch.randn(2, 6, 8), torch.randint(5, (2, 6))
    rows = []
    for engine in ("auto", "stacked", "loop"):
        learner = Learner(model, F.cross_entropy, engine)
        rows.append(learner.engine_for(x, learner.row_loss(y)).gradient(learner.theta().expand(2, -1)))
        assert not learner.used.startswith("fused")
    torch.testing.assert_close(rows[0], rows[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows[1], rows[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "embedding", "convolutions with group norm"])
def test_the_loop_that_we_are_compared_with_computes_the_same(name):
    assert float(networks.measured(name, 1)["relative_difference"]) < 1e-2  # of differences, in float32
