"""The networks: what they compute by other means, what they take, and every estimator on them by plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from module_cases import ESTIMATORS, LOSSES, TOLERANCE, Plain, tasks
from torch import Tensor, nn

import fobmaml
from fobmaml.models import GRU, Conv4, ResNet12, Transformer


def _numbers(*shape: int):
    return lambda *examples: torch.randn(*examples, *shape, dtype=torch.float64)


def _tokens(*examples: int) -> Tensor:
    return torch.randint(7, (*examples, 4))


NETWORKS = {
    "conv4": (lambda: Conv4((2, 2, 3), 3, width=2, depth=1), _numbers(2, 2, 3)),
    "conv4, relu": (lambda: Conv4((1, 4, 4), 3, width=1, depth=2, activation="relu"), _numbers(1, 4, 4)),
    "resnet12": (lambda: ResNet12((1, 3, 2), 3, width=2, depth=1), _numbers(1, 3, 2)),
    "transformer, values": (lambda: Transformer((4,), 3, width=2, depth=1, heads=1), _numbers(4)),
    "transformer, vectors": (lambda: Transformer((3, 2), 3, width=4, depth=1, heads=2), _numbers(3, 2)),
    "transformer, tokens": (
        lambda: Transformer((4,), 3, width=2, depth=1, heads=1, readout="token", tokens=7),
        _tokens,
    ),
    "gru, values": (lambda: GRU((4,), 3, width=2, depth=2), _numbers(4)),
    "gru, vectors": (lambda: GRU((4, 2), 3, width=2), _numbers(4, 2)),
    "gru, tokens": (lambda: GRU((4,), 3, width=2, tokens=7), _tokens),
}


@pytest.mark.parametrize("engine", ["auto", *(pytest.param(e, marks=pytest.mark.slow) for e in ("loop", "autograd"))])
@pytest.mark.parametrize("case", NETWORKS)
def test_every_estimator_is_plain_autograd(case, engine):
    if engine != "auto" and case.startswith("gru"):
        pytest.skip("torch.func.vmap has no rule for torch's recurrent layers: auto is the loop")
    torch.manual_seed(0)
    make, x = NETWORKS[case]
    batch, model = tasks(x, LOSSES["cross_entropy"][1], count=1), make().double()
    plain = Plain(model, F.cross_entropy, batch)
    for name, estimator in ESTIMATORS.items():
        wanted = plain.estimate(name, 0)
        found = fobmaml.meta_gradient(estimator, model, F.cross_entropy, batch, engine=engine)
        flat = torch.cat([g.flatten() for g in found.gradient.values()])
        error = float((flat - wanted).norm() / wanted.norm())
        assert error < TOLERANCE[name], f"{name}, {found.engine}: {error}"


@pytest.mark.parametrize(("shape", "left"), [((1, 28, 28), 1), ((3, 84, 84), 25)])
def test_conv4_has_the_literatures_size(shape, left):
    model = Conv4(shape, 5, width=64)
    convolutions = 9 * 64 * (shape[0] + 3 * 64) + 4 * 64
    assert sum(p.numel() for p in model.parameters()) == convolutions + 4 * 2 * 64 + 5 * (64 * left + 1)
    assert model(torch.randn(2, *shape)).shape == (2, 5)


def test_resnet12_has_the_literatures_size():
    model = ResNet12((3, 84, 84), 5, width=64)
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [k.shape[0] for k in kernels] == [64] * 3 + [160] * 3 + [320] * 3 + [640] * 3
    assert 12.4e6 < sum(p.numel() for p in model.parameters()) < 12.5e6  # as in arXiv:1904.03758's code
    assert ResNet12((1, 28, 28), 5, width=4)(torch.randn(2, 1, 28, 28)).shape == (2, 5)


def test_a_block_is_torchs_encoder_layer():
    """The same parameters in ``nn.TransformerEncoderLayer(norm_first=True)``."""
    torch.manual_seed(0)
    model = Transformer((6, 3), 4, width=8, depth=1, heads=2).double()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True).double()
    ours = model.blocks[0].state_dict()
    names = {"attention_norm": "norm1", "mlp_norm": "norm2", "into.": "self_attn.in_proj_", "out": "self_attn.out_proj"}
    names |= {"mlp.0": "linear1", "mlp.2": "linear2"}
    renamed = {}
    for name, value in ours.items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        renamed[names[prefix] + name.removeprefix(prefix)] = value
    theirs.load_state_dict(renamed)
    x = torch.randn(3, 5, 3, dtype=torch.float64)  # shorter than what it is made for
    h = theirs(model.into(x) + model.places[:5])
    assert torch.allclose(model(x), model.head(model.norm(h).mean(1)), rtol=1e-12)


def test_the_class_token_sees_the_sequence():
    model = Transformer((6,), 4, width=8, readout="token")
    x = torch.randn(3, 6)
    assert not torch.allclose(model(x), model(x.flip(1)))  # places are told apart, too
    assert not torch.allclose(model(x)[0], model(x)[1])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Conv4((28, 28), 5), r"input_shape=\(28, 28\): takes \(channels, height, width\), both at least 16"),
        (lambda: Conv4((1, 28, 8), 5), r"input_shape=\(1, 28, 8\): takes .*which 4 poolings halve"),
        (lambda: ResNet12((40,), 5), r"input_shape=\(40,\): takes \(channels"),
        (lambda: Transformer((1, 2, 3), 5), r"input_shape=\(1, 2, 3\): takes \(length,\), or \(length, d\)"),
        (lambda: Transformer((4, 2), 5, tokens=7), r"input_shape=\(4, 2\): takes \(length,\), with tokens"),
        (lambda: Transformer((4,), 5, heads=3), "heads=3: takes a divisor of width=32"),
        (lambda: Transformer((4,), 5, readout="last"), "readout=last: takes one of mean, token"),
        (lambda: GRU((0,), 5), r"input_shape=\(0,\): takes"),
        (lambda: GRU((4,), 5, tokens=0), "tokens=0: takes a whole number of at least 1"),
        (lambda: Conv4((1, 16, 16), 5, activation="swish"), "activation=swish: takes one of"),
        (lambda: Conv4((1, 16, 16), 5)(torch.zeros(3, 1, 16, 15)), r"inputs=\[examples, 1, 16, 15\]: takes .*16, 16\]"),
        (lambda: Conv4((1, 16, 16), 5)(torch.zeros(1, 16, 16)), r"inputs=\[examples, 16, 16\]: takes"),
        (lambda: GRU((4,), 5)(torch.zeros(3, 5)), r"inputs=\[examples, 5\]: takes \[examples, 1 to 4\]"),
        (lambda: GRU((4, 2), 5)(torch.zeros(3, 4)), r"inputs=\[examples, 4\]: takes \[examples, 1 to 4, 2\]"),
        (lambda: Transformer((4,), 5, tokens=7)(torch.zeros(3, 4)), "inputs=numbers of torch.float32: takes whole"),
    ],
)
def test_what_they_do_not_take_is_named(make, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        make()


@pytest.mark.parametrize("model", ["transformer", "gru"])
def test_on_the_command_line(run_train, model):
    few = ("dataset.shots=1", "dataset.queries=1", "dataset.ways=2", "meta_batch=2", "solver.steps=1", "steps=1")
    more = ("estimator=symmetric", "eval.tasks=0", "eval.validation_tasks=0", "bias.every=0", "wandb.mode=disabled")
    done = run_train(f"model={model}", "width=4", *few, *more)
    assert done.returncode == 0, done.stderr


def test_images_are_not_sequences_on_the_command_line(run_train):
    done = run_train("model=conv4", "wandb.mode=disabled")
    assert done.stderr.startswith("error: model=conv4: input_shape=(40,): takes (channels, height, width)")
