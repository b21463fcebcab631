"""Logistic regression: with the proximal term strongly convex, so that the exact meta-gradient is a dense solve."""

import torch
import torch.nn.functional as F

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.tasks.batch import Split, TaskBatch


class Logistic:
    """Two classes, P(y = 1 | x) = σ(wᵢᵀx) with x ~ N(0, I), wᵢ = w̄ + spread · N(0, I) and w̄ = 1; cross-entropy.

    A task has ``shots`` support and ``queries`` query examples, x [T, examples, ``dimension``] in float64 and y
    [T, examples]. With the proximal term its inner problem is strongly convex. The three splits are independent draws
    from this distribution: the caller's generators tell them apart. With ``tasks`` so many are drawn once, and all
    three splits take theirs of those, without replacement: F over all of them is a finite sum.
    Raises ValueError unless dimension, shots, queries and tasks are ≥ 1 and spread ≥ 0, and when a sample is of more
    tasks than there are.
    """

    outputs = 2
    classification = True
    loss_fn = staticmethod(F.cross_entropy)

    def __init__(
        self, dimension: int = 10, shots: int = 20, queries: int = 20, spread: float = 1.0, tasks: int | None = None
    ):
        self.input_shape = (whole_number("dimension", dimension),)
        self.shots = whole_number("shots", shots)
        self.queries = whole_number("queries", queries)
        self.spread = number("spread", spread, at_least=0.0)
        self.all: TaskBatch | None = None
        if tasks is not None:
            self.all = self._drawn(whole_number("tasks", tasks), torch.Generator().manual_seed(0))

    def sample(self, split: Split, count: int, generator: torch.Generator) -> TaskBatch:
        if self.all is None:
            return self._drawn(count, generator)
        if count > len(self.all):
            raise refuse("dataset.tasks", len(self.all), f"at least {count}, the tasks of a sample, or null")
        return self.all[torch.randperm(len(self.all), generator=generator)[:count]]

    def _drawn(self, count: int, generator: torch.Generator) -> TaskBatch:
        (dimension,), examples = self.input_shape, self.shots + self.queries
        x = torch.randn(count, examples, dimension, generator=generator, dtype=torch.float64)
        w = 1.0 + self.spread * torch.randn(count, dimension, 1, generator=generator, dtype=torch.float64)
        p = torch.sigmoid(x @ w).squeeze(-1)
        y = (torch.rand(count, examples, generator=generator, dtype=torch.float64) < p).long()
        return TaskBatch(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])
