"""Linear systems, one a row."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearStatistics:
    """Of R linear solves Ax = b, [R] each: ``steps`` taken, a product with A each; ``relative_residual``: ‖b − Ax‖/‖b‖;
    ``negative_curvature``: whether A was found not to be positive definite. Conjugate gradients stop there, at zero if
    that was their first step; ``minres`` goes on."""

    steps: Tensor
    relative_residual: Tensor
    negative_curvature: Tensor


@dataclass(frozen=True)
class LinearSolve(LinearStatistics):
    """What a solve has found: ``x`` [R, P], with its statistics."""

    x: Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tol: float | Tensor) -> LinearSolve:
    """Solves Aᵣxᵣ = bᵣ for all rows at once, each until ‖r‖ ≤ tol‖b‖; ``product`` applies all A: [R, P] -> [R, P].

    ``b`` [R, P]; ``tol`` may differ by row, [R]. A row stops as soon as a direction of no positive curvature shows.
    Cost: at most ``steps`` products. Memory: four vectors a row.
    Reference: Hestenes & Stiefel 1952, Methods of conjugate gradients for solving linear systems.
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


def minres(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tol: float | Tensor) -> LinearSolve:
    """Of all x in the Krylov space the one with the least ‖bᵣ − Aᵣxᵣ‖, for all rows at once; A symmetric, else any.

    A row stops at ‖r‖ ≤ tol‖b‖, or where no x has a smaller residual, up to rounding: Ar = 0, with a singular A and b
    partly outside its range. ‖r‖ never grows, whatever the signs of A's eigenvalues; what belongs to eigenvalues near
    zero comes last. A row whose residual had rᵀAr ≤ 0 is marked as one of negative curvature.

    ``product`` and ``b`` as of ``conjugate_gradients``; ``tol`` may differ by row, [R].
    Cost: at most ``steps`` products. Memory: six vectors a row. Reference: Paige &
    Saunders 1975, Solution of sparse indefinite systems of linear equations; curvature: Liu & Roosta 2022,
    arXiv:2205.14492.
    """
    zero, norm = torch.zeros_like(b), b.norm(dim=1)
    rounding = 100 * torch.finfo(b.dtype).eps
    x, before, v = zero, zero, b / torch.where(norm > 0, norm, 1.0).unsqueeze(1)
    last, second_last = zero, zero  # directions of x
    # Lanczos: A v_k = β_k v_{k−1} + α_k v_k + β_{k+1} v_{k+1}; rotations (c, s) make the tridiagonal triangular.
    beta, size, r = torch.zeros_like(norm), torch.zeros_like(norm), norm
    c, s, epsilon, above = (
        -torch.ones_like(norm),
        torch.zeros_like(norm),
        torch.zeros_like(norm),
        torch.zeros_like(norm),
    )
    negative, ended = torch.zeros_like(norm, dtype=torch.bool), norm == 0
    taken = torch.zeros_like(norm, dtype=torch.long)
    for _ in range(steps):
        active = ~ended & (r > tol * norm)
        if not active.any():
            break
        av = product(torch.where(active.unsqueeze(1), v, 0.0))  # a finished row asks for nothing
        taken += active
        alpha = (v * av).sum(1)
        av = av - alpha.unsqueeze(1) * v - beta.unsqueeze(1) * before
        following = av.norm(dim=1)
        size = torch.maximum(size, torch.hypot(alpha, torch.hypot(beta, following)))
        off, diagonal, next_above = c * above + s * alpha, s * above - c * alpha, -c * following
        negative |= active & (c * diagonal >= 0)
        ended |= active & (torch.hypot(diagonal, next_above) <= rounding * size)  # ‖Ar‖/‖r‖ before this step
        moving = active & ~ended
        pivot = torch.hypot(diagonal, following)
        pivot = torch.where(moving, pivot, 1.0)
        direction = (v - off.unsqueeze(1) * last - epsilon.unsqueeze(1) * second_last) / pivot.unsqueeze(1)
        epsilon, above = s * following, next_above
        c, s = diagonal / pivot, following / pivot
        x = torch.where(moving.unsqueeze(1), x + (c * r).unsqueeze(1) * direction, x)
        r = torch.where(moving, s * r, r)
        ended |= moving & (following <= rounding * size)  # the Krylov space is exhausted
        before, v = v, av / torch.where(following > 0, following, 1.0).unsqueeze(1)
        last, second_last, beta = direction, last, following
    relative = torch.where(norm > 0, r / norm, 0.0)
    return LinearSolve(taken, relative, negative, x)
