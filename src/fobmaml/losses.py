"""Losses of stacked outputs: a number a row, its gradient by the outputs, and the derivative of that."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

LossFn = Callable[[Tensor, Tensor], Tensor]


class RowLoss:
    """Lᵣ = Σ_p a_{r,p} · (the mean loss of row r over the examples of part p), of outputs [R, N, ...].

    ``loss_fn(outputs, targets)``: any mean over examples. ``targets`` [R, N, ...]. ``parts``: slices of the examples,
    each with its factor a, a number or [R].
    """

    def __init__(self, loss_fn: LossFn, targets: Tensor, parts: Sequence[tuple[slice, float | Tensor]]):
        self.loss_fn, self.targets, self.parts = loss_fn, targets, parts

    def __call__(self, outputs: Tensor) -> Tensor:
        """[R, N, ...] -> [R]."""
        return sum((factor * vmap(self.loss_fn)(outputs[:, part], self.targets[:, part])
                    for part, factor in self.parts), start=outputs.new_zeros(len(outputs)))

    def linearize(self, outputs: Tensor, second_order: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """g = ∂ΣᵣLᵣ/∂outputs, and t ↦ the derivative of g as the outputs move along t, if ``second_order``."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=second_order)
        return g.detach(), lambda t: moved(g, leaf, t)


def moved(gradient: Tensor, leaf: Tensor, along: Tensor) -> Tensor:
    """The derivative of a gradient, whose graph is kept, as ``leaf`` moves along a vector; zero if it is constant."""
    if not gradient.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(gradient, leaf, along, retain_graph=True, materialize_grads=True)[0]


class CrossEntropy(RowLoss):
    """The same for ``torch.nn.functional.cross_entropy`` and class indices, without vmap and autograd."""

    def __init__(self, targets: Tensor, parts: Sequence[tuple[slice, float | Tensor]]):
        super().__init__(F.cross_entropy, targets, parts)
        self.weights, self.one_hot = torch.empty(0), torch.empty(0)

    def prepare(self, outputs: Tensor) -> None:
        """Makes ``weights`` [R, N, 1] and ``one_hot`` [R, N, classes] of the dtype of ``outputs`` [R, N, classes]."""
        if not len(self.weights):
            self.weights = outputs.new_empty(*self.targets.shape, 1)
            for part, factor in self.parts:
                share = self.weights[:, part]
                share.copy_((outputs.new_ones(len(outputs)) * factor / share.shape[1]).view(-1, 1, 1))
            self.one_hot = F.one_hot(self.targets, outputs.shape[-1]).to(outputs.dtype)

    def __call__(self, outputs: Tensor) -> Tensor:
        self.prepare(outputs)
        terms = F.cross_entropy(outputs.flatten(0, 1), self.targets.flatten(), reduction="none")
        return (terms.view_as(self.targets) * self.weights[..., 0]).sum(1)

    def linearize(self, outputs: Tensor, second_order: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.prepare(outputs)
        p = outputs.softmax(-1)
        return ((p - self.one_hot).mul_(self.weights),
                lambda t: (t - (p * t).sum(-1, keepdim=True)).mul_(p).mul_(self.weights))


def row_loss(loss_fn: LossFn, targets: Tensor, parts: Sequence[tuple[slice, float | Tensor]]) -> RowLoss:
    """The fastest that gives the same: a mean of cross-entropies over class indices, none of which is ignored."""
    if loss_fn is F.cross_entropy and targets.dim() == 2 and not targets.is_floating_point() and (targets >= 0).all():
        return CrossEntropy(targets, parts)
    return RowLoss(loss_fn, targets, parts)
