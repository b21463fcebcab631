"""MAML: back-propagation through the inner solver's steps."""

import torch
from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.estimators.base import Estimate, Estimator
from fobmaml.learner import Learner
from fobmaml.solvers import InnerProblem, Solution, Solver
from fobmaml.tasks.batch import TaskBatch


class MAML(Estimator):
    """dfᵢ(φᵢ,K(θ))/dθ, exactly, where φᵢ,K is the K-th step of the solver.

    Cost: K support gradients, as many Hessian-vector products, and one query gradient a task.
    Memory: K times one task's activations, for the tasks solved at once.
    Reference: Finn, Abbeel & Levine 2017, arXiv:1703.03400, equation (1); λ > 0 adds the proximal term to its inner
    problem. Raises ValueError for a solver that cannot be differentiated through.
    """

    needs_proximal_term = False

    def __init__(self, solver: Solver, lam: float = 0.0):
        super().__init__(solver, lam)
        if not solver.differentiable_steps:
            raise refuse("solver", type(solver).__name__, "a solver with differentiable steps (GradientDescent)")

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        start = theta.expand(len(tasks), -1).detach().clone().requires_grad_()
        unrolled = self.solver.solve(InnerProblem(learner, start, tasks, self.lam), differentiable=True)
        (gradients,) = torch.autograd.grad(learner.query_loss(unrolled.phi, tasks).sum(), start)
        problem = InnerProblem(learner, theta, tasks, self.lam)
        solution = Solution(problem, unrolled.phi.detach(), unrolled.steps)
        return Estimate(gradients, lambda: solution)
