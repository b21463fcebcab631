"""N-way k-shot tasks from Omniglot (Lake, Salakhutdinov & Tenenbaum 2015, Science 350)."""

import hashlib
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.files import write_atomically
from fobmaml.tasks.arrays import read_npz
from fobmaml.tasks.few_shot import FRACTIONS, FewShot
from fobmaml.tasks.images import classes_in, read_images
from fobmaml.tasks.splits import Division

OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
CHARACTERS: dict[int, Division] = {1623: (1100, 100, 423), 964: (700, 100, 164)}
"""How Omniglot's characters are divided: all, or the background set alone."""


class Omniglot(FewShot):
    """Characters of 50 alphabets, 20 drawings each, as images [1, size, size]
    with bright ink.

    ``root``: a folder with the files as torchvision lays them out, omniglot-py/images_background/ALPHABET/CHARACTER/
    and images_evaluation beside it, if that is there; or an .npz file of them (``Arrays``). ``download``: fetch what is
    not there. ``split``: by character, in the order of their alphabets, so that most test alphabets are new, too; None:
    1100 / 100 / 423 of all 1623, 700 / 100 / 164 of the 964 of the background set. ``rotations``: those to train are
    turned by multiples of 90°.
    Raises ValueError as ``FewShot`` does, and for a folder without them.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        size: int = 28,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        split: Division | None = None,
        rotations: bool = True,
        download: bool = False,
        loss: str = "cross_entropy",
    ):
        if root is not None and Path(root).suffix == ".npz":
            x, y = read_npz(root, "root")
            images, labels = torch.from_numpy(x), y
            if images.shape[1:] != (size, size) or images.dtype != torch.uint8:
                raise refuse("size", size, f"that of the images in {root}, {images.dtype} {list(images.shape[1:])}")
        else:
            images, labels = _drawings(root, size, download)
        split = split or CHARACTERS.get(len(np.unique(labels)), FRACTIONS)
        super().__init__(images, labels, ways, shots, queries, "class", split, rotations, loss=loss)


def _drawings(root: str | Path | None, size: int, download: bool) -> tuple[Tensor, NDArray[Any]]:
    takes = "a folder with omniglot-py/images_background, which dataset.download=true fetches, or an .npz file"
    if root is None:
        raise refuse("root", root, takes)
    folder = Path(root) / "omniglot-py"
    if download:
        for name in MD5:
            _fetch(name, folder)
    found: list[tuple[Path, str]] = []
    for name in MD5:
        if (folder / name).is_dir():
            for alphabet in sorted((folder / name).iterdir()):
                found += [(path, f"{name}/{alphabet.name}/{kind}") for path, kind in classes_in(alphabet)]
    if not found:
        raise refuse("root", root, f"{takes}, and there is none")
    paths, labels = zip(*found, strict=True)
    return 255 - read_images(paths, size), np.asarray(labels)


def _fetch(name: str, folder: Path) -> None:
    """One of Omniglot's archives, as folders. Raises ValueError if it cannot be fetched whole."""
    if (folder / name).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{name}.zip"
    if not archive.is_file():
        try:
            with urllib.request.urlopen(f"{OMNIGLOT}/{name}.zip", timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise refuse("download", True, f"a way to {OMNIGLOT}/{name}.zip ({error})") from error
        write_atomically(archive, lambda file: file.write(content))
    if hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() != MD5[name]:
        raise refuse("download", True, f"the published archive, and {archive} is another file or damaged")
    part = folder / f".{name}.part"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(part)
    (part / name).rename(folder / name)
    part.rmdir()
