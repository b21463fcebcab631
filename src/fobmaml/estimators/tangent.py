"""The limit of FO-B-MAML's finite differences at small ν, without ν: the derivative of the solver's own steps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fobmaml.arguments import number, one_of, refuse
from fobmaml.engine import Learner
from fobmaml.engine.losses import rows_taken
from fobmaml.estimators.base import Cost, Estimate, Estimator
from fobmaml.solvers import Descent, InnerProblem, Solution, Solver
from fobmaml.tasks.batch import TaskBatch
from fobmaml.tasks.draws import drawn

WAYS = ("auto", "differences", "products")
Linearize = Callable[[InnerProblem, Tensor, Tensor], tuple[Tensor, Tensor]]
Again = Callable[[TaskBatch], TaskBatch]


class Tangent(Estimator):
    """−λ u_K, where u_k = dφ_{k,ν}/dν at ν = 0 for the K steps of gradient descent on f̂ᵢ + ν fᵢ + (λ/2)‖φ − θ‖².

    u₀ = 0 and u_{k+1} = u_k − η (∇²f̂ᵢ(φ_k) u_k + λ u_k + ∇fᵢ(φ_k)); with momentum the bracket is accumulated as
    gradients are. ``Symmetric`` and its kin tend to it as ν → 0: it has the bias of an inner problem that K steps do
    not solve, as they do, but none of ν, and no rounding divided by ν. ``way``, how products with ∇²f̂ are had:

    - ``differences``: (∇f̂(φ + εu) − ∇f̂(φ − εu)) / 2ε, by first derivatives. The mean of the two is ∇f̂(φ) up to
      O(ε²), so that φ takes no gradient of its own. ε‖u‖ = eps^{1/3} (1 + ‖φ‖) / 5 in a dtype that rounds to eps.
      Error: O(ε²), 1e-6 to 1e-3 of the meta-gradient in float32, 1e-11 to 1e-9 in float64. Cost: K (2S + Q)
      example-gradients a task of S support and Q query examples, of which ``Symmetric`` takes K (2S + 2Q). Memory: a
      support gradient of two rows a task.
    - ``products``: by second derivatives, exact. Cost: K (S + Q) example-gradients and K Hessian products of the
      support examples, 8/3 example-gradients each. Memory: a twice-differentiable support gradient.
    - ``auto``: ``differences``, which was the faster in every engine; in a dtype that is too
      short for them, ``products``.

    Where φ is θ in some parameters (``Learner.adapt``), u is zero there, and the estimate ∇fᵢ(φ_K) + ∇²f̂ᵢ(φ_K) u_K,
    by one more product and query gradient.

    ``envelope``: α, of an estimate of ∇(Fᵢ + αMᵢ) as in ``FiniteDifference``: −λ(u_K + α(φ_K − θ)), at no cost where
    φ moves in all parameters.

    Memory is flat in K. Reference: Chayti & Jaggi, arXiv:2409.03682, whose symmetric estimator has this limit.
    Raises ValueError unless λ > 0 and α ≥ 0, and for a solver other than gradient descent, whose steps are linear in
    gradients.

    >>> estimator = fobmaml.estimators.Tangent(solver, lam=2.0)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.5000]])}
    """

    def __init__(self, solver: Solver, lam: float = 0.5, way: str = "auto", envelope: float = 0.0):
        super().__init__(solver, lam)
        self.envelope = number("envelope", envelope, at_least=0.0)
        if not isinstance(solver, Descent) or not solver.linear:
            raise refuse("solver", type(solver).__name__, "one whose steps are linear in gradients (GradientDescent)")
        self.way = one_of("way", way, WAYS)

    def cost(self, support: int, query: int) -> Cost:
        if self.way == "products":
            return Cost(1, support + query, second_order=True)
        return Cost(2, support + (query + 1) // 2, second_order=False)  # two rows of support, one of query examples

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        long = learner.dtype in (torch.float32, torch.float64)
        if self.way == "differences" and not long:
            raise refuse("model", learner.dtype, "float32 or float64 parameters where way=differences")
        linearize, again = (_by_products, _once) if self.way == "products" or not long else (_by_differences, _twice)
        problem = InnerProblem(learner, theta, tasks, self.lam)
        head = None if self.solver.for_all_parameters else problem.of_head(query=True)
        d, u = self._steps(head or problem, linearize, again)
        if head:
            d, u = problem.lifted(d), problem.lifted(u)
        taken = torch.full((len(tasks),), cast(Descent, self.solver).steps)
        reached = Solution(problem, d, taken, taken)

        def adapted() -> Solution:  # differences have moved φ by O(ε²)
            return reached if again is _once else self.adapt(learner, theta, tasks)

        gradients = -self.lam * u
        if learner.moves is not None:
            _, product = linearize(InnerProblem(learner, theta, again(tasks), self.lam), reached.phi, u)
            gradients += (1.0 - learner.moves) * (product + learner.query_gradient(reached.phi, tasks))
        if self.envelope:
            gradients -= self.lam * self.envelope * reached.envelope
        return Estimate(gradients, adapted)

    def _steps(self, problem: InnerProblem, linearize: Linearize, again: Again) -> tuple[Tensor, Tensor]:
        """φ_K − θ and u_K, [T, P]."""
        learner, tasks, descent = problem.learner, problem.tasks, cast(Descent, self.solver)
        seen = descent.drawn(InnerProblem(learner, problem.start, again(tasks), self.lam))
        d = u = torch.zeros_like(problem.theta)  # φ − θ and dφ/dν
        memory, u_memory = descent.memory(d), descent.memory(u)
        rates, queries = descent.rates_on(problem), _query_batches(descent, tasks)
        for step, (rate, query) in enumerate(zip(rates, queries, strict=True)):
            phi = problem.theta + d
            gradient, product = linearize(seen.at(step), phi, u)
            slope = problem.moved(product + learner.query_gradient(phi, query)) + self.lam * u
            # Both directions are the same linear function.
            direction, memory = descent.direction(problem.moved(gradient) + self.lam * d, memory, step)
            u_direction, u_memory = descent.direction(slope, u_memory, step)
            d, u = d - rate * direction, u - rate * u_direction
        return d, u


def _by_products(problem: InnerProblem, phi: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """∇f̂(φ) and ∇²f̂(φ)u of each row, [T, P]."""
    gradient, product = problem.engine(second_order=True).linearize(phi)
    return gradient, product(u)


def _by_differences(problem: InnerProblem, phi: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of a problem with two rows for each of ``phi``."""
    length = u.norm(dim=1, keepdim=True)
    apart = 0.2 * torch.finfo(phi.dtype).eps ** (1 / 3) * (1.0 + phi.norm(dim=1, keepdim=True))
    epsilon = torch.where(length > 0, apart / length, 1.0)
    points = torch.stack([phi + epsilon * u, phi - epsilon * u], dim=1).flatten(0, 1)
    ahead, behind = problem.engine().gradient(points).unflatten(0, (-1, 2)).unbind(1)
    return (ahead + behind) / 2, (ahead - behind) / (2 * epsilon)


def _once(tasks: TaskBatch) -> TaskBatch:
    return tasks


def _twice(tasks: TaskBatch) -> TaskBatch:
    """Each task as two rows."""
    return tasks[torch.arange(len(tasks), device=tasks.support_x.device).repeat_interleave(2)]


def _query_batches(descent: Descent, tasks: TaskBatch) -> Iterator[TaskBatch]:
    """``tasks`` with the query examples that each step sees of the perturbed problem (``InnerProblem.drawn``)."""
    size, examples = descent.query_batch, None
    if size is not None and tasks.keys is not None:
        examples = drawn(tasks.keys, tasks.query_x.shape[1], size, descent.steps, stream=1)
    for step in range(descent.steps):
        if examples is None:
            yield tasks
        else:
            x, y = (rows_taken(t, examples[:, step]) for t in (tasks.query_x, tasks.query_y))
            yield replace(tasks, query_x=x, query_y=y)
