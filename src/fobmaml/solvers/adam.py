"""Adam."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fobmaml.arguments import number
from fobmaml.solvers.descent import Descent, Memory


class Adam(Descent):
    """Adam: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², φ ← φ − lr · m̂ / (√v̂ + ε), from m = v = 0 for every task.

    ``beta1`` β₁, ``beta2`` β₂, ``eps`` ε; ``steps``, ``lr``, batches, cost and memory as of ``Descent``, and m and v.
    m̂, v̂ are m / (1 − β₁ᵏ), v / (1 − β₂ᵏ) at step k. β₁ = 0 is how Reptile's authors use it (Nichol, Achiam & Schulman
    2018, arXiv:1803.02999, section 6; their v goes on from task to task, which makes a solution depend on the tasks
    before). Where a gradient is tiny a step is not, so that differences of solutions are rough: for Reptile and MAML
    rather than for finite differences. Reference: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    Raises ValueError as ``Descent`` does, and unless 0 ≤ β₁, β₂ < 1 and ε > 0.

    >>> fobmaml.solvers.Adam(steps=1, lr=0.1).solve(problem).phi
    tensor([[0.1000]])
    """

    def __init__(
        self,
        steps: int = 10,
        lr: float | Sequence[float] | Tensor = 0.01,
        beta1: float = 0.0,
        beta2: float = 0.999,
        eps: float = 1e-8,
        batch: int | None = None,
        query_batch: int | None = None,
    ):
        super().__init__(steps, lr, batch, query_batch)
        self.beta1 = number("beta1", beta1, at_least=0.0, below=1.0)
        self.beta2 = number("beta2", beta2, at_least=0.0, below=1.0)
        self.eps = number("eps", eps, above=0.0)

    def memory(self, like: Tensor) -> Memory:
        return torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor, memory: Memory, step: int) -> tuple[Tensor, Memory]:
        m = self.beta1 * memory[0] + (1.0 - self.beta1) * gradient
        v = self.beta2 * memory[1] + (1.0 - self.beta2) * gradient.square()
        unbiased = v / (1.0 - self.beta2 ** (step + 1))
        root = torch.where(unbiased > 0, unbiased, 1.0).sqrt() * (unbiased > 0)  # differentiable where nothing moves
        return m / (1.0 - self.beta1 ** (step + 1)) / (root + self.eps), (m, v)
