"""Kinds of modules and losses that users bring, and every estimator by plain autograd, task by task."""

import sys
from collections.abc import Callable
from types import MethodType
from unittest import mock

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_norm_by_hook
from torch.nn.utils import weight_norm as weight_norm_by_hook

from fobmaml import TaskBatch
from fobmaml.estimators import FOMAML, IMAML, MAML, Central, Estimator, Forward, Reptile, Symmetric, Tangent
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import GradientDescent

STEPS, LR, LAM, NU, IMAML_LAM = 3, 0.02, 0.5, 0.02, 40.0


class Of(nn.Module):
    """``forward`` is a function of the module, its layers given by name, and the inputs."""

    def __init__(self, function: Callable[["Of", Tensor], Tensor], **layers: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def on_vectors(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def on_signals(*layers: nn.Module) -> nn.Module:
    """[N, 6] as two channels of three, and any number of features behind the layers to three outputs."""
    return nn.Sequential(nn.Unflatten(1, (2, 3)), *layers, nn.Flatten())


def on_images(*layers: nn.Module) -> nn.Module:
    """[N, 6] made an image of 2 x 5 x 4."""
    return nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Unflatten(1, (2, 5, 4)), *layers, nn.Flatten(), nn.LazyLinear(3)
    )


def recurrent(kind: type[nn.RNNBase], size: int = 2, **options: object) -> nn.Module:
    return Of(
        lambda m, x: m.head(m.cells(x.unflatten(1, (3, 2)))[0][:, -1]),
        cells=kind(2, size, batch_first=True, **options),
        head=nn.LazyLinear(3),
    )


def cells(kind: type[nn.RNNCellBase]) -> nn.Module:
    def forward(m: Of, x: Tensor) -> Tensor:
        state = None
        for part in x.unflatten(1, (3, 2)).unbind(1):
            state = m.cell(part, state)
        return m.head(state[0] if isinstance(state, tuple) else state)

    return Of(forward, cell=kind(2, 3), head=nn.Linear(3, 3))


def attention() -> nn.Module:
    return Of(
        lambda m, x: m.head(m.attention(*[x.unflatten(1, (3, 2))] * 3)[0].mean(1)),
        attention=nn.MultiheadAttention(2, 1, batch_first=True),
        head=nn.Linear(2, 3),
    )


def transformer(layers: int = 0, **options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, **options)
    return Of(
        lambda m, x: m.head(m.body(m.into(x.unflatten(1, (3, 2)))).mean(1)),
        into=nn.Linear(2, 4),
        body=nn.TransformerEncoder(layer, layers) if layers else layer,
        head=nn.Linear(4, 3),
    )


def into_zeros(m: Of, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 3, dtype=x.dtype, device=x.device)
    out[:, :2] = m.a(x).tanh()
    out[:, 2:] = m.b(x)
    return out


def by_mask(m: Of, x: Tensor) -> Tensor:
    out = m.a(x)
    out[x[:, 0] > 0] = m.b(x[x[:, 0] > 0])
    return out


def branching(m: Of, x: Tensor) -> Tensor:
    return torch.stack([m.a(row) if row[0] > 0 else m.b(row) for row in x])


def counting(m: Of, x: Tensor) -> Tensor:
    m.count += 1
    return m.a(x)


def keeping(m: Of, x: Tensor) -> Tensor:
    m.h = torch.tanh(m.a(x))
    return m.b(m.h)


def with_buffer(module: nn.Module, **buffers: Tensor) -> nn.Module:
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, x, out: 2.0 * out + 0.3)
    return module


def backward_hooked(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(lambda m, into, out: tuple(g if g is None else 0.5 * g for g in into))
    return module


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def tied() -> nn.Module:
    body = nn.Linear(6, 6)
    return nn.Sequential(body, nn.Tanh(), body, nn.Linear(6, 3))


def on_tokens(embedding: nn.Module) -> nn.Module:
    return nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.LazyLinear(3))


def _two(function: Callable[[Of, Tensor], Tensor]) -> nn.Module:
    return Of(function, a=nn.Linear(6, 3), b=nn.Linear(6, 3))


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 3),
    "mlp": lambda: on_vectors(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "our mlp": lambda: MLP((6,), 3, 4, 2),
    "our cnn": lambda: CNN1d((6,), 3, 3, 2),
    "our mlp, hooked": lambda: hooked(MLP((6,), 3, 4, 1)),
    "our cnn, hooked": lambda: hooked(CNN1d((6,), 3, 3, 1)),
    "our mlp, a layer hooked": lambda: _with(MLP((6,), 3, 4, 1), lambda m: hooked(m.layers[0])),
    "our mlp, another forward": lambda: _with(
        MLP((6,), 3, 4, 1), lambda m: setattr(m, "forward", MethodType(lambda m, x: 2.0 * MLP.forward(m, x), m))
    ),
    "our mlp, another layer": lambda: _with(MLP((6,), 3, 4, 1), lambda m: m.layers.__setitem__(0, Doubled(6, 4))),
    "our mlp, parametrized": lambda: _with(MLP((6,), 3, 4, 1), lambda m: parametrizations.weight_norm(m.layers[0])),
    "bilinear": lambda: Of(lambda m, x: m.a(x[:, :2], x[:, 2:]), a=nn.Bilinear(2, 4, 3)),
    "conv1d": lambda: on_signals(nn.Conv1d(2, 3, 3)),
    "conv1d, padded and strided": lambda: on_signals(
        nn.Conv1d(2, 4, 3, 2, 1, groups=2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)
    ),
    "transposed conv1d": lambda: on_signals(nn.ConvTranspose1d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)),
    "conv2d": lambda: on_images(nn.Conv2d(2, 2, 3, padding=1, dilation=1), nn.SiLU()),
    "conv2d, dilated": lambda: on_images(nn.Conv2d(2, 2, 2, dilation=2), nn.GELU()),
    "max pooling": lambda: on_images(nn.MaxPool2d(2)),
    "average pooling": lambda: on_images(nn.AvgPool2d(2)),
    "adaptive pooling": lambda: on_images(nn.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveMaxPool2d(2)),
    "upsampling": lambda: on_images(nn.Upsample(scale_factor=2), nn.AvgPool2d(3)),
    "group norm": lambda: on_images(nn.GroupNorm(2, 2)),
    "layer norm": lambda: on_vectors(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "rms norm": lambda: on_vectors(nn.Linear(6, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "instance norm": lambda: on_signals(nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(6, 3)),
    "local response norm": lambda: on_images(nn.LocalResponseNorm(2)),
    "batch norm, evaluating": lambda: on_vectors(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).eval(),
    "batch norm, of the set": lambda: on_vectors(
        nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 3)
    ),
    "examples minus their mean": lambda: Of(lambda m, x: m.a(x - x.mean(0)).tanh(), a=nn.Linear(6, 3)),
    "attention among examples": lambda: Of(
        lambda m, x: (m.a(x) @ m.b(x).T).softmax(1) @ m.b(x), a=nn.Linear(6, 3), b=nn.Linear(6, 3)
    ),
    "lstm": lambda: recurrent(nn.LSTM),
    "gru": lambda: recurrent(nn.GRU),
    "rnn": lambda: recurrent(nn.RNN),
    "lstm, two layers, both ways": lambda: recurrent(nn.LSTM, 1, num_layers=2, bidirectional=True),
    "lstm cell": lambda: cells(nn.LSTMCell),
    "gru cell": lambda: cells(nn.GRUCell),
    "rnn cell": lambda: cells(nn.RNNCell),
    "multihead attention": attention,
    "transformer layer": transformer,
    "transformer layer, norm first": lambda: transformer(norm_first=True),
    "transformer, evaluating": lambda: transformer(2).eval(),
    "scaled dot product attention": lambda: Of(
        lambda m, x: F.scaled_dot_product_attention(*m.a(x).view(-1, 3, 3, 1, 2).unbind(1)).flatten(1)[:, :3] + m.b(x),
        a=nn.Linear(6, 18),
        b=nn.Linear(6, 3),
    ),
    "prelu": lambda: on_vectors(nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 3)),
    "glu": lambda: on_vectors(nn.Linear(6, 6), nn.GLU()),
    "dropout of nothing": lambda: on_vectors(nn.Linear(6, 4), nn.Dropout(0.0), nn.Tanh(), nn.Linear(4, 3)),
    "dropout, evaluating": lambda: on_vectors(nn.Linear(6, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).eval(),
    "spectral norm": lambda: on_vectors(parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "spectral norm by a hook": lambda: on_vectors(spectral_norm_by_hook(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "weight norm": lambda: on_vectors(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "weight norm by a hook": lambda: on_vectors(weight_norm_by_hook(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "orthogonal": lambda: on_vectors(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
    "writes into its inputs": lambda: on_vectors(nn.LeakyReLU(0.5, inplace=True), nn.Linear(6, 3)),
    "writes into zeros": lambda: Of(into_zeros, a=nn.Linear(6, 2), b=nn.Linear(6, 1)),
    "boolean mask": lambda: _two(by_mask),
    "branches on data": lambda: _two(branching),
    "item": lambda: Of(
        lambda m, x: m.a(x) * (2.0 if x.shape[0] else 1.0) + m.scale.detach().abs().item() * m.b(x),
        a=nn.Linear(6, 3),
        b=nn.Linear(6, 3),
        scale=nn.Parameter(torch.tensor(1.5)),
    ),
    "a scalar parameter": lambda: Of(
        lambda m, x: m.scale * m.a(x).tanh() + m.scale.exp(), a=nn.Linear(6, 3), scale=nn.Parameter(torch.tensor(0.7))
    ),
    "tied weights": tied,
    "traced by fx": lambda: torch.fx.symbolic_trace(on_vectors(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))),
    "a frozen layer": lambda: frozen(on_vectors(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), "0.weight", "0.bias"),
    "an unused parameter": lambda: Of(lambda m, x: m.a(x), a=nn.Linear(6, 3), b=nn.Linear(2, 2)),
    "counts its calls": lambda: with_buffer(Of(counting, a=nn.Linear(6, 3)), count=torch.zeros((), dtype=torch.long)),
    "keeps its activations": lambda: Of(keeping, a=nn.Linear(6, 4), b=nn.Linear(4, 3)),
    "forward hook": lambda: hooked(nn.Linear(6, 3)),
    "backward hook": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), backward_hooked(nn.Linear(4, 3))),
    "residual": lambda: Of(lambda m, x: m.b(x + m.a(x).tanh()), a=nn.Linear(6, 6), b=nn.Linear(6, 3)),
    "fourier": lambda: Of(
        lambda m, x: m.a(torch.fft.rfft(x).abs().square()) + m.b(x), a=nn.Linear(4, 3), b=nn.Linear(6, 3)
    ),
    "einsum and cumsum": lambda: Of(
        lambda m, x: torch.einsum("ni,ij->nj", x.cumsum(1), m.w).tanh(), w=nn.Parameter(torch.randn(6, 3))
    ),
    "a dictionary of layers": lambda: Of(
        lambda m, x: m.d["a"](x) + m.l[0] * m.d["b"](x),
        d=nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)}),
        l=nn.ParameterList([torch.randn(3)]),
    ),
}
TOKENS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: on_tokens(nn.Embedding(11, 2)),
    "embedding with padding": lambda: on_tokens(nn.Embedding(11, 2, padding_idx=0)),
    "sparse embedding": lambda: on_tokens(nn.Embedding(11, 2, sparse=True)),
    "embedding, scaled by frequency": lambda: on_tokens(nn.Embedding(11, 2, scale_grad_by_freq=True)),
    "embedding bag": lambda: on_tokens(nn.EmbeddingBag(11, 4)),  # torch: a first derivative only
    "embedding bag with padding": lambda: on_tokens(nn.EmbeddingBag(11, 4, mode="sum", padding_idx=0)),
    "tokens through a gru": lambda: Of(
        lambda m, x: m.head(m.cells(m.table(x))[0][:, -1]),
        table=nn.Embedding(11, 2),
        cells=nn.GRU(2, 3, batch_first=True),
        head=nn.Linear(3, 3),
    ),
}


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """As defined. The second derivative of torch's own is not symmetric."""
    return v / torch.linalg.vector_norm(v, dim=1 - dim, keepdim=True) * g


FIRST_DERIVATIVES_ONLY = {
    "embedding bag": "torch has none",
    "embedding bag with padding": "torch has none",
    "multi_margin_loss": "torch has none",
    "embedding, scaled by frequency": "is not symmetric",
}
"""Cases whose second derivatives are refused, with what is said."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def _with(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _labels(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def _some_ignored(*shape: int) -> Tensor:
    labels = torch.randint(3, shape)
    labels[:, 0] = 1  # no set without any
    labels[:, 1] = -100
    return labels


def _shares(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).softmax(-1)


def _weighted_by_item(o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o, y) * (2.0 if y.mean().item() > 0 else 0.5)


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[..., Tensor]]] = {
    "cross_entropy": (F.cross_entropy, _labels),
    "cross_entropy, ignoring": (F.cross_entropy, _some_ignored),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), _labels),
    "CrossEntropyLoss, ignoring": (nn.CrossEntropyLoss(ignore_index=1), lambda *s: _some_ignored(*s).clamp(0)),
    "CrossEntropyLoss, weighted": (nn.CrossEntropyLoss(WEIGHT), _some_ignored),
    "CrossEntropyLoss, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), _some_ignored),
    "CrossEntropyLoss, both": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), _labels),
    "CrossEntropyLoss, summed": (nn.CrossEntropyLoss(reduction="sum"), _labels),
    "CrossEntropyLoss, of shares": (nn.CrossEntropyLoss(), lambda *s: _shares(*s, 3)),
    "a function of cross_entropy": (lambda o, y: F.cross_entropy(o, y), _some_ignored),
    "nll_loss": (lambda o, y: F.nll_loss(o.log_softmax(-1), y), _labels),
    "multi_margin_loss": (F.multi_margin_loss, _labels),
    "mse_loss": (F.mse_loss, lambda *s: _numbers(*s, 3)),
    "l1_loss": (F.l1_loss, lambda *s: _numbers(*s, 3)),
    "huber_loss": (F.huber_loss, lambda *s: _numbers(*s, 3)),
    "SmoothL1Loss": (nn.SmoothL1Loss(), lambda *s: _numbers(*s, 3)),
    "binary_cross_entropy_with_logits": (
        F.binary_cross_entropy_with_logits,
        lambda *s: torch.randint(2, (*s, 3)).double(),
    ),
    "gaussian_nll_loss": (lambda o, y: F.gaussian_nll_loss(o[:, 0], y, o[:, 1].exp()), _numbers),
    "poisson_nll_loss": (F.poisson_nll_loss, lambda *s: torch.randint(4, (*s, 3)).double()),
    "kl_div": (lambda o, y: F.kl_div(o.log_softmax(-1), y, reduction="batchmean"), lambda *s: _shares(*s, 3)),
    "mse_loss of one output": (lambda o, y: (o[:, :1] - y).square().mean(0), lambda *s: _numbers(*s, 1)),
    "weighted by item": (_weighted_by_item, lambda *s: _numbers(*s, 3)),
    "contrastive": (
        lambda o, y: F.cross_entropy(o @ o.T / 3, torch.arange(len(o))) + F.mse_loss(o, y),
        lambda *s: _numbers(*s, 3),
    ),
}


def vectors(*shape: int) -> Tensor:
    return _numbers(*shape, 6)


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, (*shape, 5))


CASES = {
    **{name: (make, vectors) for name, make in VECTORS.items()},
    **{name: (make, tokens) for name, make in TOKENS.items()},
}
"""Every kind of module, and the inputs that it takes."""


def tasks(
    x: Callable[..., Tensor], y: Callable[..., Tensor], count: int = 3, support: int = 4, query: int = 5
) -> TaskBatch:
    return TaskBatch(x(count, support), y(count, support), x(count, query), y(count, query))


def made(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    """The module in float64, its lazy layers called once."""
    model = make().double()
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        model(x)
    return model


SOLVER = GradientDescent(STEPS, LR)
ESTIMATORS: dict[str, Estimator] = {
    "forward": Forward(SOLVER, LAM, NU),
    "symmetric": Symmetric(SOLVER, LAM, NU),
    "central4": Central(SOLVER, LAM, NU),
    "maml": MAML(SOLVER),
    "maml, checkpointed": MAML(SOLVER, LAM, checkpoint=True),
    "fomaml": FOMAML(SOLVER, LAM),
    "reptile": Reptile(SOLVER, LAM, data="support"),
    "imaml": IMAML(SOLVER, IMAML_LAM, cg_steps=400, cg_tol=1e-13),
    "tangent": Tangent(SOLVER, LAM, way="products"),
    "tangent, by differences": Tangent(SOLVER, LAM, way="differences"),
}
SECOND_DERIVATIVES = ("maml", "maml, checkpointed", "imaml", "tangent")
TOLERANCE = dict.fromkeys(ESTIMATORS, 1e-9) | {"tangent, by differences": 1e-6}


class Plain:
    """The estimators by plain autograd on the module itself, its parameters exchanged one task at a time."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], batch: TaskBatch):
        self.model, self.loss_fn, self.batch = model, loss_fn, batch
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.state = {name: b.clone() for name, b in model.named_buffers()}

    def theta(self) -> list[Tensor]:
        return [self.model.get_parameter(name).detach().clone() for name in self.names]

    def loss(self, phi: list[Tensor], task: int, part: str) -> Tensor:
        """Of parameters that may have a history; the module's buffers are those that it came with."""
        x, y = getattr(self.batch, f"{part}_x")[task].clone(), getattr(self.batch, f"{part}_y")[task]
        buffers = {name: b.clone() for name, b in self.state.items()}
        given = dict(zip(self.names, phi, strict=True))
        before = [(m, dict(m._parameters)) for m in self.model.modules()]
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            mock.patch.object(torch, "_weight_norm", weight_norm),
            mock.patch.object(sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", weight_norm),
        ):
            outputs = torch.func.functional_call(self.model, {**buffers, **given}, (x,))
        for module, parameters in before:  # of a layer that stands in two places, it forgets one
            module._parameters.update(parameters)
        return self.loss_fn(outputs, y).reshape(())

    def adapt(self, task: int, lam: float, nu: float = 0.0, history: list[Tensor] | None = None) -> list[Tensor]:
        """K steps; with ``history``, parameters whose graph the result is to belong to."""
        theta = history or [p.requires_grad_() for p in self.theta()]
        phi = theta
        for _ in range(STEPS):
            loss = self.loss(phi, task, "support")
            if nu:
                loss = loss + nu * self.loss(phi, task, "query")
            g = torch.autograd.grad(loss, phi, create_graph=history is not None, materialize_grads=True)
            g = [part.to_dense() if part.is_sparse else part for part in g]
            phi = [p - LR * (gp + lam * (p - t)) for p, gp, t in zip(phi, g, theta, strict=True)]
            if history is None:
                phi = [p.detach().requires_grad_() for p in phi]
        return phi

    def tangent(self, task: int) -> Tensor:
        """−λ dφ_K/dν at ν = 0, by the derivative of each step."""
        theta = self.theta()
        phi, u = theta, [torch.zeros_like(p) for p in theta]
        for _ in range(STEPS):
            phi = [p.detach().requires_grad_() for p in phi]
            g = torch.autograd.grad(self.loss(phi, task, "support"), phi, create_graph=True, materialize_grads=True)
            g = [part.to_dense() if part.is_sparse else part for part in g]
            along = sum((gp * up).sum() for gp, up in zip(g, u, strict=True))
            hu = [torch.zeros_like(p) for p in phi]
            if along.requires_grad:
                hu = torch.autograd.grad(along, phi, materialize_grads=True)
            query = torch.autograd.grad(self.loss(phi, task, "query"), phi, materialize_grads=True)
            u = [up - LR * (hp.to_dense() + LAM * up + q.to_dense()) for up, hp, q in zip(u, hu, query, strict=True)]
            phi = [p - LR * (gp + LAM * (p - t)) for p, gp, t in zip(phi, g, theta, strict=True)]
        return self.flat([-LAM * up for up in u])

    def flat(self, parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        return torch.cat([p.to_dense().reshape(-1) for p in parts]).detach()

    def query_gradient(self, phi: list[Tensor], task: int) -> Tensor:
        g = torch.autograd.grad(self.loss(phi, task, "query"), phi, materialize_grads=True)
        return self.flat(g)

    def estimate(self, name: str, task: int) -> Tensor:
        theta = self.flat(self.theta())
        stencil = {
            "forward": {1: 1.0, 0: -1.0},
            "symmetric": {1: 0.5, -1: -0.5},
            "central4": {1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12},
        }
        stencil["tangent, by differences"] = stencil["central4"]  # at a small ν: what has first derivatives only
        if name in stencil:
            nu = 1e-3 if name.startswith("tangent") else NU
            return -LAM / nu * sum(w * self.flat(self.adapt(task, LAM, o * nu)) for o, w in stencil[name].items())
        if name.startswith("maml"):
            history = [p.requires_grad_() for p in self.theta()]
            phi = self.adapt(task, LAM if "," in name else 0.0, history=history)
            return self.flat(torch.autograd.grad(self.loss(phi, task, "query"), history, materialize_grads=True))
        if name == "fomaml":
            return self.query_gradient(self.adapt(task, LAM), task)
        if name == "tangent":
            return self.tangent(task)
        if name == "reptile":
            return theta - self.flat(self.adapt(task, LAM))
        phi = self.adapt(task, IMAML_LAM)
        g = torch.autograd.grad(self.loss(phi, task, "support"), phi, create_graph=True, materialize_grads=True)
        g = [part.to_dense() for part in g]
        columns = []
        for entry in torch.cat([p.reshape(-1) for p in g]):
            column = [torch.zeros_like(p) for p in phi]
            if entry.requires_grad:
                column = torch.autograd.grad(entry, phi, retain_graph=True, materialize_grads=True)
            columns.append(self.flat(column))
        hessian = torch.stack(columns)
        if (hessian - hessian.T).norm() > 1e-10 * hessian.norm():
            raise AssertionError("this Hessian is none")
        system = hessian + IMAML_LAM * torch.eye(len(theta), dtype=theta.dtype)
        return IMAML_LAM * torch.linalg.solve(system, self.query_gradient(phi, task))
