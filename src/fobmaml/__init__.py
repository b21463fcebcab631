"""FO-B-MAML: first-order meta-gradients without irreducible bias, and the methods it is compared with."""

from fobmaml import estimators, measure, models, optim, solvers, tasks
from fobmaml.adaptation import AdaptedTasks, adapt, adapt_tasks
from fobmaml.engine import Learner
from fobmaml.estimators import MetaGradient, meta_gradient
from fobmaml.saved import Run, load_run, read_runs
from fobmaml.tasks import TaskBatch

__version__ = "0.1.0"

__all__ = [
    "AdaptedTasks",
    "Learner",
    "MetaGradient",
    "Run",
    "TaskBatch",
    "__version__",
    "adapt",
    "adapt_tasks",
    "estimators",
    "load_run",
    "measure",
    "meta_gradient",
    "models",
    "optim",
    "read_runs",
    "solvers",
    "tasks",
]
