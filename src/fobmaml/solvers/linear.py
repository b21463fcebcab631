"""Linear systems, one a row."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearStatistics:
    """Of R linear solves Ax = b, [R] each: ``steps`` taken, a product with A each; ``relative_residual``: ‖b − Ax‖/‖b‖;
    ``negative_curvature``: whether A was found not to be positive definite: the solve stopped there, at zero if that
    was its first step."""

    steps: Tensor
    relative_residual: Tensor
    negative_curvature: Tensor


@dataclass(frozen=True)
class LinearSolve(LinearStatistics):
    """``x`` [R, P]."""

    x: Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tol: float | Tensor) -> LinearSolve:
    """Solves Aᵣxᵣ = bᵣ for all rows at once, each until ‖r‖ ≤ tol‖b‖; ``product`` applies all A: [R, P] -> [R, P].

    ``tol`` may differ by row, [R]. Cost: at most ``steps`` products.
    """
    x = torch.zeros_like(b)
    r, rr = b.clone(), b.square().sum(1)
    threshold = tol**2 * rr
    negative = torch.zeros_like(rr, dtype=torch.bool)
    taken = torch.zeros_like(rr, dtype=torch.long)
    active = rr > threshold
    p = torch.where(active.unsqueeze(1), b, 0.0)
    for _ in range(steps):
        if not active.any():
            break
        ap = product(p)
        taken += active
        curvature = (p * ap).sum(1)
        negative |= active & (curvature <= 0)
        active &= curvature > 0
        alpha = torch.where(active, rr / curvature, 0.0).unsqueeze(1)
        x = x + alpha * p
        r = r - alpha * ap
        previous, rr = rr, torch.where(active, r.square().sum(1), rr)
        active = (rr > threshold) & ~negative
        p = torch.where(active.unsqueeze(1), r + (rr / previous).unsqueeze(1) * p, 0.0)  # who is done asks for nothing
    norm = b.norm(dim=1)
    relative = torch.where(norm > 0, rr.sqrt() / norm, 0.0)
    return LinearSolve(taken, relative, negative, x)
