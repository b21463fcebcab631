"""How a network and a loss are evaluated for stacked parameters, one row a task: an engine a file."""

from fobmaml.engine.learner import ENGINES, Learner

__all__ = ["ENGINES", "Learner"]
