"""Implicit differentiation: iMAML, and the exact meta-gradient as a converged iMAML."""

from dataclasses import replace

from torch import Tensor

from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.engine import Learner
from fobmaml.estimators.base import Estimate, Estimator
from fobmaml.solvers import InnerProblem, LinearSolve, Solution, Solver, conjugate_gradients, minres
from fobmaml.tasks.batch import TaskBatch

LINEAR = {"cg": conjugate_gradients, "minres": minres}


class NotConverged(RuntimeError):
    """The exact meta-gradient could not be computed to tolerance; the text says what failed."""

    advice = (
        "the exact meta-gradient at step {step} is not available: {error}; try more solver.steps or a larger "
        "estimator.lam"
    )


class IMAML(Estimator):
    """vᵢ with ((1 + d)I + ∇²f̂ᵢ(φᵢ,K)/(λ + c)) vᵢ = ∇fᵢ(φᵢ,K). With damping d = c = 0: λ(∇²f̂ᵢ + λI)⁻¹∇fᵢ, the formula.

    Where φ moves in some parameters a only and is θ in the others b (``Learner.adapt``), this is v in a, with the parts
    of ∇f and ∇²f̂ there; in b it is ∂f/∂b − ∂²f̂/∂b∂a v/(λ + c), by one more product.

    ``damping`` d, ``lam_damping`` c: in general v is the formula's with μ = (1 + d)(λ + c) for λ, divided by 1 + d. The
    authors' code takes d = 1 and c = 10 at λ = 2, so that v is near ∇fᵢ/2: FO-MAML's, but for curvature near μ = 24.
    ``pull_back``: also as their code has it, the solver's steps are taken on f̂ᵢ alone, and then one of the same length
    on the proximal term alone: φ − θ ← (1 − lr·λ)(φ − θ).

    ``linear``: ``cg``, conjugate gradients, or ``minres``. Where the matrix is not positive definite, φᵢ,K lies where h
    is no bowl. Conjugate gradients stop as soon as they see that, and v is what they had until then, zero at the first
    step. MINRES goes on to the inverse, which is there the derivative of the stationary point next to φᵢ,K, a saddle,
    by θ: the implicit function theorem asks for no minimum. No bound holds for it, for eigenvalues near zero;
    ``cg_steps`` is what limits it. ``Estimate.linear`` says for which tasks.

    Cost: K support gradients, up to ``cg_steps`` Hessian-vector products, one query gradient a task.
    Memory: one twice-differentiable support gradient of the tasks solved at once; flat in K and ``cg_steps``.
    Reference: Rajeswaran, Finn, Kakade & Levine 2019, arXiv:1909.04630, lemma 1 and algorithm 2; damping and pull-back:
    their code, github.com/aravindr93/imaml_dev.
    Raises ValueError unless λ > 0, cg_steps ≥ 1, cg_tol, damping and lam_damping ≥ 0, and for a pull-back after a
    solver without one ``lr``.

    >>> estimator = fobmaml.estimators.IMAML(solver, lam=2.0)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.5000]])}
    """

    differentiates_solution = True

    def __init__(
        self,
        solver: Solver,
        lam: float = 0.5,
        cg_steps: int = 5,
        cg_tol: float = 1e-10,
        damping: float = 0.0,
        lam_damping: float = 0.0,
        linear: str = "cg",
        pull_back: bool = False,
    ):
        super().__init__(solver, lam)
        self.cg_steps = whole_number("cg_steps", cg_steps)
        self.cg_tol = number("cg_tol", cg_tol, at_least=0.0)
        self.damping = number("damping", damping, at_least=0.0)
        self.lam_damping = number("lam_damping", lam_damping, at_least=0.0)
        self.linear = one_of("linear", linear, tuple(LINEAR))
        if not isinstance(pull_back, bool):
            raise refuse("pull_back", pull_back, "true or false")
        lr = getattr(solver, "lr", None)
        if pull_back and not isinstance(lr, float):
            raise refuse("pull_back", pull_back, "a solver with one lr for all steps")
        self.pull_back = lr if pull_back else None

    def adapt(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Solution:
        problem = InnerProblem(learner, theta, tasks, self.lam)
        if self.pull_back is None:
            return self.solve(problem)
        lr = getattr(self.solver, "lr", None)  # of the present solver, if it has one
        rest = 1.0 - (lr if isinstance(lr, float) else self.pull_back) * self.lam
        free = self.solve(InnerProblem(learner, theta, tasks, 0.0))
        return replace(free, problem=problem, displacement=rest * free.displacement)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        gradients, solve = self.differentiated(learner, solution, tasks)
        return Estimate(gradients, lambda: solution, solve)

    def differentiated(self, learner: Learner, solution: Solution, tasks: TaskBatch) -> tuple[Tensor, LinearSolve]:
        """The formula at ``solution``, [T, P], and how its linear system was solved."""
        problem, query_gradient = solution.problem, learner.query_gradient(solution.phi, tasks)
        head = problem.of_head()
        system, only = (head, problem.restricted) if head else (problem, problem.moved)
        hessian = system.hessian(only(solution.phi) if head else solution.phi)  # of h, so with λI
        more = (1.0 + self.damping) * (self.lam + self.lam_damping) - self.lam
        solve = LINEAR[self.linear](
            lambda v: system.moved(hessian(v) + more * v if more else hessian(v)),
            only(query_gradient),
            self.cg_steps,
            self.cg_tol,
        )
        x = problem.lifted(solve.x) if head else solve.x
        gradients = (self.lam + self.lam_damping) * x
        if learner.moves is not None:
            product = (problem.hessian(solution.phi) if head else hessian)(x)
            gradients += (1.0 - learner.moves) * (query_gradient - product)
        return gradients, solve


class Exact(IMAML):
    """λ (∇²f̂ᵢ(φᵢ*) + λI)⁻¹ ∇fᵢ(φᵢ*): the meta-gradient itself, for measuring the bias of the others.

    iMAML that insists: ``solver`` has to reach a residual ‖∇h(φ)‖ of ``tol``, as ``NewtonCG(tol=1e-8)`` does, and
    conjugate gradients a relative residual of ``tol``. Run it in float64. Cost: whatever that takes, up to ``cg_steps``
    Hessian-vector products a task for the linear solve. Reference: iMAML, lemma 1.
    ``envelope``: α, of the gradient of Fᵢ + αMᵢ, as in ``FiniteDifference``: with λα(θ − φᵢ*), by Danskin's theorem.

    Raises NotConverged, naming tasks and residuals, where the tolerance was not met or the point is not a minimiser.

    >>> estimator = fobmaml.estimators.Exact(fobmaml.solvers.NewtonCG(), lam=2.0)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.5000]])}
    """

    def __init__(
        self, solver: Solver, lam: float = 2.0, tol: float = 1e-8, cg_steps: int = 5000, envelope: float = 0.0
    ):
        self.tol = number("tol", tol, above=0.0)
        self.envelope = number("envelope", envelope, at_least=0.0)
        super().__init__(solver, lam, cg_steps, cg_tol=tol)

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        solution = self.adapt(learner, theta, tasks)
        unsolved = ~(solution.residual <= self.tol)
        if unsolved.any():
            raise NotConverged(
                f"inner solve: {int(unsolved.sum())} of {len(tasks)} tasks stopped at a residual of up "
                f"to {float(solution.residual.max()):.1e}, above {self.tol:.0e}"
            )
        gradients, solve = self.differentiated(learner, solution, tasks)
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
        if self.envelope:
            gradients = gradients - self.lam * self.envelope * solution.envelope
        return Estimate(gradients, lambda: solution, solve)
