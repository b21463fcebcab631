"""FO-B-MAML: the meta-gradient as a finite difference of solutions of the perturbed inner problem.

With φᵢ,ν* = argmin_φ f̂ᵢ(φ) + ν fᵢ(φ) + (λ/2)‖φ − θ‖², the exact meta-gradient of task i is −λ dφᵢ,ν*/dν at ν = 0.
Where φ moves in some parameters only and is θ in the others (``Learner.adapt``), it is d/dν of ∇_θ min_φ hᵢ, which in
those others is ∇(f̂ᵢ + νfᵢ)(φᵢ,ν*).
No Hessian is touched, and the memory is that of plain gradient descent on the tasks solved at once.
"""

from copy import copy
from itertools import count
from math import factorial, prod
from typing import Literal, Self

import torch
from torch import Tensor

from fobmaml.arguments import number, or_auto, refuse, whole_number
from fobmaml.engine import Learner
from fobmaml.estimators.base import Cost, Estimate, Estimator
from fobmaml.estimators.nu import balanced_nu
from fobmaml.solvers import InnerProblem, Solution, Solver
from fobmaml.tasks.batch import TaskBatch

Nu = float | Literal["auto"]
MEASURED = 2
"""Tasks by which ν is chosen: the first ones."""


class FiniteDifference(Estimator):
    """∇Fᵢ(θ) ≈ −(λ/ν) Σⱼ wⱼ φᵢ,(oⱼν), for a stencil of offsets o and weights w of a first derivative.

    Every offset is solved from θ with the same steps, so that most of the solver's error cancels in the difference.
    Non-zero offsets take gradients of support and query, offset zero of the support alone.

    Where φ is θ in some parameters, the estimate is there (1/ν) Σⱼ wⱼ ∇(f̂ᵢ + oⱼν fᵢ)(φᵢ,(oⱼν)), by one more gradient
    an offset. To first order that is ∇fᵢ and the mixed term ∂²f̂ᵢ dφ/dν.

    ``envelope``: α. The estimate is of ∇(Fᵢ + αMᵢ), where Mᵢ(θ) = min_φ f̂ᵢ(φ) + (λ/2)‖φ − θ‖² is the Moreau envelope of
    the support loss. ∇Mᵢ = λ(θ − φᵢ,0*), Reptile's direction on the support set, costs nothing: φᵢ,0 is solved or, in
    a stencil without offset zero, interpolated from the others, Σⱼ lⱼ φᵢ,(oⱼν), with an error of the stencil's order.

    ``nu``: ν, or ``auto``: where truncation and noise are in balance by ``balanced_nu``, measured on the first two
    tasks at each call of ``estimate`` (of several processes, by each on its own), and so a function of θ, tasks and
    settings.

    Cost: (non-zero offsets) × steps gradients of support and query, plus steps support gradients if 0 is an offset: of
    K steps, S support and Q query examples, K(S + Q) example-gradients a non-zero offset, and K·S; of ``auto`` as
    much for six more tasks, of order 4 for five (or, where the tasks are harder than most, for more of them).
    Memory: (tasks at once) × (non-zero offsets) times one task's gradient; flat in the inner steps.
    ``auto`` solves two tasks at three times the offsets at once.
    Raises ValueError unless λ > 0, ν > 0, α ≥ 0 and the weights sum to zero, and for a model in half precision.

    >>> estimator = fobmaml.estimators.FiniteDifference(solver, 2.0, 0.1, offsets=(0, 1, 2), weights=(-1.5, 2.0, -0.5))
    >>> estimator.order
    2
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.4935]])}
    """

    differentiates_solution = True

    def __init__(
        self,
        solver: Solver,
        lam: float,
        nu: Nu,
        offsets: tuple[int, ...],
        weights: tuple[float, ...],
        envelope: float = 0.0,
    ):
        super().__init__(solver, lam)
        self.envelope = number("envelope", envelope, at_least=0.0)
        self.nu = "auto" if nu == "auto" else _positive(nu)
        if len(offsets) != len(weights) or len(set(offsets)) != len(offsets) or abs(sum(weights)) > 1e-12:
            raise refuse("weights", weights, f"one weight for each of the distinct offsets {offsets}, with sum zero")
        self.stencil = dict(zip(offsets, weights, strict=True))

    def cost(self, support: int, query: int) -> Cost:
        return Cost(sum(offset != 0 for offset in self.stencil), support + query, second_order=False)

    @property
    def order(self) -> int:
        """p: the error is O(ν^p)."""
        return next(p for p in count(1) if abs(sum(w * o ** (p + 1) for o, w in self.stencil.items())) > 1e-9)

    def settled(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Self:
        if isinstance(self.nu, float):
            return self
        _check_precision(learner)

        def measured(nus: list[float]) -> list[Tensor]:
            return self._estimates(learner, theta, tasks[:MEASURED], nus)[0]

        settled = copy(self)
        settled.nu = balanced_nu(measured, self.order, torch.finfo(learner.dtype).eps, len(tasks))
        return settled

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        if not isinstance(self.nu, float):
            return self.settled(learner, theta, tasks)(learner, theta, tasks)
        _check_precision(learner)
        (gradients,), centre = self._estimates(learner, theta, tasks, [self.nu])

        def adapted() -> Solution:
            return self.adapt(learner, theta, tasks) if centre is None else centre

        return Estimate(gradients, adapted)

    def _estimates(
        self, learner: Learner, theta: Tensor, tasks: TaskBatch, nus: list[float]
    ) -> tuple[list[Tensor], Solution | None]:
        """[T, P] at each of ``nus``, by one solve of all their offsets, and one of offset zero if there is."""
        offsets = list(dict.fromkeys(o * nu for nu in nus for o in self.stencil if o != 0))
        perturbed = self.solve(InnerProblem(learner, theta, tasks, self.lam, theta.new_tensor(offsets)))
        displacement = perturbed.envelope.view(len(tasks), len(offsets), -1)
        centre = self.adapt(learner, theta, tasks) if 0 in self.stencil else None
        found = []
        for nu in nus:
            # Displacements φ − θ rather than the solutions: the weights sum to zero, and rounding is smaller.
            stencil = {o: w + self.envelope * nu * self._at_zero(o) for o, w in self.stencil.items()}
            weights = [0.0] * len(offsets)
            for o in stencil:
                if o != 0:
                    weights[offsets.index(o * nu)] = stencil[o]
            difference = torch.einsum("j,tjp->tp", theta.new_tensor(weights), displacement)
            if centre is not None:
                difference += stencil[0] * centre.envelope
            found.append(-(self.lam / nu) * difference)
        return found, centre

    def _at_zero(self, offset: int) -> float:
        """The weight of an offset in the interpolation at zero by all of them, which is zero's own if there is."""
        return prod(other / (other - offset) for other in self.stencil if other != offset)


def _positive(nu: Nu) -> float:
    with or_auto():
        return number("nu", nu, above=0.0)


def _check_precision(learner: Learner) -> None:
    if learner.dtype not in (torch.float32, torch.float64):
        raise refuse(
            "model",
            learner.dtype,
            "float32 or float64 parameters: differences of solutions lose all digits of a shorter format",
        )


class Forward(FiniteDifference):
    """−λ (φ_ν − φ_0) / ν, [T, P]. Bias O(ν) + O(δ/ν): O(δ^{1/2}) at ν ∝ δ^{1/2}.

    Cost: K (2S + Q) example-gradients a task, of K inner steps, S support and Q query examples. Memory: flat in K.
    ``nu``, ``envelope`` and what raises ValueError: as of ``FiniteDifference``.
    Reference: Chayti & Jaggi, arXiv:2409.03682, forward estimator.

    >>> estimator = fobmaml.estimators.Forward(solver, lam=2.0, nu=0.1)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.4286]])}
    """

    def __init__(self, solver: Solver, lam: float = 0.5, nu: Nu = 0.05, envelope: float = 0.0):
        super().__init__(solver, lam, nu, (0, 1), (-1.0, 1.0), envelope)


class Central(FiniteDifference):
    """−λ Σⱼ αⱼ φ_{jν} / ν with the central weights of even order p, j = ±1 … ±p/2.

    α_j = −α_{−j} = (−1)^{j+1} (m!)² / (j (m − j)! (m + j)!), m = p/2. Bias O(ν^p) + O(δ/ν): O(δ^{p/(p+1)}) at
    ν ∝ δ^{1/(p+1)}.

    Cost: p K (S + Q) example-gradients a task, of K inner steps, S support and Q query examples. Memory: flat in K.
    Reference: Chen, Li, Chayti & Zhang, F²SA-p (arXiv:2509.02937).
    Raises ValueError unless ``order``, p, is even, and as ``FiniteDifference`` does, whose ``nu`` and
    ``envelope`` it has.

    >>> estimator = fobmaml.estimators.Central(solver, lam=2.0, nu=0.4, order=4)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.4881]])}
    """

    def __init__(self, solver: Solver, lam: float = 0.5, nu: Nu = 0.05, order: int = 4, envelope: float = 0.0):
        if whole_number("order", order, at_least=2) % 2:
            raise refuse("order", order, "an even number of at least 2")
        m = order // 2
        alpha = {
            j: (-1) ** (j + 1) * factorial(m) ** 2 / (j * factorial(m - j) * factorial(m + j)) for j in range(1, m + 1)
        }
        offsets = tuple(sign * j for j in alpha for sign in (1, -1))
        weights = tuple(sign * alpha[j] for j in alpha for sign in (1, -1))
        super().__init__(solver, lam, nu, offsets, weights, envelope)


class Symmetric(Central):
    """−λ (φ_ν − φ_−ν) / (2ν), [T, P]. Bias O(ν²) + O(δ/ν): O(δ^{2/3}) at ν ∝ δ^{1/3}.

    Cost: 2K (S + Q) example-gradients a task, of K inner steps, S support and Q query examples. Memory: flat in K.
    ``nu``, ``envelope`` and what raises ValueError: as of ``FiniteDifference``.
    Reference: Chayti & Jaggi, arXiv:2409.03682, symmetric estimator.

    >>> estimator = fobmaml.estimators.Symmetric(solver, lam=2.0, nu=0.1)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.5038]])}
    """

    def __init__(self, solver: Solver, lam: float = 0.5, nu: Nu = 0.05, envelope: float = 0.0):
        super().__init__(solver, lam, nu, 2, envelope)
