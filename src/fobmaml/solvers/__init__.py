"""The inner problem and its solvers. All rows (task × offset) are solved as one batch."""

from fobmaml.solvers.adam import Adam
from fobmaml.solvers.barzilai_borwein import BarzilaiBorwein
from fobmaml.solvers.base import Iterate, Iterative, Solver
from fobmaml.solvers.descent import Descent
from fobmaml.solvers.gradient_descent import GradientDescent
from fobmaml.solvers.linear import LinearSolve, LinearStatistics, conjugate_gradients, minres
from fobmaml.solvers.newton import Inexact, NewtonCG
from fobmaml.solvers.problem import RESULTS, InnerProblem, Solution

__all__ = [
    "RESULTS",
    "Adam",
    "BarzilaiBorwein",
    "Descent",
    "GradientDescent",
    "Inexact",
    "InnerProblem",
    "Iterate",
    "Iterative",
    "LinearSolve",
    "LinearStatistics",
    "NewtonCG",
    "Solution",
    "Solver",
    "conjugate_gradients",
    "minres",
]
