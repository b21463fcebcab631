"""Outer optimizers for an objective whose smoothness grows with its gradient: normalized and clipped steps."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fobmaml.arguments import number


def _global_norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


class _WholeVectorOptimizer(Optimizer):
    """A step that looks at all parameters of all groups as one vector. Gradients have to be dense."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. ``closure``: re-evaluates the model, sets the gradients and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if moving:
            self._move(moving)
        return loss

    def _move(self, moving: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        raise NotImplementedError


class SNGDM(_WholeVectorOptimizer):
    """Stochastic normalized gradient descent with momentum: m ← βm + (1 − β)g, θ ← θ − lr · m/‖m‖.

    ``params``: as of any torch optimizer. ‖m‖ is the norm over all parameters of all groups, so that with one learning
    rate every step has length lr. A zero m makes no step. Reference: Chayti & Jaggi, arXiv:2409.03682; Cutkosky & Mehta
    2020, arXiv:2002.03305.
    Raises ValueError unless lr > 0 (a schedule may set it to 0 later) and 0 ≤ beta < 1.

    >>> model.weight.grad = torch.tensor([[-3.0]])
    >>> fobmaml.optim.SNGDM(model.parameters(), lr=0.25).step()
    >>> model.weight.data
    tensor([[0.2500]])
    """

    def __init__(self, params: ParamsT, lr: float = 0.3, beta: float = 0.9):
        number("lr", lr, above=0.0)
        number("beta", beta, at_least=0.0, below=1.0)
        super().__init__(params, {"lr": lr, "beta": beta})

    def _move(self, moving: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        momenta = []
        for p, gradient, group in moving:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momenta.append(state["momentum"].lerp_(gradient, 1.0 - group["beta"]))
        norm = _global_norm(momenta)
        scale = torch.where(norm > 0, 1.0 / norm, 0.0)
        for (p, _, group), m in zip(moving, momenta, strict=True):
            p.sub_(group["lr"] * scale * m)


class ClippedSGD(_WholeVectorOptimizer):
    """Clipped gradient descent with momentum: g ← g · min(1, max_norm/‖g‖), v ← μv + g, θ ← θ − lr·v.

    ``params``: as of any torch optimizer. ‖g‖ is the norm over all parameters of all groups. Reference: Zhang, He, Sra
    & Jadbabaie 2020, arXiv:1905.11881.
    Raises ValueError unless lr > 0, max_norm > 0 and 0 ≤ momentum < 1.

    >>> model.weight.grad = torch.tensor([[-3.0]])
    >>> fobmaml.optim.ClippedSGD(model.parameters(), lr=0.1, max_norm=0.5).step()
    >>> model.weight.data
    tensor([[0.0500]])
    """

    def __init__(self, params: ParamsT, lr: float = 0.1, max_norm: float = 0.05, momentum: float = 0.9):
        number("lr", lr, above=0.0)
        number("momentum", momentum, at_least=0.0, below=1.0)
        self.max_norm = number("max_norm", max_norm, above=0.0)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def _move(self, moving: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        scale = torch.clamp(self.max_norm / _global_norm([gradient for _, gradient, _ in moving]), max=1.0)
        for p, gradient, group in moving:
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p)
            velocity = state["velocity"].mul_(group["momentum"]).add_(scale * gradient)
            p.sub_(group["lr"] * velocity)
