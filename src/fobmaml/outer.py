"""What is trained, as one vector: a network's parameters, and behind them an estimator's own variables."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fobmaml.engine import Learner
from fobmaml.estimators import Estimator


class Outer:
    """θ [P] and the estimator's variables, flat, in one vector [P + V]; V is 0 for most estimators."""

    def __init__(self, learner: Learner, estimator: Estimator):
        named = dict(learner.model.named_parameters())
        self.learner, self.estimator = learner, estimator
        self.parameters = {name: named[name] for name in learner.shapes}
        self.variables = estimator.variables(learner)

    def optimizer(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> Optimizer:
        """``make`` of the network's parameters, and the variables in a group of their own: at the first group's lr
        times ``Estimator.learn_lr``."""
        optimizer = make([*self.parameters.values()])
        if self.variables:
            lr = self.estimator.learn_lr * optimizer.param_groups[0]["lr"]
            optimizer.add_param_group({"params": [*self.variables.values()], "lr": lr})
        return optimizer

    def vector(self) -> Tensor:
        return torch.cat([self.learner.theta(), *(v.detach().flatten() for v in self.variables.values())])

    def take(self, vector: Tensor) -> Tensor:
        """θ out of such a vector; the variables get their values."""
        theta, own = self._parts(vector)
        for variable, values in own:
            variable.data.copy_(values)
        return theta

    def set_gradients(self, gradient: Tensor) -> None:
        """Into each ``.grad``."""
        theta, own = self._parts(gradient)
        for name, part in self.learner.unflatten(theta).items():
            self.parameters[name].grad = part
        for variable, values in own:
            variable.grad = values

    def _parts(self, vector: Tensor) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
        sizes = [v.numel() for v in self.variables.values()]
        theta, *own = vector.split([self.learner.parameter_count, *sizes])
        return theta, [(v, part.view_as(v)) for v, part in zip(self.variables.values(), own, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.learner.model.state_dict(), "variables": {n: v.data for n, v in self.variables.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.model.load_state_dict(state["model"])
        for name, variable in self.variables.items():
            variable.data.copy_(state["variables"][name])

    def begin_from(self, state: Mapping[str, Any]) -> None:
        """The network of another run's ``state_dict``, and of its variables those that there are here, too.

        Raises ValueError where a shape differs, naming it.
        """
        ours, there = self.learner.model.state_dict(), state["model"]
        known = [name for name in self.variables if name in state["variables"]]
        pairs = {name: (ours.get(name), there.get(name)) for name in dict.fromkeys((*ours, *there))}
        pairs |= {name: (self.variables[name], state["variables"][name]) for name in known}
        if differing := [name for name, (a, b) in pairs.items() if _shape(a) != _shape(b)]:
            shapes = [f"{name} is {_shape(pairs[name][0])} (there {_shape(pairs[name][1])})" for name in differing[:3]]
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(f"takes a run of the same network, and here {', '.join(shapes)}{more}")
        self.learner.model.load_state_dict(there)
        for name in known:
            self.variables[name].data.copy_(state["variables"][name])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))
