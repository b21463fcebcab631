"""Tasks from labelled examples: splits are disjoint, draws are uniform, what does not fit is refused by name."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fobmaml.tasks import FewShot
from fobmaml.tasks.few_shot import distinct
from fobmaml.tasks.splits import SPLITS, pools

SIZES = (9, 12, 10, 9, 11, 14, 9, 10, 9, 13)
LABELS = np.repeat(np.arange(10), SIZES)


def _numbered(times=1) -> tuple[torch.Tensor, np.ndarray]:
    """Examples that are their own numbers, so that a task says what it has drawn, and their classes."""
    labels = np.random.default_rng(0).permutation(np.repeat(LABELS, times))
    return torch.arange(len(labels), dtype=torch.float64).unsqueeze(1), labels


def _source(**changes) -> tuple[FewShot, np.ndarray]:
    x, y = _numbered()
    return FewShot(x, y, **{"ways": 2, "shots": 3, "queries": 4, "split": (4, 3, 3), **changes}), y


def _numbers(batch) -> np.ndarray:
    """[T, ways, shots + queries]."""
    ways = int(batch.support_y.max()) + 1
    parts = [part.view(len(batch), ways, -1) for part in (batch.support_x, batch.query_x)]
    return torch.cat(parts, dim=2).long().numpy()


def test_by_class_no_class_is_in_two_splits(generator):
    source, y = _source()
    assert [source.classes_of(split) for split in SPLITS] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert source.novel_classes
    for split in SPLITS:
        seen = _numbers(source.sample(split, 300, generator))
        assert set(y[seen].ravel()) == set(source.classes_of(split))
        assert set(seen.ravel()) == set(np.flatnonzero(np.isin(y, source.classes_of(split))))  # all are drawn


@pytest.mark.parametrize("split", [None, (0.4, 0.3, 0.3), (3, 2, 4), (0.5, 0.0, 0.5)])
def test_by_example_no_example_is_in_two_splits(split, generator):
    x, y = _numbered(2)
    source = FewShot(x, y, 2, 1, 1, split_by="example", split=split)
    assert not source.novel_classes
    seen = {}
    for name in SPLITS:
        if source.examples[name]:
            assert source.classes_of(name) == list(range(10))
            seen[name] = set(_numbers(source.sample(name, 2000, generator)).ravel())
            assert seen[name] == {int(x) for digit in source.examples[name] for x in digit}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    shares = {name: [sum(y[n] == c for n in seen.get(name, ())) for c in range(10)] for name in SPLITS}
    if split == (3, 2, 4):
        assert shares == {"train": [3] * 10, "validation": [2] * 10, "test": [4] * 10}
    else:
        for name, part in zip(SPLITS, split or (0.64, 0.16, 0.2), strict=True):
            assert all(abs(found - 2 * part * size) <= 1 for found, size in zip(shares[name], SIZES, strict=True))
    first = min(seen["train"]), max(n for n in seen["test"] if y[n] == y[min(seen["train"])])
    assert first[0] < first[1]  # in the order of x


def test_a_split_may_be_said_by_labels_and_by_numbers(generator):
    x, y = _numbered()
    words = np.array([f"class {c}" for c in y])
    by_class = {"train": ["class 3", "class 1"], "test": ["class 0", "class 9", "class 4"]}
    source = FewShot(x, words, 2, 1, 1, split=by_class)
    assert {split: sorted(labels) for split, labels in by_class.items()} == {
        split: source.classes_of(split) for split in ("train", "test")
    }
    by_number = {"train": np.arange(0, 106, 2), "validation": torch.arange(1, 106, 2)}
    source = FewShot(x, y, 2, 1, 1, split_by="example", split=by_number)
    assert {*_numbers(source.sample("validation", 2000, generator)).ravel()} == set(range(1, 106, 2))


def test_a_task_has_distinct_examples_and_labels_that_stand_for_one_class(generator):
    source, y = _source(ways=3)
    batch = source.sample("train", 200, generator)
    assert batch.support_x.shape == (200, 9, 1)
    assert batch.query_y.shape == (200, 12)
    numbers = _numbers(batch)
    assert all(len(set(task.ravel())) == 21 for task in numbers)
    classes = y[numbers]
    assert (classes == classes[:, :, :1]).all()
    assert (np.diff(np.sort(classes[:, :, 0])) > 0).all()
    assert torch.equal(batch.support_y, torch.arange(3).repeat_interleave(3).repeat(200, 1))
    assert torch.equal(batch.query_y, torch.arange(3).repeat_interleave(4).repeat(200, 1))


def test_draws_are_uniform_with_classes_of_different_sizes(generator):
    """Chi-squared tests at a fixed seed: classes against labels, and each class's examples in support and query."""
    source, y = _source(split=(10, 0, 0))
    numbers = _numbers(source.sample("train", 12_000, generator))
    classes = y[numbers[:, :, 0]]
    table = np.array([[(classes[:, label] == c).sum() for label in range(2)] for c in range(10)])
    assert stats.chisquare(table.ravel()).pvalue > 0.001
    pairs = np.bincount(classes[:, 0] * 10 + classes[:, 1], minlength=100).reshape(10, 10)
    assert stats.chisquare(pairs[~np.eye(10, dtype=bool)]).pvalue > 0.001
    for place in (0, 1, 3, 6):  # of one support example and one query example of each class
        counts = np.bincount(numbers[:, :, place].ravel(), minlength=len(y))
        for c in range(10):
            assert stats.chisquare(counts[y == c]).pvalue > 0.0002


@pytest.mark.parametrize("sizes", [(3, 4, 6), (8, 9, 11)])
def test_distinct_numbers_are_uniform_as_ordered_pairs(sizes, generator):
    """Both ways that there are, each with sizes that differ; some of so many rows have to be drawn again."""
    rows = 30_000
    found = distinct(np.tile(sizes, rows), 2, [generator]).reshape(rows, len(sizes), 2)
    for i, size in enumerate(sizes):
        pairs = np.bincount(found[:, i, 0] * size + found[:, i, 1], minlength=size**2)
        assert len(pairs) == size**2
        assert not pairs.reshape(size, size).diagonal().any()
        assert stats.chisquare(pairs.reshape(size, size)[~np.eye(size, dtype=bool)]).pvalue > 0.001
    together = np.bincount(found[:, 0, 0] * sizes[1] + found[:, 1, 1], minlength=sizes[0] * sizes[1])
    assert stats.chisquare(together).pvalue > 0.001


@pytest.mark.parametrize(("size", "take"), [(20, 20), (80, 20), (10**9, 20), (400, 100), (1, 1), (4, 1)])
def test_distinct_numbers_are_distinct(size, take, generator):
    found = distinct(np.full(2000, size), take, [generator])
    assert found.shape == (2000, take)
    assert found.min() >= 0
    assert found.max() < size
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()


def test_tensors_arrays_and_datasets_give_the_same_tasks():
    x, y = _numbered()

    class Map(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return x[i].numpy(), int(y[i])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x, y, strict=True))

    sources = [
        FewShot(*given, ways=2, shots=2, queries=2, split=(4, 3, 3))
        for given in (
            (x, y),
            (x.numpy(), torch.from_numpy(y)),
            (x, y.tolist()),
            (x, np.array([f"{c}" for c in y])),
            (TensorDataset(x, torch.from_numpy(y)),),
            (Map(),),
            (Stream(),),
        )
    ]
    first, *others = (source.sample("test", 5, torch.Generator().manual_seed(1)) for source in sources)
    for other in others:
        assert torch.equal(first.support_x, other.support_x)
        assert torch.equal(first.query_x, other.query_x)


def _images(count=40, size=4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (count, size, size), generator=generator).to(torch.uint8), torch.arange(count) // 10


def test_bytes_become_images_from_0_to_1(generator):
    x, y = _images()
    source = FewShot(x, y, 2, 2, 3, split=(2, 0, 2))
    assert source.input_shape == (1, 4, 4)
    batch = source.sample("test", 20, generator)
    assert batch.support_x.dtype == torch.float32
    wanted = {image.numpy().tobytes() for image in x[20:].float() / 255}
    assert {image.numpy().tobytes() for image in batch.query_x.flatten(0, 1)} <= wanted


def test_training_classes_are_turned(generator):
    x, y = _images()
    source = FewShot(x, y, 2, 2, 3, split=(2, 0, 2), rotations=True)
    turned = {
        np.rot90(image, times).astype(np.float32).tobytes(): (n, times)
        for n, image in enumerate(x.numpy())
        for times in range(4)
    }
    for split in ("train", "test"):
        batch = source.sample(split, 400, generator)
        images = torch.cat([p.view(400, 2, -1, 4, 4) for p in (batch.support_x, batch.query_x)], dim=2)
        found = [[turned[(255 * i).round().numpy().tobytes()] for i in kind] for task in images for kind in task]
        times = np.array([[t for _, t in kind] for kind in found])
        assert (times == times[:, :1]).all()  # a class of a task one way
        if split == "train":
            assert stats.chisquare(np.bincount(times[:, 0], minlength=4)).pvalue > 0.001
        else:
            assert not times.any()
        assert {n for kind in found for n, _ in kind} == set(range(20) if split == "train" else range(20, 40))


def test_transforms_are_a_function_of_the_generator():
    x, y = _numbered()

    def noisy(examples):
        return torch.cat([examples, examples + torch.rand(len(examples), 1, dtype=torch.float64)], dim=1)

    source = FewShot(x, y, 2, 3, 4, split=(4, 3, 3), transform=noisy)
    assert source.input_shape == (2,)
    before = torch.random.get_rng_state()
    first, again, other = (source.sample("train", 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.query_x, again.query_x)
    moved = first.query_x[..., 1] - first.query_x[..., 0]
    assert len(moved.unique()) == moved.numel()
    assert not torch.equal(moved, other.query_x[..., 1] - other.query_x[..., 0])
    source = FewShot(x, y, 2, 3, 4, split=(4, 3, 3), transform={"train": torch.neg})
    assert (source.sample("train", 3, torch.Generator()).support_x <= 0).all()
    assert (source.sample("test", 3, torch.Generator()).support_x >= 0).all()


X, Y = _numbered()
REFUSED = {
    "too many ways": ({"ways": 4}, "ways=4: takes at most 3, the classes of the split validation"),
    "too many shots": (
        {"shots": 9},
        r"shots=9: takes at most 9 with .*, the examples of class 0 in the split train",
    ),
    "too many queries": ({"queries": 7}, "queries=7: takes at most 9 with shots and queries together"),
    "one way": ({"ways": 1}, "ways=1: takes a whole number of at least 2"),
    "no shots": ({"shots": 0}, "shots=0: takes a whole number of at least 1"),
    "a word for split_by": ({"split_by": "task"}, "split_by=task: takes one of class, example"),
    "two fractions": ({"split": (0.5, 0.5)}, r"split=\(0.5, 0.5\): takes three fractions or three counts"),
    "more than there is": ({"split": (8, 2, 2)}, r"split=\[8, 2, 2\]: takes at most 10 in all, the classes"),
    "more than all": ({"split": (0.9, 0.2, 0.1)}, r"split=\[0.9, 0.2, 0.1\]: takes fractions whose sum is at most 1"),
    "a negative one": ({"split": (0.9, -0.2, 0.1)}, "split=.*: takes three fractions"),
    "more examples than the smallest class has": (
        {"split_by": "example", "split": (7, 2, 1), "shots": 1, "queries": 1},
        r"split=\[7, 2, 1\]: takes at most 9 in all, the examples of a class",
    ),
    "nothing to train": ({"split": (0, 5, 5)}, "split=nothing to train: takes"),
    "an unknown class": ({"split": {"train": [0, 10]}}, r"split=\{train: \[10\]\}: takes what there is, and .* class"),
    "a class twice": ({"split": {"train": [0, 1], "test": [1, 2]}}, r"split=\{test: \[1\]\}: takes each class once"),
    "an unknown split": ({"split": {"dev": [0, 1]}}, r"split=\{dev: ...\}: takes"),
    "an example twice": (
        {"split_by": "example", "split": {"train": [3, 3]}},
        r"split=\{train: \[3\]\}: takes each example once",
    ),
    "an example that is not there": (
        {"split_by": "example", "split": {"train": [-1]}},
        r"split=\{train: \[-1\]\}: takes what there is, and .* example",
    ),
    "no labels": ({"y": None}, "y=None: takes labels, unless x is a torch.utils.data.Dataset"),
    "too few labels": ({"y": Y[1:]}, r"y=int64 \[105\]: takes a class label, .* for each of 106 examples"),
    "labels that are none": ({"y": Y + 0.5}, r"y=float64 \[106\]: takes a class label"),
    "numbers for examples": ({"x": X[:, 0]}, r"x=\[106\]: takes a tensor or an array"),
    "sequences to turn": ({"rotations": True}, r"rotations=True: takes square images, and examples are \[1\]"),
    "a transform that is none": ({"transform": 3}, "transform={train: 3}: takes a function"),
    "a transform that loses examples": ({"transform": lambda x: x[:0]}, r"transform=\[0, 1\]: takes a function"),
    "transforms that disagree": (
        {"transform": {"train": lambda x: x.repeat(1, 2)}},
        "transform=.*: takes one that gives examples of all splits the same shape",
    ),
    "another loss": ({"loss": "l1"}, "loss=l1: takes one of cross_entropy, mse"),
    "a dataset of singles": ({"x": TensorDataset(X), "y": None}, r"x=a dataset of \(Tensor\): takes one of pairs"),
    "a list": ({"x": [1.0], "y": None}, "y=None: takes labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case):
    changes, text = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{text}") as caught:
        FewShot(**{"x": X, "y": Y, "ways": 2, "shots": 3, "queries": 4, "split": (4, 3, 3), **changes})
    assert "\n" not in str(caught.value)


def test_nothing_is_drawn_of_an_empty_split(generator):
    source, _ = _source(split=(5, 0, 5))
    source.sample("test", 2, generator)
    with pytest.raises(ValueError, match=r"^split=validation: takes one that has classes"):
        source.sample("validation", 2, generator)
    with pytest.raises(ValueError, match=r"^split=valid: takes one of train, validation, test"):
        source.sample("valid", 2, generator)


def test_pools_divide_all_that_fractions_say():
    numbers = np.random.default_rng(1).integers(0, 7, 500)
    found = pools(range(7), numbers, "example", (0.64, 0.16, 0.2))
    together = np.concatenate([pool.order for pool in found.values()])
    assert (np.sort(together) == np.arange(500)).all()
    for pool in found.values():
        for c, examples in enumerate(pool.examples()):
            assert (numbers[examples] == c).all()
            assert (np.diff(examples) > 0).all()


def test_tasks_are_where_the_examples_are(generator):
    source, _ = _source()
    moved = source.to("meta")
    assert moved.sample("train", 2, generator).support_x.is_meta
    assert not source.sample("train", 2, generator).support_x.is_meta
