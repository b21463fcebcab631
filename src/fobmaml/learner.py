"""A network and a loss as functions of stacked flat parameters: one row a task."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fobmaml.tasks.batch import TaskBatch

LossFn = Callable[[Tensor, Tensor], Tensor]


class Learner:
    """The only place that knows how a flat row of parameters folds into a network's layers.

    ``model``: any ``torch.nn.Module``; its trainable parameters, in the order of ``named_parameters``, are a row.
    One that has a method ``forward_stacked(parameters, x)`` (see ``CNN1d``) is applied to all rows by it, others by
    ``torch.func.vmap``. ``loss_fn(outputs [N, ...], targets [N, ...])`` returns the mean loss.

    Raises ValueError for a model without trainable parameters, and for one whose loss is not a function of
    parameters and one example set alone (batch statistics, active dropout).
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        _check_pure(model)
        self.model, self.loss_fn = model, loss_fn
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model: takes a module with trainable parameters, got none")
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1:
            raise ValueError(f"model: takes parameters of one dtype on one device, got {sorted(map(str, kinds))}")
        ((self.dtype, self.device),) = kinds
        self.names = list(trainable)
        self.shapes = [p.shape for p in trainable.values()]
        self.sizes = [p.numel() for p in trainable.values()]

    @property
    def parameter_count(self) -> int:
        return sum(self.sizes)

    def theta(self) -> Tensor:
        """A copy of the model's trainable parameters, flat: [P]."""
        parameters = dict(self.model.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.names])

    def fold(self, rows: Tensor) -> dict[str, Tensor]:
        """[R, P] (or [P]) -> {parameter name: [R, ...] (or [...])}, views of ``rows``."""
        parts = rows.split(self.sizes, dim=-1)  # one backward for all parts, unlike slicing
        return {name: part.reshape(*rows.shape[:-1], *shape)
                for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """The network with parameters phi[r] on the examples x[r]: [R, P], [R, N, ...] -> [R, N, ...]."""
        parameters = self.fold(phi)
        stacked: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = getattr(self.model, "forward_stacked", None)
        if stacked is not None:
            return stacked(parameters, x)
        return vmap(lambda p, inputs: functional_call(self.model, p, (inputs,)))(parameters, x)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of each row: [R, N, ...], [R, N, ...] -> [R]."""
        return vmap(self.loss_fn)(outputs, targets)

    def query_loss(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """fᵢ(φᵢ), row i on task i: [T, P] -> [T]."""
        return self.losses(self.outputs(phi, tasks.query_x), tasks.query_y)

    def query_gradient(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """∇fᵢ(φᵢ), row i on task i: [T, P] -> [T, P]. Cost: one query gradient a task."""
        phi = phi.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.query_loss(phi, tasks).sum(), phi)
        return gradient


def _check_pure(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = f"model: {type(module).__name__} '{name}'"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            batch_statistics = module.training or module.running_mean is None
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                batch_statistics = module.training and module.track_running_stats
            if batch_statistics:
                raise ValueError(f"{kind} uses or updates batch statistics, so a task's loss is not a function of its "
                                 "parameters alone: takes a layer without them (GroupNorm, LayerNorm), or .eval()")
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{kind} is random, so differences of solutions are noise: takes p=0 or .eval()")
