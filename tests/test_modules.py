"""Any module and any loss: what the estimators return is what plain autograd returns, task by task, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from module_cases import (
    CASES,
    ESTIMATORS,
    FIRST_DERIVATIVES_ONLY,
    LOSSES,
    SECOND_DERIVATIVES,
    TOLERANCE,
    VECTORS,
    Of,
    Plain,
    made,
    tasks,
    tokens,
    vectors,
)
from torch import nn
from torch.nn.utils import parametrizations

import fobmaml

ONE_BY_ONE = ("symmetric", "maml", "fomaml")
"""Estimators whose tasks are solved together and one at a time; the composed modules do so with every one."""


def _check(model, loss_fn, batch, case):
    plain, before = Plain(model, loss_fn, batch), batch.support_x.clone()
    for name in ESTIMATORS:
        if case in FIRST_DERIVATIVES_ONLY and name in SECOND_DERIVATIVES:
            with pytest.raises(ValueError, match=FIRST_DERIVATIVES_ONLY[case]):
                fobmaml.meta_gradient(ESTIMATORS[name], model, loss_fn, batch)
            continue
        wanted = torch.stack([plain.estimate(name, task) for task in range(len(batch))]).mean(0)
        for chunk in (None, 1) if name in ONE_BY_ONE else (None,):
            found = fobmaml.meta_gradient(ESTIMATORS[name], model, loss_fn, batch, chunk)
            flat = torch.cat([g.flatten() for g in found.gradient.values()])
            assert list(found.gradient) == plain.names
            error = float((flat - wanted).norm() / wanted.norm())
            assert error < TOLERANCE[name], f"{name}, task_chunk={chunk}, {found.engine}: {error}"
    assert torch.equal(batch.support_x, before)


@pytest.mark.parametrize("case", CASES)
def test_modules(case):
    torch.manual_seed(0)
    make, x = CASES[case]
    batch = tasks(x, LOSSES["cross_entropy"][1], count=2)
    _check(made(make, batch.support_x[0]), F.cross_entropy, batch, case)


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("network", ["our mlp", "mlp", "branches on data"])
def test_losses(case, network):
    """By the engines for listed networks, for batched ones and for rows one by one."""
    torch.manual_seed(0)
    loss_fn, y = LOSSES[case]
    batch = tasks(vectors, y, count=2)
    _check(made(VECTORS[network], batch.support_x[0]), loss_fn, batch, case)


SMOOTH = st.sampled_from([nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid])


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, str]:
    """A module composed at random, of [N, 6] or of five tokens, and what it takes."""
    layers: list[nn.Module] = []
    kind = draw(st.sampled_from(["vectors", "tokens"]))
    if kind == "tokens":
        layers += [nn.Embedding(11, 2, padding_idx=draw(st.sampled_from([None, 0, 3])), sparse=draw(st.booleans()))]
        layers += [
            draw(
                st.sampled_from(
                    [
                        nn.Flatten,
                        lambda: Of(lambda m, x: m.a(x)[0].flatten(1), a=nn.GRU(2, 2, batch_first=True)),
                        lambda: Of(
                            lambda m, x: m.a(x).flatten(1),
                            a=nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True),
                        ),
                    ]
                )
            )()
        ]
        size = 10
    else:
        size = 6
    for _ in range(draw(st.integers(0, 4))):
        out = 2 * draw(st.integers(1, 4))
        step = draw(st.sampled_from(["linear", "residual", "norm", "convolution", "lstm", "spectral", "mean", "zeros"]))
        if step == "residual":
            layers.append(Of(lambda m, x: x + m.a(x).tanh(), a=nn.Linear(size, size)))
        elif step == "norm":
            layers.append(draw(st.sampled_from([nn.LayerNorm(size), nn.RMSNorm(size), nn.GroupNorm(2, size)])))
        elif step == "convolution":
            layers += [
                nn.Unflatten(1, (2, size // 2)),
                nn.Conv1d(2, 2, 3, padding=1, groups=draw(st.sampled_from([1, 2]))),
                nn.Flatten(),
            ]
        elif step == "lstm":
            layers.append(
                Of(
                    lambda m, x: m.a(x.unflatten(1, (2, -1)))[0].flatten(1),
                    a=nn.LSTM(size // 2, out // 2, batch_first=True),
                )
            )
            size = out
        elif step == "mean":
            layers.append(Of(lambda m, x: x - 0.5 * x.mean(0), a=nn.Identity()))
        elif step == "zeros":
            layers.append(Of(_scaled_into_zeros, scale=nn.Parameter(torch.tensor(1.2))))
        else:
            layer = nn.Linear(size, out)
            layers += [parametrizations.spectral_norm(layer) if step == "spectral" else layer, draw(SMOOTH)()]
            size = out
    layers.append(nn.Linear(size, 3))
    return nn.Sequential(*layers), kind


def _scaled_into_zeros(m: Of, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = m.scale * x[:, :-1]
    return out


def _check_composed(example: tuple[tuple[nn.Module, str], str, str, int, int, int]) -> None:
    (model, kind), loss, name, count, support, query = example
    loss_fn, y = LOSSES[loss]
    torch.manual_seed(count + support)
    batch = tasks({"vectors": vectors, "tokens": tokens}[kind], y, count, support, query)
    model = model.double()
    plain = Plain(model, loss_fn, batch)
    wanted = torch.stack([plain.estimate(name, task) for task in range(count)]).mean(0)
    size = max(float(wanted.norm()), 1e-3)
    for chunk in (None, 1):
        found = fobmaml.meta_gradient(ESTIMATORS[name], model, loss_fn, batch, chunk)
        flat = torch.cat([g.flatten() for g in found.gradient.values()])
        assert float((flat - wanted).norm()) < TOLERANCE[name] * size, (
            f"{name} on {model}, task_chunk={chunk}, {found.engine}"
        )


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.nightly) for part in (1, 2, 3, 4))])
def test_composed_modules(part):
    """Three hundred in all."""
    losses = [name for name in LOSSES if name not in FIRST_DERIVATIVES_ONLY]
    examples = st.tuples(
        networks(),
        st.sampled_from(losses),
        st.sampled_from(sorted(ESTIMATORS)),
        st.integers(1, 3),
        st.integers(2, 5),
        st.integers(2, 6),
    )
    check = given(examples)(_check_composed)
    seed(part)(
        settings(
            max_examples=70 if part else 20, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )(check)
    )()
