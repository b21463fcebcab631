"""Solvers of a fixed number of steps by gradients, on all examples or on batches of them."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fobmaml.arguments import number, refuse, whole_number
from fobmaml.solvers.base import Solver
from fobmaml.solvers.problem import InnerProblem, Solution

Memory = tuple[Tensor, ...]
Rates = Sequence[float] | Tensor


class Descent(Solver):
    """φ ← φ − lr · direction, ``steps`` times; a subclass says what the direction is.

    ``lr``: a number; one a step, [steps]; or one a parameter too, a tensor [steps, P] or, the same at every step,
    [1, P]. ``batch``, ``query_batch``: how many support and query examples a step takes, drawn anew (``drawn``), or
    None for all. Cost: ``steps`` gradients a row, of so many examples. Memory: flat in ``steps`` unless unrolled.
    Raises ValueError unless steps ≥ 1, batches are None or ≥ 1, and lr is finite and, where it is a number, above 0.
    """

    differentiable_steps = True
    linear = False
    """Whether the direction is linear in gradient and memory, so that ``pulled_back`` does not look at them."""

    def __init__(
        self, steps: int, lr: float | Sequence[float] | Tensor, batch: int | None = None, query_batch: int | None = None
    ):
        self.steps = whole_number("steps", steps)
        self.lr = lr if isinstance(lr, Tensor | Sequence) else number("lr", lr, above=0.0)
        self.rates = _rates(lr, self.steps)
        self.batch = None if batch is None else whole_number("batch", batch)
        self.query_batch = None if query_batch is None else whole_number("query_batch", query_batch)

    @property
    def for_all_parameters(self) -> bool:
        return isinstance(self.rates, Tensor)

    @abstractmethod
    def direction(self, gradient: Tensor, memory: Memory, step: int) -> tuple[Tensor, Memory]:
        """At step 0, 1, ..., of ∇h [R, P] and what the step before left: the direction, and what to keep."""

    def memory(self, like: Tensor) -> Memory:
        """What step 0 finds, for rows like these."""
        return ()

    def pulled_back(
        self, gradient: Tensor, memory: Memory, step: int, wrt_direction: Tensor, wrt_memory: Memory
    ) -> tuple[Tensor, Memory]:
        """The derivatives with respect to what ``direction`` takes, from those with respect to what it returns."""
        with torch.enable_grad():
            taken = [each.detach().requires_grad_() for each in (gradient, *memory)]
            direction, after = self.direction(taken[0], tuple(taken[1:]), step)
            wrt = torch.autograd.grad(
                (direction, *after), taken, (wrt_direction, *wrt_memory), allow_unused=True, materialize_grads=True
            )
        return wrt[0], wrt[1:]

    def rates_on(self, problem: InnerProblem) -> Rates:
        """Of each step, as the problem's parameters are."""
        return _on(problem, self.rates)

    def drawn(self, problem: InnerProblem) -> InnerProblem:
        """``problem`` as the steps see it, with their batches."""
        return problem.drawn(self.steps, self.batch, self.query_batch)

    def solve(self, problem: InnerProblem) -> Solution:
        seen, displacement = self.drawn(problem), torch.zeros_like(problem.theta)
        memory = self.memory(displacement)
        for step, rate in enumerate(_on(problem, self.rates)):
            gradient = problem.moved(seen.at(step).engine().gradient(problem.theta + displacement))
            gradient += problem.lam * displacement
            direction, memory = self.direction(gradient, memory, step)
            displacement = displacement - rate * direction
        return self._solution(problem, displacement)

    def _solution(self, problem: InnerProblem, displacement: Tensor) -> Solution:
        taken = torch.full((problem.rows,), self.steps)
        return Solution(problem, displacement, taken, torch.zeros_like(taken))

    def unroll(
        self,
        problem: InnerProblem,
        checkpoint: bool = False,
        *,
        rates: Rates | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
        slope: Callable[[int, Tensor], None] | None = None,
        first_order: bool = False,
    ) -> tuple[Solution, Callable[..., Tensor]]:
        """``Solver.unroll``, and more of what lies between θ and φ_K.

        ``rates``: in place of the solver's own, one a step. ``visit(k, φ)``: called with φ_{k+1} [R, P] after step k.
        The pull-back takes v and, as a second argument, derivatives with respect to φ₁, ..., φ_{K−1}, [R, P] or None
        each. ``slope(k, ∂)``: called by it with each parameter's share [R, P] of the derivative by step k's rate.
        ``first_order``: the pull-back takes directions for constants, so that ∂φ_{k+1}/∂φ_k is the identity.

        Memory: ``steps`` times a gradient's activations, or one time and ``steps`` × [R, P] with ``checkpoint`` or
        ``first_order``. Cost of the pull-back: a Hessian-vector product a step, and with ``checkpoint`` one more
        gradient; none with ``first_order``.
        """
        seen, displacement = self.drawn(problem), torch.zeros_like(problem.theta)
        memory, engine = self.memory(displacement), seen.engine(second_order=True) if seen.draws is None else None
        tape = []  # of a step: its rate, products with its Hessian or where to take them, what its direction came from
        for step, rate in enumerate(_on(problem, self.rates if rates is None else rates)):
            phi, hessian = problem.theta + displacement, None
            if checkpoint or first_order:
                gradient = seen.at(step).gradient(phi)
            else:
                gradient, hessian = seen.at(step).linearize(phi, engine)
            kept = None if slope is None and (self.linear or first_order) else (gradient, memory)
            tape.append((rate, hessian or (None if first_order else phi), kept))
            direction, memory = self.direction(gradient, memory, step)
            displacement = displacement - rate * direction
            if visit:
                visit(step, problem.theta + displacement)
        wrt_memory = tuple(map(torch.zeros_like, memory))

        def pull_back(v: Tensor, earlier: Sequence[Tensor | None] = ()) -> Tensor:
            wrt_phi, wrt_theta, wrt_after = v, torch.zeros_like(v), wrt_memory
            while tape:
                step = len(tape) - 1
                rate, hessian, kept = tape.pop()
                if step < len(earlier) and (more := earlier[step]) is not None:
                    wrt_phi = wrt_phi + more
                if slope and kept:
                    slope(step, -wrt_phi * self.direction(*kept, step)[0])
                if hessian is None:
                    continue
                wrt_gradient, wrt_after = self.pulled_back(*(kept or (v, ())), step, -rate * wrt_phi, wrt_after)
                wrt_gradient = problem.moved(wrt_gradient)
                product = seen.at(step).linearize(hessian, engine)[1] if isinstance(hessian, Tensor) else hessian
                wrt_phi = wrt_phi + product(wrt_gradient)
                if problem.lam:
                    wrt_theta = wrt_theta - problem.lam * wrt_gradient
            return wrt_theta + wrt_phi

        return self._solution(problem, displacement), pull_back


def _rates(lr: float | Sequence[float] | Tensor, steps: int) -> Rates:
    """One for each step: numbers, or rows of a tensor."""
    if not isinstance(lr, Tensor | Sequence) or isinstance(lr, str):
        return [number("lr", lr, above=0.0)] * steps
    if isinstance(lr, Tensor) and lr.dim() == 2:
        if len(lr) not in (1, steps) or not lr.isfinite().all():
            raise refuse("lr", f"a tensor {list(lr.shape)}", f"finite numbers [{steps}, P] or [1, P], one a step")
        return lr.expand(steps, -1)
    if len(lr) != steps or (isinstance(lr, Tensor) and lr.dim() != 1):
        got = f"a tensor {list(lr.shape)}" if isinstance(lr, Tensor) else f"{len(lr)} numbers"
        raise refuse("lr", got, f"a number, or one for each of steps={steps}")
    return [number("lr", rate, above=0.0) for rate in (lr.tolist() if isinstance(lr, Tensor) else lr)]


def _on(problem: InnerProblem, rates: Rates) -> Rates:
    """As the problem's parameters are."""
    if not isinstance(rates, Tensor):
        return rates
    parameters = problem.learner.parameter_count
    if rates.dim() == 2 and rates.shape[1] != parameters:
        raise refuse("lr", f"a tensor {list(rates.shape)}", f"[..., {parameters}], one for each of the parameters")
    return rates.to(problem.theta)
