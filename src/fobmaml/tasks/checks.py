"""Whether a source of tasks is what ``TaskSource`` says; what is not gets one line that names the member."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from fobmaml.arguments import refuse, whole_number
from fobmaml.measure.accuracy import ignored_label
from fobmaml.tasks.batch import Split, TaskBatch, TaskSource
from fobmaml.tasks.few_shot import FewShot


def check_members(source: Any) -> None:
    """Raises ValueError for a member that is missing or of another kind."""
    takes = {
        "sample": "a method sample(split, count, generator)",
        "input_shape": "a tuple, the shape of one example",
        "outputs": "a whole number of at least 1, the values that the network returns",
        "classification": "true or false",
        "loss_fn": "a function (outputs, targets) -> mean loss",
    }
    for name, what in takes.items():
        if not hasattr(source, name):
            raise ValueError(f"dataset: {type(source).__name__} has no {name}: takes {what}")
    shape = source.input_shape
    try:
        if not _accepts(source.sample, 3):
            raise refuse("sample", _named(source.sample), takes["sample"])
        for each in _shapes(shape):
            if isinstance(each, str) or not isinstance(each, Sequence):
                raise refuse("input_shape", each, takes["input_shape"])
            for size in each:
                whole_number("input_shape", size)
        if not isinstance(source.classification, bool):
            raise refuse("classification", source.classification, takes["classification"])
        whole_number("outputs", source.outputs, at_least=2 if source.classification else 1)
        if _became_a_method(source):
            name = source.loss_fn.__name__
            raise refuse("loss_fn", name, f"staticmethod({name}) in a class, where a bare function becomes a method")
        for name in ("loss_fn", "support_loss"):
            loss = getattr(source, name, source.loss_fn)
            if not _accepts(loss, 2):
                raise refuse(name, _named(loss), takes["loss_fn"])
    except ValueError as error:
        raise ValueError(f"dataset: {error}") from None


def _shapes(shape: Any) -> list[Any]:
    """One for each tensor of an example."""
    if isinstance(shape, Mapping):
        return list(shape.values())
    several = isinstance(shape, tuple | list) and any(isinstance(part, tuple | list) for part in shape)
    return list(shape) if several else [shape]


def _became_a_method(source: Any) -> bool:
    """Whether ``loss_fn`` is a function of two tensors that a class body holds without ``staticmethod``."""
    method = source.loss_fn
    return (
        inspect.ismethod(method)
        and method.__self__ is source
        and next(iter(inspect.signature(method.__func__).parameters), "") != "self"
    )


def _accepts(function: Any, arguments: int) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        pass
    return True


def _named(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def samples_each(source: Any) -> bool:
    """Whether ``sample_each`` is for its ``sample``, which a class of somebody's may have replaced."""
    return getattr(source.sample, "__func__", None) is FewShot.sample


def sample(source: TaskSource, split: Split, count: int, generators: Sequence[torch.Generator]) -> TaskBatch:
    """What ``source.sample`` returns with each of the generators, several only where it ``samples_each``. Raises
    ValueError where it raises, or returns something else than it has to."""
    what = f"dataset: sample('{split}', {count})"
    with failures_named(what, ValueError):
        if len(generators) == 1:
            tasks = source.sample(split, count, generators[0])
        else:
            tasks = cast(FewShot, source).sample_each(split, count, generators)
    count *= len(generators)
    if not isinstance(tasks, TaskBatch):
        raise ValueError(f"{what} returned a {type(tasks).__name__}: takes a fobmaml.TaskBatch")
    if len(tasks) != count:
        raise ValueError(f"{what} returned {len(tasks)} tasks: takes {count}")
    found: Any = tuple(tasks.support_x.shape[2:]) if tasks.layout is None else tasks.layout.input_shape
    wanted: Any = source.input_shape
    if tasks.layout is None or tasks.layout.names is None:
        wanted = tuple(tuple(part) if isinstance(part, Sequence) else part for part in wanted)
    if found != wanted:
        raise ValueError(f"{what} returned examples of shape {found}: takes input_shape, {wanted}")
    if source.classification:
        for name in ("support_y", "query_y"):
            _check_labels(f"{what}: {name}", getattr(tasks, name), source)
    return tasks


def _check_labels(what: str, labels: Tensor, source: TaskSource) -> None:
    if labels.is_floating_point():  # probabilities of classes
        return
    least, most = (int(each) for each in labels.aminmax())
    if least >= 0 and most < source.outputs:
        return
    labels, ignored = labels.long(), ignored_label(source.loss_fn)
    wrong = (labels != ignored) & ((labels < 0) | (labels >= source.outputs))
    if wrong.any():
        raise ValueError(
            f"{what} holds the label {int(labels[wrong][0])}: takes 0 ... {source.outputs - 1} (outputs), "
            f"or {ignored}, which the loss ignores (another one: its ignore_index)"
        )


def check_repeats(first: TaskBatch, second: TaskBatch) -> None:
    """Raises ValueError where equal generators did not make equal tasks: such a run could not be continued."""
    for name in ("support_x", "support_y", "query_x", "query_y", "support_mask", "query_mask"):
        one, other = getattr(first, name), getattr(second, name)
        if one is other is None:
            continue
        alike = one is not None and other is not None and one.shape == other.shape
        if not alike or not ((one == other) | (one != one)).all():  # NaN is a missing value
            raise ValueError(
                f"dataset: sample returned another {name} with the same generator: takes all randomness "
                "from its generator"
            )


@contextmanager
def failures_named(what: str, *also: type[Exception]) -> Iterator[None]:
    """Whatever is raised inside, other than a ValueError that names its argument itself, as one line: ``what`` failed.

    ``also``: errors that are named as well, though they are ValueErrors.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, also):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{what} failed: {type(error).__name__}{': ' * bool(text)}{text}") from error
