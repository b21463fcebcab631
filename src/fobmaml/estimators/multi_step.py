"""The multi-step loss: query losses along the inner steps, annealed to the last one's."""

from collections.abc import Callable

from torch import Tensor

from fobmaml.arguments import number, refuse
from fobmaml.solvers import Descent, InnerProblem, Solution, Solver

LEAST = 0.03
"""What the weight of a step before the last does not fall below, as a share of what it was, before it is zero."""


def step_weights(steps: int, annealed: float) -> list[float]:
    """w₁, ..., w_K of f(φ₁), ..., f(φ_K), with sum 1: all 1/K at ``annealed`` 0; the last one's alone from 1 on.

    Between, w_k = max(1 − annealed, 0.03)/K for k < K, and w_K is the rest. Reference: Antoniou, Edwards & Storkey
    2019, arXiv:1810.09502, section 4, with the numbers of their code.
    """
    earlier = max(1.0 - annealed, LEAST) / steps if annealed < 1.0 else 0.0
    return [earlier] * (steps - 1) + [1.0 - (steps - 1) * earlier]


def part_of_training(name: str, value: float, solver: Solver) -> float:
    """The argument, of at least 0. Raises ValueError, also for one above 0 with a solver that is no ``Descent``."""
    if number(name, value, at_least=0.0) and not isinstance(solver, Descent):
        raise refuse(name, value, "a solver of a number of steps (GradientDescent, Adam)")
    return float(value)


def multi_step_gradient(
    solver: Descent,
    problem: InnerProblem,
    query_gradient: Callable[[Tensor], Tensor],
    annealed: float,
    *,
    checkpoint: bool = False,
    first_order: bool = False,
    slope: Callable[[int, Tensor], None] | None = None,
) -> tuple[Solution, Tensor]:
    """The solution, and the derivative of Σ_k w_k fᵣ(φᵣ,k) by each row's θ, [R, P]; more of it in ``Descent.unroll``.

    ``query_gradient``: ∇fᵣ at each row. Cost: K of them, or one where the weights are the last step's alone.
    """
    weights = step_weights(solver.steps, annealed)
    earlier: list[Tensor | None] = []

    def visit(step: int, phi: Tensor) -> None:
        if step < solver.steps - 1:
            earlier.append(weights[step] * query_gradient(phi))

    solution, pull_back = solver.unroll(
        problem, checkpoint, visit=visit if weights[-1] < 1.0 else None, slope=slope, first_order=first_order
    )
    last = query_gradient(solution.phi)
    return solution, pull_back(last if weights[-1] == 1.0 else weights[-1] * last, earlier)
