"""A caller's module as a function of flat parameters, one row a task."""

from typing import Any

import torch
from torch import Tensor, nn

from fobmaml.arguments import refuse
from fobmaml.engine.modules import PureModule


class Network:
    """The only place that knows how a flat row of parameters folds into a network's layers.

    ``model``: any ``torch.nn.Module``; its trainable parameters, in the order of ``named_parameters``, are a row. It is
    called as a private copy and comes back as it was. Raises ValueError for a model without trainable parameters, and
    for one whose outputs are not a function of parameters and inputs (running batch statistics, active dropout).
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise refuse("model", type(model).__name__, "a torch.nn.Module")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model: takes a module with trainable parameters, got none")
        for name, p in trainable.items():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"model: parameter '{name}' has no shape yet: takes a module that was called once")
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1 or not all(dtype.is_floating_point and device.type != "meta" for dtype, device in kinds):
            raise ValueError(
                f"model: takes parameters of one real dtype on one real device, got {sorted(map(str, kinds))}"
            )
        ((self.dtype, self.device),) = kinds
        self.model: Any = model
        self.module = PureModule(model, trainable)
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self._sizes = [p.numel() for p in trainable.values()]
        self.lists_layers = _lists_its_layers(self.model, set(trainable))

    @property
    def parameter_count(self) -> int:
        return sum(self._sizes)

    def theta(self) -> Tensor:
        """A copy of the model's trainable parameters, flat: [P]."""
        parameters = dict(self.model.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.shapes])

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """[R, P] (or [P]) -> {parameter name: [R, ...] (or [...])}, views of ``rows``."""
        parts = rows.split(self._sizes, dim=-1)  # one backward for all parts, unlike slicing
        return {
            name: part.reshape(rows.shape[:-1] + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def one_row(self, phi: Tensor, x: Tensor) -> Tensor:
        """The module itself with a row of parameters: [P], [N, ...] -> [N, ...]."""
        return self.module(self.unflatten(phi), x)


def _lists_its_layers(model: Any, trainable: set[str]) -> bool:
    """Whether ``stacked_layers`` can be the model: it stands beside ``forward``, all that it names is trainable, and
    nothing is hooked in between."""
    kind = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    if "stacked_layers" not in vars(kind):
        return False
    for module in model.modules():
        if "forward" in vars(module) or any(
            (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        ):
            return False
    return sorted(n for layer in model.stacked_layers() for n in (layer.weight, layer.bias)) == sorted(trainable)
