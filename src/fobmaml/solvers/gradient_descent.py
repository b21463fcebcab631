"""Gradient descent."""

from collections.abc import Callable

import torch
from torch import Tensor

from fobmaml.arguments import number, whole_number
from fobmaml.solvers.base import Solver
from fobmaml.solvers.problem import InnerProblem, Solution


class GradientDescent(Solver):
    """Gradient descent with heavy-ball momentum: v ← μv + ∇h(φ), φ ← φ − lr·v, ``steps`` times.

    Cost: ``steps`` gradients a row. Memory: flat in ``steps`` unless unrolled.
    Raises ValueError unless steps ≥ 1, lr > 0 and 0 ≤ momentum < 1.
    """

    differentiable_steps = True

    def __init__(self, steps: int = 10, lr: float = 0.1, momentum: float = 0.0):
        self.steps = whole_number("steps", steps)
        self.lr = number("lr", lr, above=0.0)
        self.momentum = number("momentum", momentum, at_least=0.0, below=1.0)

    def solve(self, problem: InnerProblem) -> Solution:
        displacement = problem.engine().gradient_descent(problem.theta, self.steps, self.lr, problem.lam, self.momentum)
        return self._solution(problem, displacement)

    def _solution(self, problem: InnerProblem, displacement: Tensor) -> Solution:
        taken = torch.full((problem.rows,), self.steps)
        return Solution(problem, displacement, taken, torch.zeros_like(taken))

    def unroll(self, problem: InnerProblem, checkpoint: bool = False) -> tuple[Solution, Callable[[Tensor], Tensor]]:
        """Memory: ``steps`` times a gradient's activations, or one time and ``steps`` × [R, P] with ``checkpoint`` or
        the compiled kernel.

        Cost of the pull-back: a Hessian-vector product a step, and with ``checkpoint`` one more gradient.
        """
        displacement = velocity = torch.zeros_like(problem.theta)
        engine = problem.engine(second_order=True)
        hessians: list[Tensor | Callable[[Tensor], Tensor]] = []  # where to take one, or its products
        for _ in range(self.steps):
            phi = problem.theta + displacement
            if checkpoint:
                gradient = problem.gradient(phi)
                hessians.append(phi)
            else:
                gradient, product = problem.linearize(phi, engine)
                hessians.append(product)
            velocity = torch.add(gradient, velocity, alpha=self.momentum)
            displacement = torch.sub(displacement, velocity, alpha=self.lr)

        def pull_back(v: Tensor) -> Tensor:
            wrt_phi, wrt_velocity, wrt_theta = v, torch.zeros_like(v), torch.zeros_like(v)
            while hessians:
                wrt_velocity = torch.sub(wrt_velocity, wrt_phi, alpha=self.lr)
                hessian = hessians.pop()
                product = problem.linearize(hessian, engine)[1] if isinstance(hessian, Tensor) else hessian
                wrt_phi = wrt_phi + product(wrt_velocity)
                wrt_theta = torch.sub(wrt_theta, wrt_velocity, alpha=problem.lam)
                wrt_velocity = self.momentum * wrt_velocity
            return wrt_theta + wrt_phi

        return self._solution(problem, displacement), pull_back
