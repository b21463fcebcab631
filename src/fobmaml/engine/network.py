"""A caller's module as a function of flat parameters, one row a task."""

from typing import Any

import torch
from torch import Tensor, nn

from fobmaml.arguments import refuse
from fobmaml.engine.modules import PureModule


class Network:
    """The only place that knows how a flat row of parameters folds into a network's layers.

    ``model``: any ``torch.nn.Module``; its trainable parameters, in the order of ``named_parameters``, are a row. The
    weight of an ``nn.Conv1d``, [out, in, places], lies there ``turned``, as [out, places, in]: compiled code reads it
    so. The model is called as a private copy and comes back as it was.

    Raises ValueError for a model without trainable parameters, and for one whose outputs are not a function of
    parameters and inputs (running batch statistics, active dropout).
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
        weights = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.Conv1d)}
        self.turned = {n for n, p in trainable.items() if id(p) in weights and min(p.shape[1:]) > 1}  # else no change
        self._sizes = [p.numel() for p in trainable.values()]

    @property
    def parameter_count(self) -> int:
        return sum(self._sizes)

    def theta(self) -> Tensor:
        """A copy of the model's trainable parameters, flat: [P]."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in self.shapes}
        parts = [p.detach().mT if name in self.turned else p.detach() for name, p in parameters.items()]
        return torch.cat([part.reshape(-1) for part in parts])

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """[R, P] (or [P]) -> {parameter name: [R, ...] (or [...])}, each as contiguous as ``rows``."""
        return {n: part.contiguous() if n in self.turned else part for n, part in self.views(rows).items()}

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """The same as views of ``rows``."""
        parts = rows.split(self._sizes, dim=-1)  # one backward for all parts, unlike slicing
        unfolded = {}
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            if name in self.turned:
                out, into, places = shape
                unfolded[name] = part.reshape(*rows.shape[:-1], out, places, into).mT
            else:
                unfolded[name] = part.reshape(rows.shape[:-1] + shape)
        return unfolded

    def one_row(self, phi: Tensor, x: Tensor) -> Tensor:
        """The module itself with a row of parameters: [P], [N, ...] -> [N, ...]."""
        return self.module(self.unflatten(phi), x)
