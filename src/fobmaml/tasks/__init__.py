"""What a task is and where tasks come from."""

from fobmaml.tasks.arrays import Arrays
from fobmaml.tasks.batch import Split, TaskBatch, TaskSource
from fobmaml.tasks.digits import Digits
from fobmaml.tasks.few_shot import FewShot
from fobmaml.tasks.images import ImageFolder
from fobmaml.tasks.logistic import Logistic
from fobmaml.tasks.mini_imagenet import MiniImageNet
from fobmaml.tasks.mnist1d import MNIST1D
from fobmaml.tasks.omniglot import Omniglot
from fobmaml.tasks.shapes1d import Shapes1D
from fobmaml.tasks.sinusoid import Sinusoid
from fobmaml.tasks.stream import Stream

__all__ = [
    "MNIST1D",
    "Arrays",
    "Digits",
    "FewShot",
    "ImageFolder",
    "Logistic",
    "MiniImageNet",
    "Omniglot",
    "Shapes1D",
    "Sinusoid",
    "Split",
    "Stream",
    "TaskBatch",
    "TaskSource",
]
