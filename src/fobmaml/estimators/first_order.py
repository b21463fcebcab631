"""The first-order methods with an irreducible bias: FO-MAML and Reptile."""

from torch import Tensor

from fobmaml.engine import Learner
from fobmaml.estimators.base import Cost, Estimate, Estimator
from fobmaml.solvers import Solver
from fobmaml.tasks.batch import TaskBatch


class FOMAML(Estimator):
    """∇fᵢ(φᵢ,K): MAML with dφ_K/dθ replaced by the identity.

    Cost: K support gradients and one query gradient a task. Memory: one gradient of the tasks solved at once.
    Reference: Finn, Abbeel & Levine 2017, arXiv:1703.03400, section 5.2.
    """

    needs_proximal_term = False

    def __init__(self, solver: Solver, lam: float = 0.0):
        super().__init__(solver, lam)

    def cost(self, support: int, query: int) -> Cost:
        return Cost(1, support, second_order=False)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        return Estimate(learner.query_gradient(solution.phi, tasks), lambda: solution)


class Reptile(Estimator):
    """θ − φᵢ,K: the way from the adapted parameters back to the start. The query set is not used.

    Not a gradient in scale (it grows with the inner learning rate and steps); its direction is what is compared.
    Cost: K support gradients a task. Memory: one gradient of the tasks solved at once.
    Reference: Nichol, Achiam & Schulman 2018, arXiv:1803.02999, algorithm 2.
    """

    needs_proximal_term = False

    def __init__(self, solver: Solver, lam: float = 0.0):
        super().__init__(solver, lam)

    def cost(self, support: int, query: int) -> Cost:
        return Cost(1, support, second_order=False)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        return Estimate(-solution.displacement, lambda: solution)
