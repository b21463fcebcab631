"""Gradient descent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fobmaml.arguments import number
from fobmaml.engine.base import Steps
from fobmaml.solvers.descent import Descent, Memory
from fobmaml.solvers.problem import InnerProblem, Solution


class GradientDescent(Descent):
    """Gradient descent with heavy-ball momentum: v ← μv + ∇h(φ), φ ← φ − lr·v, ``steps`` times.

    Raises ValueError as ``Descent`` does, and unless 0 ≤ momentum < 1.

    >>> fobmaml.solvers.GradientDescent(steps=2, lr=0.1).solve(problem).phi
    tensor([[0.3200]])
    """

    linear = True

    def __init__(
        self,
        steps: int = 10,
        lr: float | Sequence[float] | Tensor = 0.1,
        momentum: float = 0.0,
        batch: int | None = None,
        query_batch: int | None = None,
    ):
        super().__init__(steps, lr, batch, query_batch)
        self.momentum = number("momentum", momentum, at_least=0.0, below=1.0)

    def solve(self, problem: InnerProblem) -> Solution:
        if isinstance(self.rates, Tensor) or problem.learner.moves is not None:
            return super().solve(problem)
        seen = self.drawn(problem)
        steps = Steps(self.rates, problem.lam, self.momentum, seen.draws)
        return self._solution(problem, seen.engine().gradient_descent(problem.theta, steps))

    def memory(self, like: Tensor) -> Memory:
        return (torch.zeros_like(like),) if self.momentum else ()

    def direction(self, gradient: Tensor, memory: Memory, step: int) -> tuple[Tensor, Memory]:
        if not self.momentum:
            return gradient, ()
        velocity = self.momentum * memory[0] + gradient
        return velocity, (velocity,)

    def pulled_back(
        self, gradient: Tensor, memory: Memory, step: int, wrt_direction: Tensor, wrt_memory: Memory
    ) -> tuple[Tensor, Memory]:
        if not self.momentum:
            return wrt_direction, ()
        wrt_velocity = wrt_memory[0] + wrt_direction
        return wrt_velocity, (self.momentum * wrt_velocity,)
