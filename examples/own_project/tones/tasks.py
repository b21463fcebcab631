"""Where the tasks come from."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fobmaml import TaskBatch

SAMPLES, CLASSES = 32, 60


class Tones:
    """A class is a frequency, an example 32 samples of it at a random phase, in noise.

    ``ways`` classes a task, ``shots`` support and ``queries`` query examples of each. Test classes are not seen in
    training: of 60 frequencies 40 are for training, 10 for validation and 10 for meta-test.
    """

    input_shape = (SAMPLES,)
    classification = True
    loss_fn = staticmethod(F.cross_entropy)

    def __init__(self, ways: int = 3, shots: int = 5, queries: int = 15, noise: float = 0.3):
        self.outputs, self.shots, self.queries, self.noise = ways, shots, queries, noise
        frequencies = torch.linspace(1.0, 15.0, CLASSES, dtype=torch.float64)  # periods in an example
        shuffled = frequencies[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))]
        self.frequencies = dict(zip(("train", "validation", "test"), shuffled.split([40, 10, 10]), strict=True))

    def sample(self, split: str, count: int, generator: torch.Generator) -> TaskBatch:
        """``count`` tasks; all randomness is ``generator``'s, so that a run can be continued."""
        of_split, each = self.frequencies[split], self.shots + self.queries
        chosen = torch.rand(count, len(of_split), generator=generator).argsort(dim=1)[:, : self.outputs]
        shape = (count, self.outputs, each)
        phase = torch.rand(*shape, 1, generator=generator, dtype=torch.float64)
        periods = of_split[chosen].view(count, self.outputs, 1, 1) * torch.arange(SAMPLES) / SAMPLES
        x = torch.sin(2.0 * math.pi * (periods + phase))
        x = x + self.noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        y = torch.arange(self.outputs).view(1, -1, 1).expand(shape)

        def examples(values: Tensor, part: slice) -> Tensor:  # [T, ways, n, ...] -> [T, ways · n, ...]
            return values[:, :, part].flatten(1, 2)

        support, query = slice(self.shots), slice(self.shots, None)
        return TaskBatch(examples(x, support), examples(y, support), examples(x, query), examples(y, query))
