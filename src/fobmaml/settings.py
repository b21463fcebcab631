"""What the loop of meta-training is told."""

from dataclasses import dataclass

from fobmaml.arguments import number, one_of, or_auto, refuse, whole_number
from fobmaml.engine import ENGINES
from fobmaml.engine.selection import Adapt


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know; the meaning of each is in configs/train.yaml. Raises ValueError."""

    steps: int | None = 600
    budget: float | None = None
    seed: int = 0
    meta_batch: int = 16
    fixed_tasks: bool = False
    prefetch: bool = False
    task_chunk: int | str = "auto"
    memory_limit_mb: float | None = None
    engine: str = "auto"
    adapt: Adapt = "all"
    schedule: str = "cosine"
    task_clip: float | None = None
    clip: float | None = None
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("meta_batch", "log_every", "checkpoint_every"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, at_least=0, at_most=2**64 - 1)
        if self.steps is not None:
            whole_number("steps", self.steps, at_least=0)
        elif self.budget is None:
            raise refuse("steps", None, "a whole number of at least 0, or None with a budget")
        for name in ("budget", "task_clip", "clip"):
            if (value := getattr(self, name)) is not None:
                number(name, value, above=0.0)
        for name in ("fixed_tasks", "prefetch"):
            if not isinstance(getattr(self, name), bool):
                raise refuse(name, getattr(self, name), "true or false")
        if self.task_chunk != "auto":
            with or_auto():
                whole_number("task_chunk", self.task_chunk)
        if self.memory_limit_mb is not None:
            number("memory_limit_mb", self.memory_limit_mb, above=0.0)
            if self.task_chunk != "auto":
                raise refuse("memory_limit_mb", self.memory_limit_mb, "task_chunk=auto, which it limits")
        one_of("engine", self.engine, ENGINES)
        one_of("schedule", self.schedule, ("cosine", "linear", "constant"))
