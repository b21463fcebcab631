"""The curvature that first-order methods drop: the Hessian of the support loss and its two parts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from fobmaml.arguments import refuse
from fobmaml.engine import Learner
from fobmaml.engine.losses import Loss
from fobmaml.engine.modules import differentiable
from fobmaml.measure.base import Event, OnValidationTasks, Training
from fobmaml.precision import full_precision
from fobmaml.solvers import GradientDescent
from fobmaml.tasks.batch import TaskBatch

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Curvature:
    """Means over tasks at θ. With M the network's outputs and ℓ the loss of its outputs, the Hessian of the support
    loss is JᵀBJ + Σⱼ (∂ℓ/∂Mⱼ) ∇²Mⱼ: the Gauss–Newton part (B = ∂²ℓ/∂M²), and the network's own curvature.

    ``hessian``, ``gauss_newton``, ``network``: spectral norms of the sum and of the two parts; ``lowest``: the least
    eigenvalue of the sum. ``fomaml_error``: ‖g − ∇F‖/‖∇F‖ of FO-MAML's g, ∇F the gradient of MAML's K-step objective;
    ``gauss_newton_error``: the same for a g that drops the network's own curvature only.
    """

    hessian: float
    gauss_newton: float
    network: float
    lowest: float
    fomaml_error: float
    gauss_newton_error: float


def curvature(learner: Learner, tasks: TaskBatch, solver: GradientDescent) -> Curvature:
    """At the present parameters of the network of ``learner``, by dense matrices [P, P]: for networks of a few thousand
    parameters, in float64.

    ``solver``: gradient descent without momentum, whose K steps MAML's objective takes. Cost, a task: P
    Hessian-vector products and three eigenvalue decompositions [P, P], and 2K products.
    Reference: Schraudolph 2002 (Gauss–Newton products); Finn et al. 2017, arXiv:1703.03400, section 5.2.
    Raises ValueError for a solver with momentum or batches, and where tasks adapt some parameters only.
    """
    if solver.momentum or solver.batch:
        raise ValueError(
            f"solver: momentum={solver.momentum}, batch={solver.batch}: takes 0 and None, as the formula of MAML does"
        )
    if learner.moves is not None:
        raise refuse("adapt", learner.adapt, "all, for a curvature in all parameters")
    with differentiable(twice=True):
        return _curvature(learner, tasks, solver)


def _curvature(learner: Learner, tasks: TaskBatch, solver: GradientDescent) -> Curvature:
    theta = learner.theta()
    exact, first_order, without_network = [], [], []
    spectra = torch.zeros(4, dtype=torch.float64)
    for task in tasks.split(1):
        support = _Loss(
            learner, learner.support_loss or learner.loss, task.support_x, task.support_y, task.support_mask
        )
        query = _Loss(learner, learner.loss, task.query_x, task.query_y, task.query_mask)
        eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
        hessian = vmap(support.hvp(theta), chunk_size=256)(eye)
        gauss_newton = support.gauss_newton(theta)
        eigenvalues = [torch.linalg.eigvalsh(part) for part in (hessian, gauss_newton, hessian - gauss_newton)]
        spectra += torch.stack([*(e.abs().max() for e in eigenvalues), eigenvalues[0].min()]).cpu() / len(tasks)
        path = [theta]
        for rate in solver.rates:
            path.append(path[-1] - rate * grad(support)(path[-1]))
        g = grad(query)(path.pop())
        by_hessian, by_gauss_newton = g, g
        for rate, phi in zip(reversed(solver.rates), reversed(path), strict=True):
            by_hessian = by_hessian - rate * support.hvp(phi)(by_hessian)
            by_gauss_newton = by_gauss_newton - rate * support.gauss_newton_product(phi)(by_gauss_newton)
        exact.append(by_hessian)
        first_order.append(g)
        without_network.append(by_gauss_newton)
    meta_gradient = torch.stack(exact).mean(0)

    def error(rows: list[Tensor]) -> float:
        return float((torch.stack(rows).mean(0) - meta_gradient).norm() / meta_gradient.norm())

    hessian_norm, gauss_newton_norm, network_norm, lowest = spectra.tolist()
    return Curvature(hessian_norm, gauss_newton_norm, network_norm, lowest, error(first_order), error(without_network))


def _hvp(function: Function, at: Tensor, v: Tensor) -> Tensor:
    """The Hessian times v, by reverse mode twice: some losses of torch's have no forward mode of their gradient."""
    return grad(lambda x: (grad(function)(x) * v).sum())(at)


class _Loss:
    """One example set's loss as a function of flat parameters, and products with its curvature."""

    def __init__(self, learner: Learner, loss: Loss, x: Tensor, y: Tensor, mask: Tensor | None):
        x, y = (x[0], y[0]) if mask is None else (x[mask], y[mask])
        self.outputs: Function = lambda phi: learner.module(learner.unflatten(phi), x).flatten()
        shape = self.outputs(learner.theta()).view(len(y), -1).shape if y.dim() == 1 else y.shape
        self.loss: Function = lambda m: loss.loss_fn(m.view(shape), y)

    def __call__(self, phi: Tensor) -> Tensor:
        return self.loss(self.outputs(phi))

    def hvp(self, phi: Tensor) -> Function:
        return lambda v: _hvp(self, phi, v)

    def gauss_newton_product(self, phi: Tensor) -> Function:
        def product(v: Tensor) -> Tensor:
            m, pushed = cast(tuple[Tensor, Tensor], jvp(self.outputs, (phi,), (v,)))
            return vjp(self.outputs, phi)[1](_hvp(self.loss, m, pushed))[0]

        return product

    def gauss_newton(self, phi: Tensor) -> Tensor:
        j = jacrev(self.outputs)(phi)
        return j.T @ jacrev(grad(self.loss))(self.outputs(phi)) @ j


@dataclass
class CurvatureMeasurement(OnValidationTasks):
    """``curvature`` along the run's own inner steps, every so many meta-steps. Raises ValueError for a
    solver that is not gradient descent on all examples without momentum, and where tasks adapt some parameters only."""

    keys: ClassVar = {
        "curvature/hessian": "spectral norm of the support loss's Hessian at θ, mean over tasks as all of these",
        "curvature/gauss_newton": "of its Gauss–Newton part",
        "curvature/network": "of the network's own curvature",
        "curvature/lowest": "the Hessian's least eigenvalue",
        "curvature/fomaml_error": "‖g − ∇F‖/‖∇F‖ of FO-MAML, F the objective after the inner steps",
        "curvature/gauss_newton_error": "of what drops the network's own curvature only",
    }
    stream = 3

    def check(self, training: Training) -> None:
        super().check(training)
        if self.every:
            self.steps_of(training)
            if training.learner.moves is not None:
                raise refuse("curvature.every", self.every, "adapt=all, or 0 for never")

    def steps_of(self, training: Training) -> GradientDescent:
        """The solver, whose steps are followed. Raises ValueError for one that is not plain gradient descent."""
        solver = training.estimator.solver
        if not isinstance(solver, GradientDescent) or solver.momentum or solver.batch:
            raise refuse("curvature.every", self.every, "solver=gd without momentum and batches, or 0 for never")
        return solver

    def __call__(self, training: Training) -> Event:
        tasks = training.placed(self.sample(training))
        with full_precision(training.learner.device):
            found = curvature(training.learner, tasks, self.steps_of(training))
        return {f"curvature/{name}": value for name, value in asdict(found).items()}
