"""The first-order methods with an irreducible bias: FO-MAML and Reptile."""

from torch import Tensor

from fobmaml.arguments import one_of
from fobmaml.engine import Learner
from fobmaml.estimators.base import Cost, Estimate, Estimator
from fobmaml.estimators.multi_step import multi_step_gradient, part_of_training
from fobmaml.solvers import Descent, InnerProblem, Solution, Solver
from fobmaml.tasks.batch import TaskBatch


class FOMAML(Estimator):
    """∇fᵢ(φᵢ,K): MAML with dφ_K/dθ replaced by the identity.

    ``multi_step``: Σ_k w_k ∇fᵢ(φᵢ,k) instead, with equal weights at the start of training that are the last step's
    alone after this part of it (``step_weights``); 0: the last step's alone from the start.
    In all parameters, also those that the inner problem does not move (``Learner.adapt``), whose gradient it is, too.
    Cost: K support gradients and one query gradient a task, with ``multi_step`` K until it is over. Memory: one
    gradient of the tasks solved at once, and then K times their parameters.
    Reference: Finn, Abbeel & Levine 2017, arXiv:1703.03400, section 5.2; multi-step: Antoniou, Edwards & Storkey 2019,
    arXiv:1810.09502, section 4. Raises ValueError for a ``multi_step`` below 0, and for one after a solver that is no
    ``Descent``.

    >>> estimator = fobmaml.estimators.FOMAML(solver, lam=2.0)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-3.]])}
    """

    needs_proximal_term = False

    def __init__(self, solver: Solver, lam: float = 0.0, multi_step: float = 0.0):
        super().__init__(solver, lam)
        self.multi_step = part_of_training("multi_step", multi_step, solver)

    def cost(self, support: int, query: int) -> Cost:
        return Cost(1, support, second_order=False)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        if self.progress >= self.multi_step or not isinstance(self.solver, Descent):
            solution = self.adapt(learner, theta, tasks)
            return Estimate(learner.query_gradient(solution.phi, tasks), lambda: solution)
        solution, gradients = multi_step_gradient(
            self.solver,
            InnerProblem(learner, theta, tasks, self.lam),
            lambda phi: learner.query_gradient(phi, tasks),
            self.progress / self.multi_step,
            first_order=True,
        )
        return Estimate(gradients, lambda: solution)


class Reptile(Estimator):
    """θ − φᵢ,K: the way from the adapted parameters back to the start. It is zero in parameters that the inner problem
    does not move (``Learner.adapt``), which are not trained then.

    ``data``: what φᵢ,K is adapted to. ``all`` examples of a task, support and query, is its authors' way, together with
    inner steps on small batches (``solver.batch=10``): the steps of one task then see different examples, and it is
    their gradients' inner products that the method increases. With ``support``, and every step on all of it, that is
    lost.
    Not a gradient in scale (it grows with the inner learning rate and steps); its direction is what is compared.
    Cost: K gradients a task, of a batch each. Memory: one gradient of the tasks solved at once.
    Reference: Nichol, Achiam & Schulman 2018, arXiv:1803.02999, algorithm 2 and sections 5.1, 6.3.
    Raises ValueError for other ``data``.

    >>> estimator = fobmaml.estimators.Reptile(solver, lam=2.0, data="support")
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-0.5000]])}
    """

    needs_proximal_term = False

    def __init__(self, solver: Solver, lam: float = 0.0, data: str = "all"):
        super().__init__(solver, lam)
        self.data = one_of("data", data, ("all", "support"))

    def cost(self, support: int, query: int) -> Cost:
        return Cost(1, support + query if self.data == "all" and not self.solver.batch else support, False)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        seen = tasks.pooled() if self.data == "all" else tasks
        solution = self.adapt(learner, theta, seen)

        def adapted() -> Solution:
            return solution if seen is tasks else self.adapt(learner, theta, tasks)

        return Estimate(-solution.displacement, adapted)
