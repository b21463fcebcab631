"""N-way k-shot tasks from image files, in a folder for each class.

Pillow reads them, which comes with matplotlib: by default torchvision's ImageFolder does so, too, and each of
torchvision's releases takes one release of torch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.tasks.batch import Split
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.splits import Division

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
GREY = ("1", "L", "LA", "I;16")
"""Pillow's modes of images without colours."""
FOLDERS: dict[str, Split] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """uint8 [N, channels, size, size]: one channel if all images are grey, else three. Scaled, whatever their shape.

    Raises ValueError naming the file that is no image, ModuleNotFoundError without Pillow.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "images are read by the package pillow, which is not installed: pip install 'fobmaml[run]'", name=error.name
        ) from None

    whole_number("size", size)
    arrays, path = [], Path()
    try:
        modes = set()
        for path in paths:
            with Image.open(path) as image:  # reads the header
                modes.add(image.mode)
        mode = "L" if modes <= set(GREY) else "RGB"
        for path in paths:
            with Image.open(path) as image:
                arrays.append(np.asarray(image.convert(mode).resize((size, size), Image.Resampling.BILINEAR)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise refuse("root", path, f"image files, and this is none ({str(error).splitlines()[0]})") from error
    images = torch.from_numpy(np.stack(arrays))
    return images.unsqueeze(1) if mode == "L" else images.movedim(-1, 1).contiguous()


def classes_in(folder: Path) -> list[tuple[Path, str]]:
    """The image files of a folder's folders, each with the name of its class, in alphabetical order."""
    return [
        (path, kind.name)
        for kind in sorted(folder.iterdir())
        if kind.is_dir()
        for path in sorted(kind.rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]


def existing_folder(root: str | Path | None, takes: str) -> Path:
    """``root``. Raises ValueError where it is none."""
    if root is None or not Path(root).is_dir():
        raise refuse("root", root, takes if root is None else f"{takes}, and there is no such folder")
    return Path(root)


class ImageFolder(FewShot):
    """``FewShot`` from images in folders below ``root``: ROOT/CLASS/FILE, or ROOT/train/CLASS/FILE with ``val`` (or
    ``validation``) and ``test`` beside ``train``, which then say the split. Images are scaled to ``size`` × ``size``.

    Raises ValueError as ``FewShot`` does, and for a folder without images.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        size: int = 28,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        split_by: str = "class",
        split: Division | None = None,
        rotations: bool = False,
        loss: str = "cross_entropy",
    ):
        takes, found = "a folder with a folder of images for each class", list[tuple[Path, str]]()
        folder = existing_folder(root, takes)
        parts = {name: folder / name for name in FOLDERS if (folder / name).is_dir()}
        if {"train", "test"} <= parts.keys():
            by_class, by_example = dict[Split, set[str]](), dict[Split, range]()
            for name, part in parts.items():
                files = classes_in(part)
                by_class[FOLDERS[name]] = {kind for _, kind in files}
                by_example[FOLDERS[name]] = range(len(found), len(found) + len(files))
                found += files
            split = {name: sorted(kinds) for name, kinds in by_class.items()} if split_by == "class" else by_example
        else:
            found = classes_in(folder)
        if not found:
            raise refuse("root", root, f"{takes}, and in this there is none")
        paths, labels = zip(*found, strict=True)
        super().__init__(read_images(paths, size), labels, ways, shots, queries, split_by, split, rotations, loss=loss)
