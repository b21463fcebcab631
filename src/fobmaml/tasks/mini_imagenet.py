"""N-way k-shot tasks from miniImageNet (Vinyals et al. 2016, arXiv:1606.04080; split of Ravi & Larochelle 2017)."""

import csv
from pathlib import Path

from fobmaml.arguments import refuse
from fobmaml.tasks.batch import Split
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.images import FOLDERS, existing_folder, read_images

TAKES = "a folder with images/, train.csv, val.csv and test.csv"


class MiniImageNet(FewShot):
    """100 classes of ImageNet, 600 images each, as [3, size, size]; 64 to train, 16 to validate, 20 to test.

    ``root``: a folder with images/ and train.csv, val.csv, test.csv, tables of filename and label (Ravi & Larochelle
    2017), as it is usually passed on. ImageNet's terms do not let this program fetch it, so that
    ``download`` has to be false. Memory: 1.3 GB at size 84.
    Raises ValueError as ``FewShot`` does, and for another folder.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        size: int = 84,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        download: bool = False,
        loss: str = "cross_entropy",
    ):
        if download:
            raise refuse("download", download, "false: ImageNet's terms forbid to pass the images on")
        folder = existing_folder(root, TAKES)
        paths, labels, split = list[Path](), list[str](), dict[Split, list[str]]()
        for name in ("train", "val", "test"):
            table = folder / f"{name}.csv"
            if not table.is_file():
                raise refuse("root", root, f"{TAKES}, and {table} is not there")
            with table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if not rows or not {"filename", "label"} <= rows[0].keys():
                raise refuse("root", root, f"tables with the columns filename and label, and {table} is none")
            paths += [folder / "images" / row["filename"] for row in rows]
            labels += [row["label"] for row in rows]
            split[FOLDERS[name]] = sorted({row["label"] for row in rows})
        super().__init__(read_images(paths, size), labels, ways, shots, queries, "class", split, loss=loss)
