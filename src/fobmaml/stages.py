"""The inner solver by stages of training: coarse at first, finer later."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fobmaml.arguments import number, refuse
from fobmaml.estimators import Estimator
from fobmaml.solvers import Descent, Solver


@dataclass(frozen=True)
class Stage:
    """``solver`` takes the place of the estimator's until the part ``until`` of training is over.

    Raises ValueError unless 0 < until < 1.
    """

    until: float
    solver: Solver

    def __post_init__(self) -> None:
        number("until", self.until, above=0.0, below=1.0)
        if not isinstance(self.solver, Solver):
            raise refuse("solver", type(self.solver).__name__, "a fobmaml.solvers.Solver")


class Stages:
    """The solver of ``estimator`` at each part of training: that of the first of ``stages`` that is not over, and
    behind the last its own. A function of that part alone: no checkpoint has to keep it, and all processes agree.

    Theory lets the inner precision δ fall with the meta-gradient, whose bias it bounds, O(δ^{2/3}) for ``Symmetric``:
    early steps may be cheap. Reference: Chayti & Jaggi, arXiv:2409.03682.
    Raises ValueError for stages out of order, for a solver of another class than the estimator's (which it has
    checked), and for another number of steps where their lengths are learned (``Estimator.learn_lr``).
    """

    def __init__(self, estimator: Estimator, stages: Sequence[Stage] = ()):
        own, ended = estimator.solver, 0.0
        for each in stages:
            if each.until <= ended:
                raise refuse("inner", f"a stage until {each.until:g}", f"one that ends after {ended:g}")
            if type(each.solver) is not type(own):
                raise refuse("inner", type(each.solver).__name__, f"the solver of training, {type(own).__name__}")
            if estimator.learn_lr and _steps(each.solver) != _steps(own):
                raise refuse("inner", f"steps={_steps(each.solver)}", f"{_steps(own)}, whose lengths are learned")
            ended = each.until
        self.estimator, self.stages, self.own = estimator, tuple(stages), own

    def enter(self, progress: float) -> None:
        """This part of training is over: the estimator is told so, and has the solver of what follows."""
        self.estimator.progress = progress
        self.estimator.solver = next((each.solver for each in self.stages if progress < each.until), self.own)

    def each(self) -> Iterator[None]:
        """The estimator with each solver in turn, its own last, and as at the end of training, when its formula needs
        the most."""
        for solver in (*(each.solver for each in self.stages), self.own):
            self.estimator.progress, self.estimator.solver = 1.0, solver
            yield


def _steps(solver: Solver) -> int | None:
    return solver.steps if isinstance(solver, Descent) else None
