"""How a network and a loss are evaluated for stacked parameters, one row a task: an engine a file."""

from fobmaml.engine.learner import ENGINES, Learner
from fobmaml.engine.work import Work

__all__ = ["ENGINES", "Learner", "Work"]
