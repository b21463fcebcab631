"""N-way k-shot tasks from an .npz file of labelled examples."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fobmaml.arguments import refuse
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.splits import Division


def read_npz(path: str | Path, name: str = "path") -> tuple[NDArray[Any], NDArray[Any]]:
    """``x`` and ``y`` of an .npz file, in which no pickle is read. Raises ValueError, naming the argument, for another
    file."""
    takes = "an .npz file with the arrays x [N, ...] and y [N]"
    if not Path(path).is_file():
        raise refuse(name, path, f"{takes}, and there is none")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["x"], file["y"]
    except Exception as error:  # of any of the parsers in between
        raise refuse(name, path, f"{takes} ({str(error).splitlines()[0]})") from error


class Arrays(FewShot):
    """``FewShot`` from the arrays ``x`` [N, ...] and ``y`` [N] of the file ``path``. Raises ValueError as it does."""

    def __init__(
        self,
        path: str | Path | None = None,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        split_by: str = "class",
        split: Division | None = None,
        rotations: bool = False,
        loss: str = "cross_entropy",
    ):
        if path is None:
            raise refuse("path", path, "an .npz file with the arrays x [N, ...] and y [N]")
        super().__init__(*read_npz(path), ways, shots, queries, split_by, split, rotations, loss=loss)
