"""MAML: back-propagation through the inner solver's steps."""

from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from fobmaml.arguments import refuse
from fobmaml.engine import Learner
from fobmaml.estimators.base import Adaptation, Estimate, Estimator
from fobmaml.estimators.multi_step import multi_step_gradient, part_of_training
from fobmaml.solvers import Descent, InnerProblem, Solution, Solver
from fobmaml.tasks.batch import TaskBatch

RATES = "solver.lr"


class MAML(Estimator):
    """dfᵢ(φᵢ,K(θ))/dθ, exactly, where φᵢ,K is the K-th step of the solver.

    ``checkpoint``: keep the parameters of each step instead of its activations, which are computed again.

    Three settings from *How to train your MAML*, all off by default; what changes in training goes by ``progress``:

    - ``multi_step``: the derivative of Σ_k w_k fᵢ(φᵢ,k), with equal weights at the start of training that are the last
      step's alone after this part of it (``step_weights``).
    - ``learn_lr``: the solver's step lengths, one for each step and parameter tensor, start at ``solver.lr`` and are
      outer variables beside θ (``variables``), used wherever tasks are adapted. The number is their outer learning
      rate, as a multiple of θ's; their authors' is 1. They may become negative.
    - ``second_order_from``: until this part of training directions are taken for constants, as in FO-MAML.

    Cost: K support gradients, as many Hessian-vector products, and one query gradient a task; with ``checkpoint``
    K more support gradients; with ``multi_step`` K query gradients until it is over. No Hessian-vector products before
    ``second_order_from``. Memory: K times one task's activations, or its parameters, for the tasks solved at once.
    Reference: Finn, Abbeel & Levine 2017, arXiv:1703.03400, equation (1); λ > 0 adds the proximal term to its inner
    problem. Antoniou, Edwards & Storkey 2019, arXiv:1810.09502, section 4. Raises ValueError for a solver that cannot
    be differentiated through, for the three settings one that is no ``Descent``, and for one below 0.

    >>> estimator = fobmaml.estimators.MAML(solver, lam=2.0)
    >>> fobmaml.meta_gradient(estimator, model, loss_fn, tasks).gradient
    {'weight': tensor([[-1.5000]])}
    """

    needs_proximal_term = False

    def __init__(
        self,
        solver: Solver,
        lam: float = 0.0,
        checkpoint: bool = False,
        multi_step: float = 0.0,
        learn_lr: float = 0.0,
        second_order_from: float = 0.0,
    ):
        super().__init__(solver, lam)
        if not solver.differentiable_steps:
            raise refuse("solver", type(solver).__name__, "a solver with differentiable steps (GradientDescent)")
        self.checkpoint = checkpoint
        self.multi_step = part_of_training("multi_step", multi_step, solver)
        self.second_order_from = part_of_training("second_order_from", second_order_from, solver)
        self.learn_lr = part_of_training("learn_lr", learn_lr, solver)
        if learn_lr and isinstance(getattr(solver, "rates", None), Tensor):
            raise refuse("learn_lr", learn_lr, "a solver.lr that is a number, or one a step")
        self._rates: nn.Parameter | None = None

    def variables(self, learner: Learner) -> dict[str, nn.Parameter]:
        """``solver.lr`` [K, parameter tensors of the network], where they are learned. Raises ValueError for a network
        with another number of them than at the first call."""
        if not self.learn_lr or not isinstance(self.solver, Descent):
            return {}
        tensors = len(learner.shapes)
        if self._rates is None:
            start = torch.tensor([*self.solver.rates], dtype=learner.dtype, device=learner.device)
            self._rates = nn.Parameter(start.unsqueeze(1).repeat(1, tensors))
        if self._rates.shape[1] != tensors:
            raise refuse(
                "model",
                f"{tensors} parameter tensors",
                f"{self._rates.shape[1]}, for which this estimator has learned step lengths",
            )
        return {RATES: self._rates}

    def learned(self, learner: Learner) -> Solver:
        """The solver, with the step lengths learned so far."""
        if not isinstance(self.solver, Descent) or not (variables := self.variables(learner)):
            return self.solver
        sizes = torch.tensor([shape.numel() for shape in learner.shapes.values()])
        solver = copy(self.solver)
        rates = variables[RATES].detach()
        solver.rates = rates.repeat_interleave(sizes.to(rates.device), dim=1)
        return solver

    def adapting(self, by: Adaptation) -> Self:
        other = super().adapting(by)
        if by.solver is not None:
            other.learn_lr = 0.0  # its step lengths are said
        return other

    def adapt(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Solution:
        solver = self.learned(learner)
        if solver is self.solver:
            return super().adapt(learner, theta, tasks)
        return solver.solve(InnerProblem(learner, theta, tasks, self.lam))

    def reference(self, tol: float) -> tuple[Estimator, str] | None:
        if self.lam > 0:
            return None
        exact = copy(self)  # with the step lengths learned so far
        exact.multi_step = exact.second_order_from = 0.0
        return exact, "exact after the solver's steps, lam=0"

    def __call__(self, learner: Learner, theta: Tensor, tasks: TaskBatch) -> Estimate:
        problem, solver = InnerProblem(learner, theta, tasks, self.lam), self.learned(learner)
        if not isinstance(solver, Descent):
            solution, pull_back = solver.unroll(problem, self.checkpoint)
            return Estimate(pull_back(learner.query_gradient(solution.phi, tasks)), lambda: solution)
        variables = {
            name: theta.new_zeros(len(tasks), *variable.shape) for name, variable in self.variables(learner).items()
        }

        def slope(step: int, shares: Tensor) -> None:
            parts = learner.unflatten(shares).values()
            variables[RATES][:, step] = torch.stack([part.flatten(1).sum(1) for part in parts], dim=1)

        solution, gradients = multi_step_gradient(
            solver,
            problem,
            lambda phi: learner.query_gradient(phi, tasks),
            self.progress / self.multi_step if self.multi_step else 1.0,
            checkpoint=self.checkpoint,
            first_order=self.progress < self.second_order_from,
            slope=slope if variables else None,
        )
        return Estimate(gradients, lambda: solution, variables=variables)
