"""The loss of every row: its value, its gradient with respect to the outputs, and that gradient's derivative.

``Loss`` wraps the caller's function. ``RowLoss`` applies it to targets [R, N, ...], of which a row may weigh parts
differently: support examples once, query examples ν times. ``CrossEntropy`` and ``SquaredError`` are the same in closed
form.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from fobmaml.arguments import refuse

LossFn = Callable[[Tensor, Tensor], Tensor]


class Part(NamedTuple):
    """Some of a row's examples, whose mean loss counts ``factor`` times, a number or one a row, [R]."""

    examples: slice
    factor: float | Tensor
    name: str = "targets"
    loss: "Loss | None" = None
    """In place of the row's."""


def scalar(loss_fn: LossFn, outputs: Tensor, targets: Tensor) -> Tensor:
    """``loss_fn(outputs, targets)`` as a tensor of shape []. Raises ValueError for anything but one number."""
    try:
        value = loss_fn(outputs, targets)
    except (RuntimeError, IndexError, TypeError) as error:
        if "vmap" in str(error) or "functorch" in str(error):
            raise
        raise ValueError(
            f"loss_fn: fails on outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise refuse("loss_fn", got, "a function that returns the mean loss of all examples, one number")
    return value.reshape(())


class RowLoss:
    """Lᵣ = Σ_p a_{r,p} · (the loss of row r's examples in part p), of outputs [R, N, ...].

    ``loss``: of the examples of a part that has none of its own. ``targets`` [R, N, ...]. ``mask`` [R, N]: the examples
    that there are; the others fill the rows up. None: all. Rows with a mask are taken one by one.
    """

    padded = False
    """Whether some examples only fill rows up."""

    def __init__(self, loss: "Loss", targets: Tensor, parts: Sequence[Part], mask: Tensor | None = None):
        self.of, self.targets, self.parts, self.mask = loss, targets, parts, mask

    def __call__(self, outputs: Tensor) -> Tensor:
        """[R, N, ...] -> [R]."""
        if self.mask is not None:
            return self._one_by_one(outputs)
        losses = tuple(map(self._loss_of, self.parts))
        if losses not in self.of.batched:
            self.of.batched[losses] = self._batches(outputs)
        return self._batched(outputs) if self.of.batched[losses] else self._one_by_one(outputs)

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "RowLoss":
        """The loss of the rows' ``examples`` [R, n], numbers below N, of which each of ``parts`` takes some."""
        mask = None if self.mask is None else rows_taken(self.mask, examples)
        return self.of.rows(rows_taken(self.targets, examples), parts, mask)

    def _loss_of(self, part: Part) -> "Loss":
        return part.loss or self.of

    def _one_by_one(self, outputs: Tensor) -> Tensor:
        return torch.stack([self.of_row(r, row) for r, row in enumerate(outputs)])

    def _batched(self, outputs: Tensor) -> Tensor:
        total = outputs.new_zeros(len(outputs))
        for part in self.parts:
            of_rows = vmap(partial(scalar, self._loss_of(part).loss_fn))
            total = total + part.factor * of_rows(outputs[:, part.examples], self.targets[:, part.examples])
        return total

    def of_row(self, row: int, outputs: Tensor) -> Tensor:
        """Of one row's outputs [N, ...], a scalar."""
        terms = []
        for part in self.parts:
            seen, targets, factor = outputs[part.examples], self.targets[row, part.examples], part.factor
            if self.mask is not None:
                there = self.mask[row, part.examples]
                seen, targets = seen[there], targets[there]
            value = scalar(self._loss_of(part).loss_fn, seen, targets)
            terms.append(value * (factor[row] if isinstance(factor, Tensor) else factor))
        return torch.stack(terms).sum()

    def linearize(self, outputs: Tensor, second_order: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """g = ∂ΣᵣLᵣ/∂outputs, and t ↦ the derivative of g as the outputs move along t, if ``second_order``."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=second_order)
        return g.detach(), lambda t: hvp(g, leaf, t)

    def _batches(self, outputs: Tensor) -> bool:
        """Whether vmap gives the values and gradients that two rows have one by one."""
        few = RowLoss(
            self.of,
            self.targets[:2],
            [
                part._replace(factor=part.factor[:2] if isinstance(part.factor, Tensor) else part.factor)
                for part in self.parts
            ],
        )
        with torch.enable_grad():
            leaf = outputs[:2].detach().clone().requires_grad_()
            wanted = few._one_by_one(leaf)
            try:
                found = few._batched(leaf)
                gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value in (found, wanted)]
            except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError):
                return False
        return close(found, wanted) and close(*gradients)


def rows_taken(rows: Tensor, examples: Tensor) -> Tensor:
    """Of each row [R, N, ...] its ``examples`` [R, n]: [R, n, ...]."""
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), examples]


def hvp(gradient: Tensor, leaf: Tensor, along: Tensor) -> Tensor:
    """The derivative of a gradient, whose graph is kept, as ``leaf`` moves along a vector; zero if it is constant.

    Raises ValueError where torch has no second derivative.
    """
    if not gradient.requires_grad:
        return torch.zeros_like(leaf)
    try:
        return torch.autograd.grad(gradient, leaf, along, retain_graph=True, materialize_grads=True)[0]
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise ValueError(
            f"estimator: takes second derivatives, and torch has none for this model and loss_fn ({error})"
            ": Forward, Symmetric, Central, FOMAML and Reptile need first ones only"
        ) from error


@dataclass(frozen=True)
class Options:
    """Of a cross-entropy, as in torch."""

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0


class CrossEntropy(RowLoss):
    """The same for cross-entropies of class indices [R, N], without vmap and autograd.

    Raises ValueError for a class that there is no output for.
    """

    def __init__(self, loss: "Loss", targets: Tensor, parts: Sequence[Part], options: Options):
        super().__init__(loss, targets.long(), parts)
        self.options = options
        self.weights, self.one_hot, self._each = torch.empty(0), torch.empty(0), torch.empty(0)

    def of_examples(self, examples: Tensor, parts: Sequence[Part]) -> "CrossEntropy":
        return CrossEntropy(self.of, rows_taken(self.targets, examples), parts, self.options)

    def prepare(self, outputs: Tensor) -> None:
        """Makes ``weights`` [R, N, 1] and ``one_hot`` [R, N, classes], of the dtype of ``outputs`` [R, N, classes]."""
        if len(self.weights):
            return
        if outputs.dim() != 3:
            raise refuse(
                "model",
                f"outputs of shape {tuple(outputs.shape[1:])}",
                "one that returns [examples, classes] for class labels [examples]",
            )
        classes, o = outputs.shape[-1], self.options
        counted = self.targets != o.ignore_index
        known = torch.where(counted, self.targets, 0)
        for part in self.parts:
            least, most = (int(label) for label in known[:, part.examples].aminmax())
            if least < 0 or most >= classes:
                raise refuse(
                    part.name,
                    least if least < 0 else most,
                    f"class labels from 0 to {classes - 1}, one for each of the model's outputs, or "
                    f"{o.ignore_index} for no class",
                )
        self._each = counted.to(outputs.dtype)
        if o.weight is not None:
            self._each = self._each * o.weight.to(outputs)[known]
        self.weights = self._shares(self._each, self.parts).unsqueeze(-1)
        self.one_hot = F.one_hot(known, classes).to(outputs.dtype)
        if o.label_smoothing:
            self.one_hot.mul_(1.0 - o.label_smoothing).add_(o.label_smoothing / classes)

    def _shares(self, each: Tensor, parts: Sequence[Part]) -> Tensor:
        """What examples of the weights ``each`` [R, ..., n] count, where ``parts`` divide the n."""
        shares = torch.empty_like(each)
        for part in parts:
            share = each[..., part.examples]
            total = share.sum(-1, keepdim=True) if self.options.reduction == "mean" else 1.0
            factor = part.factor
            if isinstance(factor, Tensor):
                factor = factor.view(-1, *[1] * (each.dim() - 1))
            shares[..., part.examples] = share * (factor / total)
        return shares

    def weights_of(self, draws: Tensor, parts: Sequence[Part]) -> Tensor:
        """What the examples ``draws`` [R, K, n] count in the loss of ``of_examples``, for all K at once. Once it is
        prepared."""
        return self._shares(rows_taken(self._each, draws.flatten(1)).view(draws.shape), parts)

    def __call__(self, outputs: Tensor) -> Tensor:
        self.prepare(outputs)
        return (
            self._terms(outputs.flatten(0, 1), self.targets.flatten()).view_as(self.targets) * self.weights[..., 0]
        ).sum(1)

    def of_row(self, row: int, outputs: Tensor) -> Tensor:
        self.prepare(outputs.unsqueeze(0))
        return (self._terms(outputs, self.targets[row]) * self.weights[row, :, 0]).sum()

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            outputs,
            targets,
            reduction="none",
            ignore_index=self.options.ignore_index,
            label_smoothing=self.options.label_smoothing,
        )

    def linearize(self, outputs: Tensor, second_order: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.prepare(outputs)
        p = outputs.softmax(-1)
        return (
            (p - self.one_hot).mul_(self.weights),
            lambda t: (t - (p * t).sum(-1, keepdim=True)).mul_(p).mul_(self.weights),
        )


class SquaredError(RowLoss):
    """The same for mean squared errors, or sums of them, without vmap and autograd. Outputs of another shape or dtype
    than the targets' are torch's to broadcast."""

    def __init__(self, loss: "Loss", targets: Tensor, parts: Sequence[Part], mean: bool):
        super().__init__(loss, targets, parts)
        self.weights = targets.new_zeros(*targets.shape[:2], *[1] * (targets.dim() - 2))  # of an example's squares
        for part in parts:
            factor = torch.as_tensor(part.factor).to(targets).view(-1, *[1] * (targets.dim() - 1))
            self.weights[:, part.examples] += factor / (targets[0, part.examples].numel() if mean else 1)

    def _fits(self, outputs: Tensor) -> bool:
        return outputs.shape == self.targets.shape and outputs.dtype == self.targets.dtype

    def __call__(self, outputs: Tensor) -> Tensor:
        if not self._fits(outputs):
            return super().__call__(outputs)
        return ((outputs - self.targets).square() * self.weights).flatten(1).sum(1)

    def linearize(self, outputs: Tensor, second_order: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if not self._fits(outputs):
            return super().linearize(outputs, second_order)
        twice = 2.0 * self.weights
        return (outputs.detach() - self.targets) * twice, lambda t: t * twice


class Loss:
    """A loss function, and how its rows are computed: by the fastest way that gives what it gives row by row.

    A cross-entropy of class indices (``F.cross_entropy``, or ``nn.CrossEntropyLoss`` unless it has class weights and
    smoothing at once) and a squared error (``F.mse_loss``, ``nn.MSELoss``) are written out.
    Others go through ``torch.func.vmap`` where the first rows agree: ``batched``, by the losses of the parts.
    """

    def __init__(self, loss_fn: LossFn):
        if not callable(loss_fn):
            raise refuse("loss_fn", type(loss_fn).__name__, "a function (outputs, targets) -> mean loss")
        self.loss_fn, self._options = loss_fn, _cross_entropy_options(loss_fn)
        self._squares = _reduction_of_squares(loss_fn)
        self.batched: dict[tuple[Loss, ...], bool] = {}

    def to(self, dtype: torch.dtype) -> LossFn:
        """The same function in another precision: a module's own numbers are copied."""
        return copy.deepcopy(self.loss_fn).to(dtype) if isinstance(self.loss_fn, nn.Module) else self.loss_fn

    def rows(self, targets: Tensor, parts: Sequence[Part], mask: Tensor | None = None) -> RowLoss:
        """``targets`` [R, N, ...]; ``mask`` [R, N]: the examples that there are, None: all."""
        own = {part.loss for part in parts}
        if own != {None}:  # one for all of the parts is the rows', several are taken part by part
            loss = own.pop() if len(own) == 1 else None
            if loss is None:
                return _padded(RowLoss(self, targets, parts, mask), mask)
            return loss.rows(targets, [part._replace(loss=None) for part in parts], mask)
        if self._options and _integral(targets):
            if targets.dim() == 2:
                filled = targets if mask is None else targets.masked_fill(~mask, self._options.ignore_index)
                return _padded(CrossEntropy(self, filled, parts, self._options), mask)
            targets = targets.long()
        if self._squares and mask is None and targets.is_floating_point():
            return SquaredError(self, targets, parts, self._squares == "mean")
        return _padded(RowLoss(self, targets, parts, mask), mask)


def _padded(loss: RowLoss, mask: Tensor | None) -> RowLoss:
    loss.padded = mask is not None
    return loss


def _integral(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def _cross_entropy_options(loss_fn: LossFn) -> Options | None:
    if loss_fn is F.cross_entropy:
        return Options()
    if type(loss_fn) is not nn.CrossEntropyLoss or loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
        return None
    if loss_fn.reduction == "none" or (loss_fn.weight is not None and loss_fn.label_smoothing):
        return None
    return Options(loss_fn.weight, loss_fn.ignore_index, loss_fn.reduction, loss_fn.label_smoothing)


def _reduction_of_squares(loss_fn: LossFn) -> str | None:
    """How a squared error is reduced, mean or sum; None for another loss."""
    plain = type(loss_fn) is nn.MSELoss and not (loss_fn._forward_hooks or loss_fn._forward_pre_hooks)
    found = "mean" if loss_fn is F.mse_loss else getattr(loss_fn, "reduction", None) if plain else None
    return found if found in ("mean", "sum") else None


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to rounding: half of the digits, so that only another function is told apart."""
    if not found.isfinite().all() or not wanted.isfinite().all():
        return torch.allclose(found, wanted, equal_nan=True)
    return bool((found - wanted).norm() <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.norm())
