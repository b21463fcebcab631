"""FO-B-MAML: first-order meta-gradients without irreducible bias, and the methods it is compared with."""

from fobmaml import estimators, measure, models, optim, solvers, tasks
from fobmaml.engine import Learner
from fobmaml.estimators import MetaGradient, meta_gradient
from fobmaml.tasks import TaskBatch

__version__ = "0.1.0"

__all__ = [
    "Learner",
    "MetaGradient",
    "TaskBatch",
    "__version__",
    "estimators",
    "measure",
    "meta_gradient",
    "models",
    "optim",
    "solvers",
    "tasks",
]
