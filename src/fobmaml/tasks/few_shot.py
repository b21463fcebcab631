"""N-way k-shot tasks from labelled examples."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fobmaml.arguments import one_of, refuse, whole_number
from fobmaml.engine.losses import LossFn
from fobmaml.tasks.batch import Split, TaskBatch
from fobmaml.tasks.splits import SPLITS, Division, Numbers, pools

Transform = Callable[[Tensor], Tensor]
FRACTIONS = (0.64, 0.16, 0.2)
LOW, NEVER = 2**32 - 1, 2**63 - 1


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """(outputs − one-hot targets)², the mean over examples and classes: [N, C], [N] -> scalar."""
    one_hot = targets.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=targets.device)
    return (outputs - one_hot.to(outputs.dtype)).square().mean()


LOSSES: dict[str, LossFn] = {"cross_entropy": F.cross_entropy, "mse": mean_squared_error}


class FewShot:
    """Each task takes ``ways`` classes in random label order, and of each class ``shots`` support and ``queries`` query
    examples, all distinct and every choice uniform.

    ``x``: the examples, a tensor or an array [N, ...], with their labels ``y`` [N], numbers or words; or, without
    ``y``, any ``torch.utils.data.Dataset`` of pairs (example, label), which is read once, whole. uint8 is taken for
    images [N, H, W] or [N, channels, H, W]; tasks have floats from 0 to 1, and at least one channel. Tasks are where
    ``x`` is (``to``), their random numbers always from a generator on the CPU, so that they are the same everywhere.

    ``split_by``: ``class``: test tasks are of classes that training has not seen, the standard of few-shot learning.
    ``example``: every split has all classes, and examples of its own. ``split``: what train, validation and test get
    of the classes, in the order of their labels, or of the examples of each class, in the order of ``x``: three
    fractions, or three counts, or a mapping of these names to lists of labels or of numbers of examples; None: 64, 16
    and 20 %. A split may be empty, as long as nothing is drawn from it.

    ``rotations``: each class of a training task is turned by a random multiple of 90°, so that there are four times as
    many classes. ``transform``: what drawn examples [n, ...] go through, in all splits, or a mapping of the splits in
    which they do to functions; its random choices, if they are by torch's own generator, are a function of the task's.
    ``loss``: ``cross_entropy``, or ``mse``, the mean squared distance of the outputs to one-hot targets.

    Cost: gathers of the drawn examples, and about three random numbers for two of them, however large the classes are
    (``distinct``).
    Raises ValueError for examples and labels that do not belong together, and for a split with too few classes or
    too few examples of a class.

    >>> x, y = torch.randn(1000, 28, 28), torch.arange(1000) % 40
    >>> source = fobmaml.tasks.FewShot(x, y, ways=5, shots=5, queries=10)
    >>> source.sample("test", 2, torch.Generator().manual_seed(0)).query_x.shape
    torch.Size([2, 50, 28, 28])
    """

    classification = True

    def __init__(
        self,
        x: Tensor | NDArray[Any] | Dataset[Any],
        y: Any = None,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        split_by: str = "class",
        split: Division | None = None,
        rotations: bool = False,
        transform: Transform | Mapping[Split, Transform] | None = None,
        loss: str = "cross_entropy",
    ):
        self.ways = self.outputs = whole_number("ways", ways, at_least=2)
        self.shots = whole_number("shots", shots)
        self.queries = whole_number("queries", queries)
        self.loss_fn = LOSSES[one_of("loss", loss, tuple(LOSSES))]
        self._labels = [torch.arange(self.ways).repeat_interleave(each) for each in (self.shots, self.queries)]
        self.rotations = rotations
        self._transforms = _transforms(transform)
        self._x, labels = _examples(x, y)
        classes, numbers = np.unique(labels, return_inverse=True)
        self.classes: list[Any] = classes.tolist()
        self._pools = pools(self.classes, numbers, split_by, FRACTIONS if split is None else split)
        self._check_sizes()
        seen = self._pools["train"], self._pools["test"]
        self.novel_classes = not (seen[0] and seen[1] and set(seen[0].classes) & set(seen[1].classes))
        """Whether test classes are none of the classes that training sees."""
        if rotations and (self._x.dim() < 3 or self._x.shape[-1] != self._x.shape[-2]):
            raise refuse("rotations", rotations, f"square images, and examples are {list(self._x.shape[1:])}")
        self.input_shape = self._input_shape()

    def _check_sizes(self) -> None:
        if self._pools["train"] is None:
            raise refuse("split", "nothing to train", "one with classes for training")
        found = {split: pool for split, pool in self._pools.items() if pool is not None}
        for split, pool in found.items():
            if len(pool.classes) < self.ways:
                raise refuse("ways", self.ways, f"at most {len(pool.classes)}, the classes of the split {split}")
        split, pool = min(found.items(), key=lambda item: item[1].counts.min())
        if self.shots + self.queries > (fewest := pool.counts.min()):
            name, value = ("shots", self.shots) if self.shots >= fewest else ("queries", self.queries)
            smallest = self.classes[pool.classes[int(pool.counts.argmin())]]
            raise refuse(
                name,
                value,
                f"at most {fewest} with shots and queries together, the examples of class {smallest} in the split "
                f"{split} (shots={self.shots}, queries={self.queries})",
            )

    def _input_shape(self) -> tuple[int, ...]:
        """Of an example as it is drawn."""
        generator = torch.Generator().manual_seed(0)
        shapes = {
            split: tuple(self._transformed(self._x[torch.from_numpy(pool.order[:1])], split, generator).shape[1:])
            for split, pool in self._pools.items()
            if pool is not None
        }
        if len(set(shapes.values())) > 1:
            raise refuse("transform", shapes, "one that gives examples of all splits the same shape")
        return shapes["train"]

    @property
    def examples(self) -> dict[Split, list[Tensor]]:
        """Of each split the examples of its classes, before any transform."""
        return {
            split: [self._x[numbers] for numbers in pool.examples()] if pool else []
            for split, pool in self._pools.items()
        }

    def classes_of(self, split: Split) -> list[Any]:
        """The labels of the classes of a split."""
        pool = self._pools[split]
        return [] if pool is None else [self.classes[number] for number in pool.classes]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The same with its examples on ``device``, where tasks are then gathered; floating-point ones as ``dtype``,
        unless a transform is to see them as they were given."""
        other = copy(self)
        converts = self._x.is_floating_point() and not self._transforms
        other._x = self._x.to(device, dtype if converts else None)
        return other

    def sample(self, split: Split, count: int, generator: torch.Generator) -> TaskBatch:
        return self.sample_each(split, count, [generator])

    def sample_each(self, split: Split, count: int, generators: Sequence[torch.Generator]) -> TaskBatch:
        """What ``sample`` makes with each of the generators, one after another in one batch: faster than apart."""
        one_of("split", split, SPLITS)
        if (pool := self._pools[split]) is None:
            raise refuse("split", split, "one that has classes, and this has none")
        tasks = count * len(generators)
        classes = distinct(np.full(tasks, len(pool.counts)), self.ways, generators)
        take = self.shots + self.queries
        places = distinct(pool.counts[classes].ravel(), take, generators).reshape(*classes.shape, take)
        chosen = pool.order[pool.starts[classes][..., None] + places]
        turns = None
        if self.rotations and split == "train":
            turns = torch.cat([torch.randint(4, (count, self.ways, 1), generator=each) for each in generators])
        parts: list[Tensor] = []
        for numbers, labels in zip((chosen[..., : self.shots], chosen[..., self.shots :]), self._labels, strict=True):
            x = self._x.index_select(0, torch.from_numpy(numbers.reshape(-1)).to(self._x.device))
            if turns is not None:
                x = _turned(x, turns.expand(-1, -1, numbers.shape[2]).flatten())
            if split in self._transforms:
                drawn = zip(x.chunk(len(generators)), generators, strict=True)
                x = torch.cat([self._transformed(part, split, each) for part, each in drawn])
            else:
                x = _floats(x)
            parts += [x.view(tasks, -1, *x.shape[1:]), labels.to(x.device).expand(tasks, -1).clone()]
        return TaskBatch(*parts)

    def _transformed(self, x: Tensor, split: Split, generator: torch.Generator) -> Tensor:
        """Drawn examples [n, ...] as floats, through the split's transform."""
        x = _floats(x)
        if (transform := self._transforms.get(split)) is None:
            return x
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            found = transform(x)
        if not isinstance(found, Tensor) or len(found) != len(x):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise refuse("transform", got, f"a function that returns as many examples as it gets, here {len(x)}")
        return found


def distinct(sizes: Numbers, take: int, generators: Sequence[torch.Generator]) -> Numbers:
    """``take`` distinct numbers below each of ``sizes`` [n], in random order, every choice uniform: [n, take]; each
    generator draws for its share of the rows, as it does alone.

    The first ``take`` that are new among 3/2 ``take`` draws with replacement, so that sizes cost nothing. Where one is
    below 4 ``take``, as many random numbers as the largest size a row, and the places of those that are greatest.
    """
    share, most, fewest = len(sizes) // len(generators), int(sizes.max()), int(sizes.min())
    if fewest < 4 * take and fewest < most and len(generators) > 1:
        parts = zip(np.split(sizes, len(generators)), generators, strict=True)
        return np.concatenate([distinct(part, take, [each]) for part, each in parts])
    if fewest < 4 * take:
        keys = torch.cat([torch.rand(share, most, generator=each) for each in generators])
        if fewest < most:
            keys[torch.from_numpy(np.arange(most) >= sizes[:, None])] = -1.0
        places: Numbers = keys.topk(take).indices.numpy()
        return places
    draws = take + take // 2 + 2
    uniform = torch.cat([torch.rand(share, draws, generator=each, dtype=torch.float64) for each in generators])
    # Numbers and when they were drawn as one integer: sorted once to find what was drawn before, once more by time.
    packed = ((uniform.numpy() * sizes[:, None]).astype(np.int64) << 32) | np.arange(draws)
    packed.sort(axis=1)
    numbers = packed >> 32
    by_time = ((packed & LOW) << 32) | numbers
    by_time[:, 1:][numbers[:, 1:] == numbers[:, :-1]] = NEVER
    by_time.sort(axis=1)
    found: Numbers = by_time[:, :take] & LOW
    few = by_time[:, take - 1] == NEVER
    for number in set(few.nonzero()[0] // share):
        again = few & (np.arange(len(sizes)) // share == number)
        found[again] = distinct(sizes[again], take, [generators[number]])
    return found


def _floats(x: Tensor) -> Tensor:
    """Images of bytes as numbers from 0 to 1."""
    return x.to(torch.float32).div_(255.0) if x.dtype == torch.uint8 else x


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Images [n, ..., size, size], each by so many times 90° [n]."""
    turned = images.clone()
    for times in (1, 2, 3):
        some = (turns == times).nonzero().flatten().to(images.device)
        turned[some] = images[some].rot90(times, (-2, -1))
    return turned


def _transforms(transform: Transform | Mapping[Split, Transform] | None) -> Mapping[Split, Transform]:
    """By split."""
    if not isinstance(transform, Mapping):
        transform = {} if transform is None else dict.fromkeys(SPLITS, transform)
    for split, each in transform.items():
        if split not in SPLITS or not callable(each):
            takes = f"a function, or a mapping of {', '.join(SPLITS)} to functions"
            raise refuse("transform", f"{{{split}: {each}}}", takes)
    return transform


def _examples(x: Any, y: Any) -> tuple[Tensor, NDArray[Any]]:
    """Examples [N, ...] and labels [N]."""
    if y is None:
        x, y = _read(x)
    x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if not isinstance(x, Tensor) or x.dim() < 2:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise refuse("x", got, "a tensor or an array [N, ...], or with y=None a torch.utils.data.Dataset")
    labels = y.cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.shape != x.shape[:1] or labels.dtype.kind not in "biuUS":
        takes = f"a class label, a whole number or a word, for each of {len(x)} examples"
        raise refuse("y", f"{labels.dtype} {list(labels.shape)}", takes)
    return x.unsqueeze(1) if x.dtype == torch.uint8 and x.dim() == 3 else x, labels


def _read(dataset: Any) -> tuple[Tensor, NDArray[Any]]:
    """All pairs of a dataset."""
    if isinstance(dataset, Tensor | np.ndarray) or not isinstance(dataset, Dataset):
        raise refuse("y", None, "labels, unless x is a torch.utils.data.Dataset of pairs (example, label)")
    pairs = dataset if hasattr(dataset, "__iter__") else (dataset[i] for i in range(len(dataset)))  # type: ignore[arg-type]
    examples, labels = [], []
    for pair in pairs:
        parts = pair if isinstance(pair, tuple | list) else [pair]
        if len(parts) != 2 or not isinstance(parts[0], Tensor | np.ndarray):
            got = ", ".join(type(part).__name__ for part in parts)
            raise refuse("x", f"a dataset of ({got})", "one of pairs (tensor or array, label)")
        examples.append(torch.as_tensor(pair[0]))
        labels.append(pair[1].item() if isinstance(pair[1], Tensor | np.generic) else pair[1])
    if len({example.shape for example in examples}) != 1:
        raise refuse("x", f"a dataset of {len(examples)} examples", "one of examples of one shape")
    return torch.stack(examples), np.asarray(labels)
