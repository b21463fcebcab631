"""What a task is and where tasks come from."""

from fobmaml.tasks.batch import Split, TaskBatch, TaskSource
from fobmaml.tasks.logistic import Logistic
from fobmaml.tasks.mnist1d import MNIST1D
from fobmaml.tasks.sinusoid import Sinusoid

__all__ = ["MNIST1D", "Logistic", "Sinusoid", "Split", "TaskBatch", "TaskSource"]
