"""An inner solver and an estimator of the meta-gradient."""

from torch import Tensor

from fobmaml import Learner, TaskBatch
from fobmaml.estimators import Estimate, Estimator
from fobmaml.solvers import InnerProblem, Solution, Solver


class Nesterov(Solver):
    """Accelerated gradient descent: φ_{k+1} = y_k − lr ∇h(y_k), y_{k+1} = φ_{k+1} + k/(k + 3) (φ_{k+1} − φ_k).

    All rows of a problem, [R, P], move at once. Reference: Nesterov 1983.
    """

    def __init__(self, steps: int, lr: float):
        self.steps, self.lr = steps, lr

    def solve(self, problem: InnerProblem) -> Solution:
        phi = ahead = problem.theta
        for k in range(self.steps):
            before, phi = phi, ahead - self.lr * problem.gradient(ahead)
            ahead = phi + k / (k + 3) * (phi - before)
        return Solution(problem, phi - problem.theta)


class Mixed(Estimator):
    """FO-MAML and a ``share`` of Reptile: ∇fᵢ(φᵢ) + share · (θ − φᵢ), φᵢ the solution of task i's inner problem."""

    needs_proximal_term = False  # lam=0 is allowed

    def __init__(self, solver: Solver, lam: float = 0.0, share: float = 0.1):
        super().__init__(solver, lam)
        self.share = share

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        gradients = learner.query_gradient(solution.phi, tasks) - self.share * solution.displacement
        return Estimate(gradients, lambda: solution)
