"""Float32 arithmetic with all of its digits: differences of solutions are lost in TF32 or bfloat16."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import backends

_OPERATIONS: list[Any] = [place for place in (
    backends.cuda.matmul, *(getattr(backends.cudnn, operation, None) for operation in ("conv", "rnn")),
    *(getattr(backends.mkldnn, operation, None) for operation in ("matmul", "conv", "rnn")))
    if hasattr(place, "fp32_precision")]
_GROUPS: list[Any] = [place for place in (backends, backends.cudnn) if hasattr(place, "fp32_precision")]
"""What operations inherit from, where they have no precision of their own. Older releases have neither."""

T = TypeVar("T")

_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None] = lambda: None  # noqa: E731


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Inside, float32 products and convolutions on ``device`` are computed in float32, and autocast is off.

    The flags are the process's own: the first thread that enters sets them, and the last that leaves puts them back.
    Nests. Costs some thirty microseconds.
    """
    kind = torch.device(device).type
    _enter()
    try:
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _restore
    with _lock:
        if not _inside:
            _restore = _set()
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            _restore()


def _set() -> Callable[[], None]:
    """Sets every flag to full precision, and returns what puts it back as it was."""
    products, in_tf32 = _legacy(torch.get_float32_matmul_precision), _legacy(lambda: backends.cuda.matmul.allow_tf32)
    convolutions = _legacy(lambda: backends.cudnn.allow_tf32)
    own = []
    for place in _GROUPS + _OPERATIONS:  # a group first: then an operation shows its own value, not an inherited one
        own.append((place, place.fp32_precision))
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")  # also cuda.matmul.allow_tf32
    if convolutions is not None:
        backends.cudnn.allow_tf32 = False
    for place in _OPERATIONS:
        place.fp32_precision = "ieee"

    def restore() -> None:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        elif in_tf32 is not None:
            backends.cuda.matmul.allow_tf32 = in_tf32
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for place, value in own:  # after the older settings, which write to these
            place.fp32_precision = value

    return restore


def _legacy(read: Callable[[], T]) -> T | None:
    """None where newer settings contradict the older one, which torch then refuses to read."""
    try:
        return read()
    except RuntimeError:
        return None
