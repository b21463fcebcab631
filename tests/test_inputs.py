"""Inputs of several tensors reach the model as they were given, and give what plain loops over tasks give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fobmaml import TaskBatch, meta_gradient
from fobmaml.estimators import IMAML, MAML, Reptile, Symmetric
from fobmaml.measure.accuracy import score
from fobmaml.settings import Settings
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import Stream
from fobmaml.training import MetaTraining

SOLVER = GradientDescent(3, 0.1)
ESTIMATORS = {
    "symmetric": Symmetric(SOLVER, 0.5, 0.05),
    "maml": MAML(SOLVER),
    "reptile": Reptile(SOLVER),
    "imaml": IMAML(SOLVER, 0.5),
    "batches": Symmetric(GradientDescent(3, 0.1, batch=2, query_batch=3), 0.5, 0.05),
}


class Words(nn.Module):
    """Means over the words that there are, beside numbers: as a language model's inputs are."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4 + 6, 3)

    def forward(self, inputs):
        tokens, there, numbers = inputs.values() if isinstance(inputs, dict) else inputs
        assert (tokens.dtype, there.dtype) == (torch.int64, torch.bool)
        vectors = self.embedding(tokens) * there.unsqueeze(-1)
        mean = vectors.sum(1) / there.sum(1, keepdim=True)
        return self.head(torch.cat([mean.tanh(), numbers.flatten(1)], dim=1))


class Packed(Words):
    """The same of one tensor."""

    def forward(self, x):
        return super().forward((x[:, :5].long(), x[:, 5:10].bool(), x[:, 10:].unflatten(1, (2, 3))))


def _part(generator, *shape):
    there = torch.rand(*shape, 5, generator=generator) < 0.7
    there[..., 0] = True
    return (
        torch.randint(7, (*shape, 5), generator=generator),
        there,
        torch.randn(*shape, 2, 3, generator=generator, dtype=torch.float64),
    ), torch.randint(3, shape, generator=generator)


NAMES = ("tokens", "there", "numbers")


def _as(kind, parts):
    return dict(zip(NAMES, parts, strict=True)) if kind == "dictionary" else parts


def _batch(kind: str, count=3) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)
    (s_x, s_y), (q_x, q_y) = _part(generator, count, 4), _part(generator, count, 5)
    if kind == "one":
        s_x, q_x = (torch.cat([t.flatten(2).double() for t in x], dim=2) for x in (s_x, q_x))
        return TaskBatch(s_x, s_y, q_x, q_y, torch.arange(count))
    return TaskBatch(_as(kind, s_x), s_y, _as(kind, q_x), q_y, torch.arange(count))


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (Packed() if kind == "one" else Words()).double()


def _result(name, kind, batch=None, **how):
    return meta_gradient(ESTIMATORS[name], _model(kind), F.cross_entropy, batch or _batch(kind), **how)


@pytest.mark.parametrize("engine", ["auto", "autograd", "loop"])
@pytest.mark.parametrize("kind", ["dictionary", "tuple"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_several_tensors_are_one(name, kind, engine):
    found, wanted = (_result(name, k, engine=engine) for k in (kind, "one"))
    for key, value in wanted.gradient.items():
        torch.testing.assert_close(found.gradient[key], value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.query_loss, wanted.query_loss)


def test_inputs_come_back_as_they_were():
    generator = torch.Generator().manual_seed(1)
    s_x, _ = _part(generator, 3, 4)
    batch = _batch("dictionary")
    given = batch.layout.unpack(batch.support_x)
    assert list(given) == list(NAMES)
    for name, tensor in zip(NAMES, s_x, strict=True):
        assert torch.equal(given[name], tensor)
        assert given[name].dtype == tensor.dtype
    assert batch[1:].layout == batch.to(dtype=torch.float32).layout == batch.pooled().layout == batch.layout
    assert batch.layout.input_shape == {"tokens": (5,), "there": (5,), "numbers": (2, 3)}
    assert _batch("tuple").layout.input_shape == ((5,), (5,), (2, 3))


def test_tasks_of_unequal_size_may_have_several_tensors_too():
    generator = torch.Generator().manual_seed(2)
    tasks = []
    for s, q in ((2, 4), (3, 2)):
        (s_x, s_y), (q_x, q_y) = _part(generator, s), _part(generator, q)
        tasks.append((_as("dictionary", s_x), s_y, _as("dictionary", q_x), q_y))
    batch = TaskBatch.padded(tasks)
    assert batch.support_mask.tolist() == [[True, True, False], [True] * 3]
    found = _result("symmetric", "dictionary", batch)  # with zeros for what fills up, means over no word would be NaN
    alone = [_result("symmetric", "dictionary", TaskBatch.padded([task])) for task in tasks]
    torch.testing.assert_close(found.query_loss, torch.cat([each.query_loss for each in alone]))
    for key, value in found.gradient.items():
        torch.testing.assert_close(value, torch.stack([each.gradient[key] for each in alone]).mean(0))


def test_a_run_on_dictionaries():
    batches = [_batch("dictionary").to(dtype=torch.float32)]
    source = Stream(batches, test=batches, outputs=3, loss_fn=F.cross_entropy)
    assert source.input_shape == {"tokens": (5,), "there": (5,), "numbers": (2, 3)}
    training = MetaTraining(Words(), source, ESTIMATORS["symmetric"], Settings(steps=3, meta_batch=2), torch.optim.Adam)
    assert len(list(training.train())) == 3
    assert 0.0 <= score(training, training.fixed("test", 3)).accuracy <= 1.0
    assert training.learner.in_double().layout == training.learner.layout


def test_what_does_not_fit_is_refused():
    x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    for bad, text in (
        ({"a": x, "b": x[:, :4]}, r"support_x\[b\]=\(2, 4, 3\) on cpu: takes \(2, 5\) first, as the others have"),
        ((x, [1]), r"support_x\[1\]=list: takes a tensor"),
        ({}, "support_x=dict: takes a tensor .*, or a dictionary or tuple"),
        ({"a": x.long() + 2**25}, r"support_x\[a\]=33554432: takes whole numbers up to"),
        ("x", "support_x=str: takes a tensor"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            TaskBatch(bad, y, bad, y)
    with pytest.raises(ValueError, match=r"^query_x=.*: takes tensors like support_x's"):
        TaskBatch({"a": x}, y, {"b": x}, y)
    with pytest.raises(ValueError, match=r"^engine=stacked"):
        meta_gradient(ESTIMATORS["symmetric"], Words(), F.cross_entropy, _batch("tuple"), engine="stacked")
