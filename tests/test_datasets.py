"""Data sets are read from files as they are passed on, made anew the same, and divided by class where they say so."""

import csv
import hashlib
import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fobmaml.tasks import MNIST1D, Arrays, Digits, ImageFolder, MiniImageNet, Omniglot, Shapes1D, omniglot
from fobmaml.tasks.mnist1d import load_arrays
from fobmaml.tasks.shapes1d import templates
from fobmaml.tasks.splits import SPLITS

Image = pytest.importorskip("PIL.Image", reason="images are read by pillow")
REAL = Path(__file__).parents[2] / "shared" / "data" / "omniglot28.npz"
"""Beside the checkout, on some machines."""


def _drawn(source, split, count=50):
    return source.sample(split, count, torch.Generator().manual_seed(3))


def _picture(path: Path, value: int, size=(12, 12), mode="L") -> None:
    """Grey values value, ..., so that an image says what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "1") else (value, 0, 0)).save(path)


def _classes(source, split) -> set[int]:
    """Values of the pictures that tasks of a split show."""
    batch = _drawn(source, split)
    return {round(255 * float(v)) for v in torch.cat([batch.support_x, batch.query_x], 1)[:, :, 0].unique()}


@pytest.mark.parametrize("rotation", [0, 1, 2])
def test_mnist1d_by_class(rotation):
    source = MNIST1D(ways=2, split_by="class", rotation=rotation)
    digits = [source.classes_of(split) for split in SPLITS]
    assert [len(part) for part in digits] == [6, 2, 2]
    assert sorted(digits[0] + digits[1] + digits[2]) == list(range(10))
    assert source.novel_classes
    assert not MNIST1D().novel_classes
    arrays = load_arrays()
    x, y = (np.concatenate([arrays[name], arrays[f"{name}_test"]]) for name in ("x", "y"))
    for split, held in source.examples.items():
        for digit, rows in zip(source.classes_of(split), held, strict=True):
            np.testing.assert_array_equal(rows, x[y == digit])
    with pytest.raises(ValueError, match=r"^ways=3: takes at most 2, the classes of the split validation"):
        MNIST1D(ways=3, split_by="class")
    with pytest.raises(ValueError, match=r"^rotation=3: takes a whole number of at least 0 and at most 2"):
        MNIST1D(rotation=3)


def test_three_rotations_test_six_digits():
    tested = [MNIST1D(ways=2, split_by="class", rotation=r).classes_of("test") for r in range(3)]
    assert len({digit for digits in tested for digit in digits}) == 6


def test_shapes_are_made_the_same_and_kept(tmp_path):
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    sources = [Shapes1D(classes=30, examples=20, cache=tmp_path / name) for name in ("one", "one", "two")]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["shapes1d-30-20-0.npz"]
    first, *others = (_drawn(source, "test") for source in sources)
    assert all(torch.equal(first.query_x, other.query_x) for other in others)
    source = sources[0]
    assert [len(source.classes_of(split)) for split in SPLITS] == [19, 5, 6]
    assert source.novel_classes
    assert source.input_shape == (40,)
    other = Shapes1D(classes=30, examples=20, seed=1, cache=tmp_path / "one")
    assert not torch.equal(_drawn(other, "test").query_x, first.query_x)


def test_templates_are_scaled_as_mnist1ds():
    from mnist1d.data import get_templates

    ours, theirs = templates(50, 0), get_templates()["x"]
    assert ours.shape == (50, *theirs.shape[1:])
    np.testing.assert_allclose(ours.std(axis=1), theirs.std(axis=1).mean())
    assert not ours[:, 0].any()
    assert np.abs(ours[:, -1]).max() < 1e-12
    shapes = (ours - ours.mean(axis=1, keepdims=True)) / ours.std(axis=1, keepdims=True)
    apart = np.linalg.norm(shapes[:, None] - shapes[None], axis=2)[~np.eye(50, dtype=bool)]
    assert 1.3 <= apart.min() < 1.6
    assert len(templates(300, 1)) == 300
    with pytest.raises(ValueError, match=r"^classes=5000: takes at most \d+, as many as differ enough"):
        templates(5000, 0)


def test_shapes_follow_their_templates(tmp_path):
    """A class's mean spectrum is its own: examples of a class are moved, and their spectra are not."""
    source = Shapes1D(classes=10, examples=60, split=(10, 0, 0), cache=tmp_path)
    spectra = [np.abs(np.fft.rfft(rows.numpy(), axis=1)) for rows in source.examples["train"]]
    means = np.stack([s[:30].mean(0) for s in spectra])
    right = [np.linalg.norm(means - row, axis=1).argmin() == c for c, s in enumerate(spectra) for row in s[30:]]
    assert np.mean(right) > 0.2  # by chance 0.1, give or take 0.02


def test_digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    source = Digits()
    assert source.input_shape == (1, 8, 8)
    assert not source.novel_classes
    assert sum(len(rows) for split in source.examples.values() for rows in split) == 1797
    assert 0.0 <= _drawn(source, "test").support_x.min() < _drawn(source, "test").support_x.max() == 1.0
    assert Digits(ways=2, split_by="class", rotation=1).classes_of("test") == [2, 3]
    five = Digits(split_by="class", split=[5, 0, 5])
    assert (five.classes_of("train"), five.classes_of("test")) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


@pytest.fixture
def npz(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.normal(size=(200, 6)), y=np.repeat(np.arange(20), 10))
    return tmp_path / "own.npz"


def test_arrays(npz, tmp_path):
    source = Arrays(npz, ways=3, shots=2, queries=4)
    assert source.input_shape == (6,)
    assert _drawn(source, "validation").query_x.shape == (50, 12, 6)
    np.savez(tmp_path / "half.npz", x=np.zeros((4, 2)))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}]), y=np.zeros(1))
    (tmp_path / "text.npz").write_text("no archive")
    for path in (None, tmp_path / "none.npz", tmp_path, *(tmp_path / f"{n}.npz" for n in ("half", "pickled", "text"))):
        with pytest.raises(ValueError, match=r"^path=.*: takes an \.npz file with the arrays x \[N, ...\] and y \[N\]"):
            Arrays(path)


def test_an_image_folder(tmp_path):
    for kind in range(10):
        for n in range(4):
            _picture(tmp_path / f"class{kind}" / f"{n}.png", 10 * kind, size=(9 + n, 14))
    (tmp_path / "class0" / "notes.txt").write_text("no image")
    source = ImageFolder(tmp_path, size=6, ways=2, shots=1, queries=2)
    assert source.input_shape == (1, 6, 6)
    assert [source.classes_of(split) for split in SPLITS] == [
        [f"class{kind}" for kind in part] for part in (range(6), (6, 7), (8, 9))
    ]
    assert _classes(source, "train") == {0, 10, 20, 30, 40, 50}
    assert _classes(source, "test") == {80, 90}


@pytest.mark.parametrize("split_by", ["class", "example"])
def test_an_image_folder_that_says_its_split(tmp_path, split_by):
    for at, (name, kinds) in enumerate({"train": range(4), "val": (4, 5), "test": (6, 7)}.items()):
        for kind in kinds if split_by == "class" else range(3):
            for n in range(3):
                _picture(tmp_path / name / f"{kind}" / f"{n}.png", 10 * kind + 80 * at, mode="RGB")
    source = ImageFolder(tmp_path, size=6, ways=2, shots=1, queries=2, split_by=split_by)
    assert source.input_shape == (3, 6, 6)
    if split_by == "class":
        assert [source.classes_of(split) for split in SPLITS] == [["0", "1", "2", "3"], ["4", "5"], ["6", "7"]]
    else:
        assert not source.novel_classes
        assert source.classes_of("test") == ["0", "1", "2"]
        assert {round(255 * float(v)) for v in _drawn(source, "test").query_x[:, :, 0].unique()} == {160, 170, 180}


def test_folders_without_images_are_refused(tmp_path):
    takes = "takes a folder with a folder of images for each class"
    for root, text in (
        (None, f"root=None: {takes}$"),
        (tmp_path / "none", f"root=.*none: {takes}, and there is no such folder"),
        (tmp_path, f"root=.*: {takes}, and in this there is none"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            ImageFolder(root)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"^root=.*b\.png: takes image files, and this is none"):
        ImageFolder(tmp_path)


def _omniglot(root: Path, alphabets=("Aleph", "Beta"), characters=4, drawings=5) -> None:
    """As torchvision lays the files out: 105 × 105, dark ink on white, one bit."""
    for a, alphabet in enumerate(alphabets):
        for c in range(characters):
            for n in range(drawings):
                path = root / alphabet / f"character{c + 1:02}" / f"{n:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("1", (105, 105), 1)
                image.paste(0, (0, 0, 105, 15 * (1 + a * characters + c) // 2))
                image.save(path)


def test_omniglot_by_character(tmp_path):
    _omniglot(tmp_path / "omniglot-py" / "images_background")
    _omniglot(tmp_path / "omniglot-py" / "images_evaluation", ("Gimel",))
    source = Omniglot(tmp_path, ways=2, shots=1, queries=2, split=(6, 2, 4))
    assert source.input_shape == (1, 28, 28)
    assert source.classes_of("test") == [f"images_evaluation/Gimel/character0{c}" for c in (1, 2, 3, 4)]
    assert source.classes_of("validation") == [f"images_background/Beta/character0{c}" for c in (3, 4)]
    batch = _drawn(source, "test")
    assert batch.query_x[:, :, 0, 0].min() > 0.9  # the first line is ink, and ink is bright
    assert batch.query_x[:, :, 0, -1].max() == 0.0
    lines = _drawn(source, "train").support_x[:, :, 0]
    assert {bool(image[0].all()) for image in lines.flatten(0, 1)} == {True, False}  # some are turned


def test_omniglot_from_one_file(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (120, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "own.npz", x=x, y=np.repeat(np.arange(12), 10))
    source = Omniglot(tmp_path / "own.npz", ways=2, rotations=False, split=(6, 3, 3), shots=3, queries=3)
    wanted = {image.tobytes() for image in x[90:]}
    found = (255 * _drawn(source, "test").query_x).round().to(torch.uint8).flatten(0, 1)
    assert {image.numpy().tobytes() for image in found} == wanted
    with pytest.raises(ValueError, match=r"^size=20: takes that of the images in"):
        Omniglot(tmp_path / "own.npz", size=20)


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.name} is not beside this checkout")
def test_real_omniglot():
    source = Omniglot(REAL)
    assert [len(source.classes_of(split)) for split in SPLITS] == [700, 100, 164]
    same = Arrays(REAL, split=[700, 100, 164], rotations=True)
    assert source.input_shape == same.input_shape == (1, 28, 28)
    one, other = _drawn(source, "train"), _drawn(same, "train")
    assert torch.equal(one.query_x, other.query_x)
    assert one.query_x.max() == 1.0
    assert 0.02 < one.query_x.mean() < 0.2  # little ink, and it is bright


def test_omniglot_is_fetched_only_when_asked(tmp_path, monkeypatch):
    asked, archives = [], {}
    for name, alphabets in (("images_background", ("Aleph", "Beta")), ("images_evaluation", ("Gimel",))):
        _omniglot(tmp_path / "made" / name, alphabets)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for path in (tmp_path / "made" / name).rglob("*.png"):
                file.write(path, path.relative_to(tmp_path / "made"))
        archives[f"{omniglot.OMNIGLOT}/{name}.zip"] = buffer.getvalue()

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(archives[url])

    monkeypatch.setattr(omniglot.urllib.request, "urlopen", answer)
    with pytest.raises(ValueError, match=r"^root=.*, which dataset.download=true fetches, .*, and there is none"):
        Omniglot(tmp_path)
    assert not asked
    with pytest.raises(ValueError, match=r"^download=True: takes the published archive, and .* is another file"):
        Omniglot(tmp_path, download=True)
    digests = {url.split("/")[-1][:-4]: hashlib.md5(content).hexdigest() for url, content in archives.items()}
    monkeypatch.setattr(omniglot, "MD5", digests)
    settings = {"ways": 2, "shots": 1, "queries": 2, "split": (6, 2, 4)}
    for _ in range(2):
        Omniglot(tmp_path, download=True, **settings)
    assert len(asked) == 2  # what is there is not fetched again
    Omniglot(tmp_path, **settings)


def test_mini_imagenet(tmp_path):
    kinds = {"train": (0, 1, 2), "val": (3, 4), "test": (5, 6)}
    for name, members in kinds.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["filename", "label"])
            for kind in members:
                for n in range(4):
                    _picture(tmp_path / "images" / f"n{kind}{n}.jpg", 30 * kind, size=(20, 16), mode="RGB")
                    table.writerow([f"n{kind}{n}.jpg", f"n0{kind}"])
    source = MiniImageNet(tmp_path, size=10, ways=2, shots=1, queries=2)
    assert source.input_shape == (3, 10, 10)
    assert [source.classes_of(split) for split in SPLITS] == [[f"n0{k}" for k in part] for part in kinds.values()]
    reds = (255 * _drawn(source, "test").query_x[:, :, 0]).unique()
    assert all(min(abs(float(red) - 150), abs(float(red) - 180)) < 4 for red in reds)  # jpeg is not exact
    with pytest.raises(ValueError, match=r"^download=True: takes false"):
        MiniImageNet(tmp_path, download=True)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(ValueError, match=r"^root=.*: takes a folder with images/, .*val\.csv is not there"):
        MiniImageNet(tmp_path)


QUICK = ("width=4", "steps=2", "meta_batch=2", "eval.tasks=4", "eval.validation_tasks=4", "bias.every=0")


def test_on_the_command_line(run_train, npz):
    small = ("model=mlp", "dataset.shots=2", "dataset.queries=3", "dataset.ways=3")
    done = run_train("dataset=arrays", f"dataset.path={npz}", *small, *QUICK, "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    done = run_train("dataset=arrays", *QUICK)
    assert done.returncode == 1
    assert done.stderr == "error: dataset.path=None: takes an .npz file with the arrays x [N, ...] and y [N]\n"


def test_an_image_folder_on_the_command_line(run_train, tmp_path):
    for kind in range(10):
        for n in range(4):
            _picture(tmp_path / "own" / f"class{kind}" / f"{n}.png", 10 * kind)
    small = ("model=mlp", "dataset.size=8", "dataset.shots=2", "dataset.queries=2", "dataset.ways=2")
    small += ("dataset.split=[6,2,2]",)
    done = run_train("dataset=image_folder", "dataset.root=own", *small, *QUICK, "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
