"""MAML: back-propagation through the inner solver's steps."""

from torch import Tensor

from fobmaml.arguments import refuse
from fobmaml.engine import Learner
from fobmaml.estimators.base import Estimate, Estimator
from fobmaml.solvers import InnerProblem, Solver
from fobmaml.tasks.batch import TaskBatch


class MAML(Estimator):
    """dfᵢ(φᵢ,K(θ))/dθ, exactly, where φᵢ,K is the K-th step of the solver.

    ``checkpoint``: keep the parameters of each step instead of its activations, which are computed again.
    Cost: K support gradients, as many Hessian-vector products, and one query gradient a task; with ``checkpoint``
    K more support gradients. Memory: K times one task's activations, or its parameters, for the tasks solved at once;
    parameters with the compiled kernel, too, which computes activations again anyway.
    Reference: Finn, Abbeel & Levine 2017, arXiv:1703.03400, equation (1); λ > 0 adds the proximal term to its inner
    problem. Raises ValueError for a solver that cannot be differentiated through.
    """

    needs_proximal_term = False

    def __init__(self, solver: Solver, lam: float = 0.0, checkpoint: bool = False):
        super().__init__(solver, lam)
        if not solver.differentiable_steps:
            raise refuse("solver", type(solver).__name__, "a solver with differentiable steps (GradientDescent)")
        self.checkpoint = checkpoint

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution, pull_back = self.solver.unroll(InnerProblem(learner, theta, tasks, self.lam), self.checkpoint)
        return Estimate(pull_back(learner.query_gradient(solution.phi, tasks)), lambda: solution)
