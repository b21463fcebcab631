"""The tasks of meta-steps, made before they are needed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

from fobmaml.tasks.batch import TaskBatch

TOGETHER, BYTES = 8, 2**22
"""Steps whose tasks are made together, if they are no larger than that: most of what small tasks cost is the way
through the program, which a meta-gradient drives out of the processor's caches."""


class Ahead:
    """``make(steps)``, tasks as functions of their steps alone, for one step after another below ``end``: for some
    ``together``, or inside ``meanwhile(step)`` by a thread for that step. What ``make`` raises, ``take`` raises at its
    step.

    No thread is left when ``meanwhile`` is, so that ``make`` runs beside nothing else.
    """

    def __init__(self, make: Callable[[Sequence[int]], list[TaskBatch]], end: int | None = None, together: bool = True):
        self._make, self._end = make, end
        self._made: dict[int, Future[TaskBatch]] = {}
        self._together = None if together else 1  # None: not known before the first tasks are there

    def take(self, step: int) -> TaskBatch:
        if step in self._made:
            return self._made.pop(step).result()
        steps = range(step, step + (self._together or 1))
        steps = steps if self._end is None else steps[: max(self._end - step, 1)]
        self._made = {each: Future() for each in steps}
        try:
            found = self._make(steps)
        except Exception:
            if len(steps) == 1:
                raise
            found, self._made = self._make([step]), {step: Future()}  # what failed does so again in its step
        for future, tasks in zip(self._made.values(), found, strict=True):
            future.set_result(tasks)
        tasks = self._made.pop(step).result()
        if self._together is None:
            size = sum(tensor.nbytes for tensor in tasks.tensors().values())
            self._together = max(1, min(TOGETHER, BYTES // max(size, 1)))
        return tasks

    @contextmanager
    def meanwhile(self, step: int) -> Iterator[None]:
        self._made = {step: Future()}
        thread = Thread(target=self._run, args=(step, self._made[step]), name="tasks ahead", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _run(self, step: int, made: Future[TaskBatch]) -> None:
        try:
            made.set_result(self._make([step])[0])
        except BaseException as error:
            made.set_exception(error)
