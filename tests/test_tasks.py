"""The data are the published ones, the splits are disjoint, and the sampling is uniform."""

import os
import random
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mnist1d.data import get_dataset_args, make_dataset
from scipy import stats
from torch import nn

from fobmaml import TaskBatch
from fobmaml.estimators import FOMAML
from fobmaml.measure.accuracy import score
from fobmaml.models import MLP
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import MNIST1D, Logistic, Sinusoid
from fobmaml.tasks.mnist1d import load_arrays


@pytest.fixture(scope="module")
def published():
    return make_dataset(get_dataset_args())


def test_arrays_are_the_packages(published, tmp_path: Path):
    for arrays in (load_arrays(tmp_path), load_arrays(tmp_path)):  # made, then from the cache
        for name in ("x", "y", "x_test", "y_test"):
            np.testing.assert_allclose(arrays[name], published[name], rtol=0, atol=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["mnist1d.npz"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"no archive",
        lambda b: b"",
        lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:],
    ],
)
def test_damaged_cache_is_made_again(published, tmp_path: Path, damage):
    load_arrays(tmp_path)
    file = tmp_path / "mnist1d.npz"
    good = file.read_bytes()
    file.write_bytes(damage(good))
    np.testing.assert_allclose(load_arrays(tmp_path)["x"], published["x"], rtol=0, atol=1e-12)
    with np.load(file, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["x"], published["x"])


def test_a_cache_that_cannot_be_written_does_no_harm(published, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    np.testing.assert_allclose(load_arrays(tmp_path / "file")["x"], published["x"], rtol=0, atol=1e-12)


def test_generating_leaves_global_generators_alone(tmp_path: Path):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    wanted = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    load_arrays(tmp_path)
    assert (random.random(), np.random.rand()) == wanted  # noqa: NPY002


def _identities(examples: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in examples]


def test_splits_share_no_example(mnist1d: MNIST1D):
    found = {split: {i for digit in digits for i in _identities(digit)} for split, digits in mnist1d.examples.items()}
    assert {split: len(ids) for split, ids in found.items()} == {"train": 3200, "validation": 800, "test": 1000}
    assert not found["train"] & found["validation"]
    assert not (found["train"] | found["validation"]) & found["test"]
    arrays = load_arrays()  # the cache may be another machine's, whose last bits are its own
    assert found["test"] == {row.tobytes() for row in arrays["x_test"]}
    assert found["train"] | found["validation"] == {row.tobytes() for row in arrays["x"]}


def test_sampled_tasks_stay_in_their_split(mnist1d: MNIST1D, generator):
    for split, digits in mnist1d.examples.items():
        pool = {i for digit in digits for i in _identities(digit)}
        batch = mnist1d.sample(split, 50, generator)
        for part in (batch.support_x, batch.query_x):
            assert set(_identities(part.flatten(0, 1))) <= pool


def test_a_task_has_distinct_examples_and_consistent_labels(mnist1d: MNIST1D, generator):
    digit_of = {i: d for d, rows in enumerate(mnist1d.examples["train"]) for i in _identities(rows)}
    batch = mnist1d.sample("train", 40, generator)
    assert batch.support_x.shape == (40, 25, 40)
    assert batch.query_x.shape == (40, 75, 40)
    for task in range(40):
        ids = _identities(batch.support_x[task]) + _identities(batch.query_x[task])
        labels = torch.cat([batch.support_y[task], batch.query_y[task]]).tolist()
        assert len(set(ids)) == 100
        pairs = {(label, digit_of[i]) for label, i in zip(labels, ids, strict=True)}
        assert len(pairs) == 5  # one digit a label
        assert len({digit for _, digit in pairs}) == 5
        assert torch.equal(batch.support_y[task].bincount(), torch.full((5,), 5))
        assert torch.equal(batch.query_y[task].bincount(), torch.full((5,), 15))


def test_sampling_is_uniform(mnist1d: MNIST1D, generator):
    """Chi-squared tests at a fixed seed: digit against label, and the examples of a digit in support and query."""
    digit_of = {i: d for d, rows in enumerate(mnist1d.examples["validation"]) for i in _identities(rows)}
    place_of = {i: n for rows in mnist1d.examples["validation"] for n, i in enumerate(_identities(rows))}
    batch = mnist1d.sample("validation", 4000, generator)
    firsts = _identities(batch.support_x[:, ::5].flatten(0, 1))  # one example of each class
    table = np.zeros((10, 5))
    for n, i in enumerate(firsts):
        table[digit_of[i], n % 5] += 1
    assert stats.chisquare(table.ravel()).pvalue > 0.001
    for part in (batch.support_x[:1000], batch.query_x[:1000]):
        places = np.bincount([place_of[i] for i in _identities(part.flatten(0, 1))], minlength=80)
        assert stats.chisquare(places).pvalue > 0.001


def test_samples_are_a_function_of_the_generator(mnist1d: MNIST1D):
    first, again, other = (mnist1d.sample("test", 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.query_x, again.query_x)
    assert not torch.equal(first.query_x, other.query_x)


def test_sinusoid_is_a_sine(generator):
    batch = Sinusoid(shots=10, queries=10).sample("train", 200, generator)
    x = torch.cat([batch.support_x, batch.query_x], 1)
    y = torch.cat([batch.support_y, batch.query_y], 1)
    basis = torch.cat([x.sin(), x.cos()], -1)
    fit = torch.linalg.lstsq(basis, y).solution
    assert (basis @ fit - y).abs().max() < 1e-9
    amplitude = fit.norm(dim=1).squeeze()
    assert 0.1 <= amplitude.min() < 0.6
    assert 4.5 < amplitude.max() <= 5.0
    assert x.min() >= -5
    assert x.max() <= 5


def test_logistic_labels_follow_the_model(generator):
    batch = Logistic(dimension=3, spread=0.0, shots=1, queries=50_000).sample("train", 1, generator)
    p = torch.sigmoid(batch.query_x[0].sum(1))
    confident = p > 0.9
    assert batch.query_y[0][confident].double().mean() == pytest.approx(float(p[confident].mean()), abs=0.01)


def test_logistic_tasks_of_a_finite_number():
    source = Logistic(tasks=6)
    whole = source.sample("train", 6, torch.Generator().manual_seed(1)).support_x
    other = source.sample("test", 6, torch.Generator().manual_seed(2)).support_x
    assert not whole.equal(other)  # in another order
    assert whole.flatten(1).unique(dim=0).equal(other.flatten(1).unique(dim=0))
    few = source.sample("train", 4, torch.Generator().manual_seed(3)).support_x
    assert len(torch.cat([whole, few]).flatten(1).unique(dim=0)) == 6  # without replacement
    assert len(few.flatten(1).unique(dim=0)) == 4
    with pytest.raises(ValueError, match=r"^dataset.tasks=6: takes at least 7, the tasks of a sample, or null$"):
        source.sample("train", 7, torch.Generator())
    with pytest.raises(ValueError, match=r"^tasks=0: takes a whole number of at least 1$"):
        Logistic(tasks=0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"ways": 11}, "ways=11"),
        ({"ways": 1}, "ways=1"),
        ({"ways": "x"}, "ways=x"),
        ({"shots": 0}, "shots=0"),
        ({"shots": 100_000}, "shots=100000"),
        ({"queries": 79}, "queries=79"),
        ({"shots": 2.5}, "shots=2.5"),
    ],
)
def test_bad_arguments(arguments, names):
    with pytest.raises(ValueError, match=f"^{names}: takes "):
        MNIST1D(**arguments)


def test_task_batch_checks_its_tensors():
    x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    TaskBatch(x, y, x, y)
    for bad in (
        [x, y, x[:1], y],
        [x, y[:, :4], x, y],
        [x, y, x, y.long()],
        [x, y, x[..., :2], y],
        [[1], y, x, y],
        [x[:, :0], y[:, :0], x, y],
    ):
        with pytest.raises(ValueError, match="takes"):
            TaskBatch(*bad)


def test_mean_squared_error_is_to_one_hot_targets():
    source = MNIST1D(loss="mse")
    outputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])
    wanted = torch.nn.functional.mse_loss(outputs, torch.nn.functional.one_hot(targets).double())
    torch.testing.assert_close(source.loss_fn(outputs, targets), wanted)
    with pytest.raises(ValueError, match=r"^loss=l1: takes one of cross_entropy, mse"):
        MNIST1D(loss="l1")


class _Source:
    """A user's own: two classes, three features."""

    input_shape, outputs, classification, loss_fn = (3,), 2, True, staticmethod(F.cross_entropy)

    def sample(self, split, count, generator):
        return self.batch(count, generator)

    @staticmethod
    def batch(count, generator, shape=(3,), labels=2):
        def part(examples):
            return (
                torch.randn(count, examples, *shape, generator=generator),
                torch.randint(labels, (count, examples), generator=generator),
            )

        return TaskBatch(*part(4), *part(5))


def _build(source, **changes):
    from test_training import meta_training

    model = MLP((3,), 2, width=4, depth=1)
    return meta_training(model, source, FOMAML(GradientDescent(1, 0.1)), **changes)


def _accuracy(source) -> float | None:
    training = _build(source)
    return score(training, training.fixed("test", 4)).accuracy


def _own(**members):
    return type("Own", (_Source,), members)()


def _without(name):
    return type("Own", (), {key: value for key, value in vars(_Source).items() if key != name})()


def _fails_on(split, error):
    def sample(self, asked, count, generator):
        if asked == split:
            raise error
        return self.batch(count, generator)

    return _own(sample=sample)


def _returns(change):
    return _own(sample=lambda self, split, count, generator: change(self.batch(count, generator), generator))


TWO_LINES = RuntimeError("a line\n  and another")
REFUSED = {
    **{
        f"no {name}": (lambda name=name: _without(name), f"dataset: Own has no {name}: takes ")
        for name in ("sample", "input_shape", "outputs", "classification", "loss_fn")
    },
    "sample takes too little": (lambda: _own(sample=lambda self, count: 1), "dataset: sample=<lambda>: takes a method"),
    "sample is a number": (lambda: _own(sample=1), "dataset: sample=int: takes a method"),
    "shape is a number": (lambda: _own(input_shape=3), "dataset: input_shape=3: takes a tuple"),
    "shape is a word": (lambda: _own(input_shape="3"), "dataset: input_shape=3: takes a tuple"),
    "shape with zero": (lambda: _own(input_shape=(0,)), "dataset: input_shape=0: takes a whole number"),
    "no outputs at all": (lambda: _own(outputs=0), "dataset: outputs=0: takes a whole number"),
    "one class": (lambda: _own(outputs=1), "dataset: outputs=1: takes a whole number of at least 2"),
    "outputs is a word": (lambda: _own(outputs="2"), "dataset: outputs=2: takes a whole number"),
    "classification is a word": (lambda: _own(classification="no"), "dataset: classification=no: takes true or false"),
    "loss is a word": (lambda: _own(loss_fn="mse"), "dataset: loss_fn=str: takes a function"),
    "loss takes one": (lambda: _own(loss_fn=staticmethod(lambda o: o)), "dataset: loss_fn=<lambda>: takes a function"),
    "a bare function": (
        lambda: _own(loss_fn=F.cross_entropy),
        r"dataset: loss_fn=cross_entropy: takes staticmethod\(cross_entropy\) in a class",
    ),
    "a bare lambda": (
        lambda: _own(loss_fn=lambda o, y: F.cross_entropy(o, y)),
        "dataset: loss_fn=<lambda>: takes staticmethod",
    ),
    "a loss that raises": (
        lambda: _own(loss_fn=staticmethod(lambda o, y: {}["x"])),
        "dataset: loss_fn failed: KeyError: 'x'",
    ),
    "fails on test": (lambda: _fails_on("test", KeyError("test")), r"dataset: sample\('test', 8\) failed: KeyError"),
    "fails on validation": (
        lambda: _fails_on("validation", TWO_LINES),
        r"dataset: sample\('validation', 8\) failed: RuntimeError: a line and another$",
    ),
    "fails on train": (
        lambda: _fails_on("train", NotImplementedError()),
        r"dataset: sample\('train', 16\) failed: NotImplementedError$",
    ),
    "a tuple": (
        lambda: _returns(lambda b, g: (b.support_x, b.support_y)),
        r"dataset: sample\('train', 16\) returned a tuple: takes a fobmaml.TaskBatch",
    ),
    "too few": (lambda: _returns(lambda b, g: b[:3]), r"dataset: sample\('train', 16\) returned 3 tasks: takes 16"),
    "parts that do not fit": (
        lambda: _returns(lambda b, g: TaskBatch(b.support_x, b.query_y, b.query_x, b.query_y)),
        r"dataset: sample\('train', 16\) failed: ValueError: support_y=",
    ),
    "other examples": (
        lambda: _own(input_shape=(1, 3)),
        r"dataset: sample\('train', 16\) returned examples of shape \(3,\): takes input_shape, \(1, 3",
    ),
    "labels from 1": (
        lambda: _returns(lambda b, g: TaskBatch(b.support_x, b.support_y + 1, b.query_x, b.query_y)),
        r"dataset: sample\('train', 16\): support_y holds the label 2: takes 0 ... 1 \(outputs\), or",
    ),
    "labels of another loss": (
        lambda: _returns(lambda b, g: TaskBatch(b.support_x, b.support_y, b.query_x, b.query_y.fill_(-1))),
        r"dataset: sample\('train', 16\): query_y holds the label -1: takes 0 ... 1",
    ),
    "global randomness": (
        lambda: _returns(lambda b, g: TaskBatch(torch.randn_like(b.support_x), b.support_y, b.query_x, b.query_y)),
        "dataset: sample returned another support_x with the same generator: takes all randomness",
    ),
    "a network that does not fit": (
        lambda: _own(input_shape=(2,), sample=lambda self, split, count, generator: self.batch(count, generator, (2,))),
        r"inputs=\[examples, 2\]: takes 3 values an example",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_is_none_is_refused_before_the_first_step(case):
    make, text = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{text}") as caught:
        _build(make())
    assert "\n" not in str(caught.value)


def test_splits_that_are_not_used_are_not_sampled():
    _build(_fails_on("test", KeyError()), test_tasks=0)
    _build(_fails_on("validation", KeyError()), validation_tasks=0)
    for used in ({"bias_every": 1}, {"smoothness_every": 1}, {"curvature_every": 1}):
        with pytest.raises(ValueError, match=r"^dataset: sample\('validation', 2\) failed"):
            _build(_fails_on("validation", KeyError()), validation_tasks=0, **used)


@pytest.mark.parametrize(
    "loss",
    [
        staticmethod(F.cross_entropy),
        nn.CrossEntropyLoss(),
        partial(F.cross_entropy),
        lambda self, o, y: F.cross_entropy(o, y),
        property(lambda self: F.cross_entropy),
    ],
)
def test_losses_that_a_class_may_hold(loss):
    with warnings.catch_warnings():  # of Python 3.13, about a partial in a class
        warnings.simplefilter("ignore", FutureWarning)
        assert _accuracy(_own(loss_fn=loss)) is not None


def test_the_check_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    wanted = [p.detach().clone() for p in MLP((3,), 2, width=4, depth=1).parameters()], torch.rand(3)
    torch.manual_seed(5)
    training = _build(_returns(lambda b, g: torch.manual_seed(1) and b))
    assert torch.equal(torch.rand(3), wanted[1])
    assert all(torch.equal(p, w) for p, w in zip(training.learner.model.parameters(), wanted[0], strict=True))


def test_labels_that_the_loss_ignores_are_taken():
    def holes(label):
        hole = torch.tensor([2])
        return lambda b, g: TaskBatch(b.support_x, b.support_y, b.query_x, b.query_y.index_fill(1, hole, label))

    plain = _returns(holes(-100))
    own = type(plain)
    assert _accuracy(plain) is not None
    for loss in (partial(F.cross_entropy, ignore_index=9), nn.CrossEntropyLoss(ignore_index=9)):
        source = type("Own", (own,), {"loss_fn": loss, "sample": _returns(holes(9)).sample.__func__})()
        assert _accuracy(source) is not None


MODULE = """
import torch
import torch.nn.functional as F
from fobmaml import TaskBatch
from fobmaml.tasks import Sinusoid


class NoOutputs:
    input_shape, classification, loss_fn = (1,), False, staticmethod(F.mse_loss)

    def __init__(self, **settings):
        self.source = Sinusoid(**settings)

    def sample(self, split, count, generator):
        return self.source.sample(split, count, generator)


class BareLoss(NoOutputs):
    outputs, loss_fn = 1, F.mse_loss


class FailsOnTest(NoOutputs):
    outputs = 1

    def sample(self, split, count, generator):
        if split == "test":
            raise FileNotFoundError("test.npz\\nis not there")
        return super().sample(split, count, generator)


class Tuples(NoOutputs):
    outputs = 1

    def sample(self, split, count, generator):
        tasks = super().sample(split, count, generator)
        return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y
"""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("NoOutputs", "dataset: NoOutputs has no outputs: takes a whole number"),
        ("BareLoss", "dataset: loss_fn=mse_loss: takes staticmethod(mse_loss) in a class"),
        ("FailsOnTest", "dataset: sample('test', 600) failed: FileNotFoundError: test.npz is not there"),
        ("Tuples", "dataset: sample('train', 16) returned a tuple: takes a fobmaml.TaskBatch"),
    ],
)
def test_on_the_command_line_it_is_one_line_at_once(run_train, tmp_path, kind, says):
    (tmp_path / "own_tasks.py").write_text(MODULE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_train("dataset=sinusoid", f"dataset._target_=own_tasks.{kind}", env={"PYTHONPATH": path})
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {says}"), done.stderr
    assert done.stderr.count("\n") == 1
