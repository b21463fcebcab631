"""Float32 arithmetic with all of its digits: differences of solutions are lost in TF32 or bfloat16."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import backends

_PRODUCTS: list[Any] = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
_CONVOLUTIONS: list[Any] = [getattr(backends.cudnn, name, None) for name in ("conv", "rnn")]
_OTHERS: list[Any] = [getattr(backends.mkldnn, name, None) for name in ("conv", "rnn")]
_OPERATIONS = _PRODUCTS + _CONVOLUTIONS + _OTHERS
_GROUPS: list[Any] = [backends, backends.cudnn]
"""What operations inherit from, where they have no precision of their own."""
for _places in (_PRODUCTS, _CONVOLUTIONS, _OPERATIONS, _GROUPS):  # older releases have none of these settings
    _places[:] = [place for place in _places if hasattr(place, "fp32_precision")]

T = TypeVar("T")


class SharedChange:
    """A change of settings that are the process's: the first of several threads to enter makes it, the last to leave
    takes it back. Nests."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]):
        self._change, self._lock, self._users = change, threading.Lock(), 0
        self._made: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._made = self._change()
                self._made.__enter__()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._made.__exit__(None, None, None)


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Inside, float32 products and convolutions on ``device`` are computed in float32, and autocast is off.

    Nests, also in threads. Costs some thirty microseconds.
    """
    kind = torch.device(device).type
    with _all_digits, torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        yield


@contextmanager
def _float32_throughout() -> Iterator[None]:
    own = []
    for place in _GROUPS + _OPERATIONS:  # a group first: then an operation shows its own value, not an inherited one
        own.append((place, place.fp32_precision))
        place.fp32_precision = "none"
    products = _older(torch.get_float32_matmul_precision, _PRODUCTS, "none none", "tf32 tf32", "tf32 bf16")
    convolutions = _older(lambda: backends.cudnn.allow_tf32, _CONVOLUTIONS, "none none", "tf32 tf32")
    torch.set_float32_matmul_precision("highest")  # also cuda.matmul.allow_tf32
    backends.cudnn.allow_tf32 = False
    for place in _OPERATIONS:
        place.fp32_precision = "ieee"

    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for place, value in own:  # after the older settings, which write to these
            place.fp32_precision = value


_all_digits = SharedChange(_float32_throughout)


def _older(read: Callable[[], T], places: list[Any], *consistent: str) -> T | None:
    """An older setting, which torch refuses to read where newer ones contradict it: beside those that do not."""
    for values in consistent:
        for place, value in zip(places, values.split(), strict=False):  # without places, in an older release
            place.fp32_precision = value
        with suppress(RuntimeError):
            return read()
    return None
