"""Sinusoid regression (Finn et al. 2017, arXiv:1703.03400, section 5.1)."""

import math

import torch
import torch.nn.functional as F

from fobmaml.arguments import whole_number
from fobmaml.tasks.batch import Split, TaskBatch


class Sinusoid:
    """y = a sin(x − b): amplitude a ~ U[0.1, 5], phase b ~ U[0, π], x ~ U[−5, 5]; mean squared error.

    A task has ``shots`` support and ``queries`` query examples, x and y [T, examples, 1] in float64. The three splits
    are independent draws from this distribution: the caller's generators tell them apart.
    Reference: Finn, Abbeel & Levine 2017, arXiv:1703.03400, section 5.1. Raises ValueError unless both are ≥ 1.
    """

    input_shape = (1,)
    outputs = 1
    classification = False
    loss_fn = staticmethod(F.mse_loss)

    def __init__(self, shots: int = 10, queries: int = 10):
        self.shots = whole_number("shots", shots)
        self.queries = whole_number("queries", queries)

    def sample(self, split: Split, count: int, generator: torch.Generator) -> TaskBatch:
        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        amplitude = 0.1 + 4.9 * uniform(count, 1, 1)
        phase = math.pi * uniform(count, 1, 1)
        x = 10.0 * uniform(count, self.shots + self.queries, 1) - 5.0
        y = amplitude * torch.sin(x - phase)
        return TaskBatch(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])
