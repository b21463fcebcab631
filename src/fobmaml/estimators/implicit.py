"""Implicit differentiation: iMAML, and the exact meta-gradient as a converged iMAML."""

from torch import Tensor

from fobmaml.arguments import number, whole_number
from fobmaml.engine import Learner
from fobmaml.estimators.base import Estimate, Estimator
from fobmaml.solvers import LinearSolve, Solution, Solver, conjugate_gradients
from fobmaml.tasks.batch import TaskBatch


class NotConverged(RuntimeError):
    """The exact meta-gradient could not be computed to tolerance; the text says what failed."""

    advice = (
        "the exact meta-gradient at step {step} is not available: {error}; try more solver.steps or a larger "
        "estimator.lam"
    )


class IMAML(Estimator):
    """λvᵢ with (∇²f̂ᵢ(φᵢ,K) + λI) vᵢ = ∇fᵢ(φᵢ,K) solved by conjugate gradients.

    Cost: K support gradients, up to ``cg_steps`` Hessian-vector products, one query gradient a task.
    Memory: one twice-differentiable support gradient of the tasks solved at once; flat in K and ``cg_steps``.
    Where conjugate gradients meet negative curvature, v is what they had until then, zero at the first step;
    ``Estimate.linear`` says for which tasks.
    Reference: Rajeswaran, Finn, Kakade & Levine 2019, arXiv:1909.04630, lemma 1 and algorithm 2.
    Raises ValueError unless λ > 0, cg_steps ≥ 1 and cg_tol ≥ 0.
    """

    differentiates_solution = True

    def __init__(self, solver: Solver, lam: float = 0.5, cg_steps: int = 5, cg_tol: float = 1e-10):
        super().__init__(solver, lam)
        self.cg_steps = whole_number("cg_steps", cg_steps)
        self.cg_tol = number("cg_tol", cg_tol, at_least=0.0)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        solve = self.solve_linear(learner, solution, tasks)
        return Estimate(self.lam * solve.x, lambda: solution, solve)

    def solve_linear(self, learner: Learner, solution: Solution, tasks: TaskBatch) -> LinearSolve:
        hessian = solution.problem.hessian(solution.phi)  # of h, so with λI
        return conjugate_gradients(hessian, learner.query_gradient(solution.phi, tasks), self.cg_steps, self.cg_tol)


class Exact(IMAML):
    """λ (∇²f̂ᵢ(φᵢ*) + λI)⁻¹ ∇fᵢ(φᵢ*): the meta-gradient itself, for measuring the bias of the others.

    iMAML that insists: ``solver`` has to reach a residual ‖∇h(φ)‖ of ``tol``, as ``NewtonCG(tol=1e-8)`` does, and
    conjugate gradients a relative residual of ``tol``. Run it in float64. Cost: whatever that takes, up to ``cg_steps``
    Hessian-vector products a task for the linear solve. Reference: iMAML, lemma 1.

    Raises NotConverged, naming tasks and residuals, where the tolerance was not met or the point is not a minimiser.
    """

    def __init__(self, solver: Solver, lam: float = 2.0, tol: float = 1e-8, cg_steps: int = 5000):
        self.tol = number("tol", tol, above=0.0)
        super().__init__(solver, lam, cg_steps, cg_tol=tol)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        unsolved = ~(solution.residual <= self.tol)
        if unsolved.any():
            raise NotConverged(
                f"inner solve: {int(unsolved.sum())} of {len(tasks)} tasks stopped at a residual of up "
                f"to {float(solution.residual.max()):.1e}, above {self.tol:.0e}"
            )
        solve = self.solve_linear(learner, solution, tasks)
        if solve.negative_curvature.any():
            raise NotConverged(
                f"linear solve: {int(solve.negative_curvature.sum())} of {len(tasks)} tasks have "
                "negative curvature, so the inner solve stopped at a saddle point"
            )
        unsolved = ~(solve.relative_residual <= self.tol)
        if unsolved.any():
            raise NotConverged(
                f"linear solve: {int(unsolved.sum())} of {len(tasks)} tasks stopped at a relative "
                f"residual of up to {float(solve.relative_residual.max()):.1e}, above {self.tol:.0e}"
            )
        return Estimate(self.lam * solve.x, lambda: solution, solve)
