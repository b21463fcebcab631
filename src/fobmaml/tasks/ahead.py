"""What the next step needs, made by a thread while this step is computed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """``make(step)``, a function of the step alone, for one step after another; inside ``meanwhile(step)`` a thread
    calls it for that step, and ``take(step)`` then has it. What ``make`` raises, ``take`` raises.

    No thread is left when ``meanwhile`` is, so that ``make`` runs beside nothing else.
    """

    def __init__(self, make: Callable[[int], T]):
        self._make = make
        self._made: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        made = self._made.pop(step, None)
        return self._make(step) if made is None else made.result()

    @contextmanager
    def meanwhile(self, step: int) -> Iterator[None]:
        self._made = {step: Future()}
        thread = Thread(target=self._run, args=(step, self._made[step]), name="tasks ahead", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _run(self, step: int, made: Future[T]) -> None:
        try:
            made.set_result(self._make(step))
        except BaseException as error:
            made.set_exception(error)
