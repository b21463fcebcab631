"""N-way k-shot tasks from scikit-learn's digits, real images that come with the package."""

from fobmaml.arguments import one_of
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.mnist1d import held_out_digits
from fobmaml.tasks.splits import Division


class Digits(FewShot):
    """Handwritten digits, 1797 images [1, 8, 8] with values from 0 to 1 (Alpaydin & Kaynak 1998, the test part of UCI's
    optical recognition of handwritten digits).

    ``split_by``: ``example``: every split has all ten digits, so that the digits of test tasks were seen in training;
    64, 16 and 20 % of each digit's images. ``class``: six digits to train, two each to validate and test (so
    ``ways=2``); ``rotation``, 0, 1 or 2, says which. ``split``: another one, as of ``FewShot``.
    Raises ValueError as ``FewShot`` does, ModuleNotFoundError without scikit-learn.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        split_by: str = "example",
        rotation: int = 0,
        split: Division | None = None,
        loss: str = "cross_entropy",
    ):
        one_of("split_by", split_by, ("class", "example"))
        by_class = held_out_digits(rotation)
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the digits come with scikit-learn, which is not installed: pip install 'fobmaml[digits]'",
                name=error.name,
            ) from None
        data = load_digits()
        if split is None and split_by == "class":
            split = by_class
        super().__init__(data.images[:, None] / 16.0, data.target, ways, shots, queries, split_by, split, loss=loss)
