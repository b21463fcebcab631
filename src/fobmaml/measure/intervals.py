"""The mean over tasks of a metric, and its 95 % interval, where tasks share examples too."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def mean_interval(values: Tensor) -> tuple[float | None, float | None]:
    """Of the tasks' values [T] that are not NaN: mean and half width of its 95 % interval, 1.96 standard errors over
    tasks.

    None where there is none, and for the interval of a single task.
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return None, None
    return float(known.mean()), 1.96 * float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else None


@dataclass(frozen=True)
class Ratios:
    """Tasks' values that are sums over query examples divided by sums: the ``parts`` and what they are ``of``, float64
    [T, Q], and which example each is, ``examples`` [T, Q] (``same_examples``)."""

    parts: Tensor
    of: Tensor
    examples: Tensor

    def mean_interval(self) -> tuple[float | None, float | None]:
        """Mean over tasks, and half width of its 95 % interval, 1.96 standard errors clustered by task and by example:
        one that is hard is so in each task that it is in. Where none is in two tasks, it is the interval over tasks;
        it is never less.

        Reference: Cameron, Gelbach and Miller 2011, two-way clustering.
        """
        of = self.of.sum(1)
        mean, half = mean_interval(self.parts.sum(1) / of)  # NaN of a task where nothing counts
        if mean is None or half is None:
            return mean, half
        known = of > 0
        shares = (self.parts - mean * self.of)[known] / of[known, None] / int(known.sum())
        sums = _by_example(shares, self.examples[known])
        shared = float(sums.square().sum() - shares.square().sum()) * len(sums) / max(len(sums) - 1, 1)
        return mean, math.sqrt(half**2 + 1.96**2 * max(shared, 0.0))

    def by_example(self) -> Tensor:
        """The sum of each example's parts in all tasks, [E], in the order of their numbers."""
        return _by_example(self.parts, self.examples)


def _by_example(values: Tensor, examples: Tensor) -> Tensor:
    _, places = examples.unique(return_inverse=True)
    return values.new_zeros(int(places.max()) + 1).index_add_(0, places.flatten(), values.flatten())


def same_examples(x: Tensor) -> Tensor:
    """Of examples [T, Q, ...] a number each, int64 [T, Q], the same for those that are equal in every bit, whatever
    the machine. Memory: of one task.
    """
    flat = x.detach().flatten(2).cpu().contiguous()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (flat.shape[2],), generator=generator) * 2 + 1
    return torch.stack([(one.view(whole).long() * odd).sum(1) for one in flat])  # modulo 2⁶⁴
