"""The data are the published ones, the splits are disjoint, and the sampling is uniform."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist1d.data import get_dataset_args, make_dataset
from scipy import stats

from fobmaml import TaskBatch
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


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no archive", lambda b: b"",
                                    lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]])
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
    np.testing.assert_array_equal(load_arrays(tmp_path / "file")["x"], published["x"])


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


def test_splits_share_no_example(mnist1d: MNIST1D, published):
    found = {split: {i for digit in digits for i in _identities(digit)} for split, digits in mnist1d.examples.items()}
    assert {split: len(ids) for split, ids in found.items()} == {"train": 3200, "validation": 800, "test": 1000}
    assert not found["train"] & found["validation"]
    assert not (found["train"] | found["validation"]) & found["test"]
    assert found["test"] == {row.tobytes() for row in published["x_test"]}
    assert found["train"] | found["validation"] == {row.tobytes() for row in published["x"]}


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


@pytest.mark.parametrize(("arguments", "names"), [
    ({"ways": 11}, "ways=11"), ({"ways": 1}, "ways=1"), ({"ways": "x"}, "ways=x"), ({"shots": 0}, "shots=0"),
    ({"shots": 100_000}, "shots=100000"), ({"queries": 79}, "queries=79"), ({"shots": 2.5}, "shots=2.5"),
])
def test_bad_arguments(arguments, names):
    with pytest.raises(ValueError, match=f"^{names}: takes "):
        MNIST1D(**arguments)


def test_task_batch_checks_its_tensors():
    x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    TaskBatch(x, y, x, y)
    for bad in ([x, y, x[:1], y], [x, y[:, :4], x, y], [x, y, x, y.long()], [x, y, x[..., :2], y], [[1], y, x, y],
                [x[:, :0], y[:, :0], x, y]):
        with pytest.raises(ValueError, match="takes"):
            TaskBatch(*bad)


def test_mean_squared_error_is_to_one_hot_targets():
    source = MNIST1D(loss="mse")
    outputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])
    wanted = torch.nn.functional.mse_loss(outputs, torch.nn.functional.one_hot(targets).double())
    torch.testing.assert_close(source.loss_fn(outputs, targets), wanted)
    with pytest.raises(ValueError, match=r"^loss=l1: takes one of cross_entropy, mse"):
        MNIST1D(loss="l1")
