"""Networks, by width and depth."""

from fobmaml.models.cnn import CNN1d
from fobmaml.models.mlp import MLP

__all__ = ["MLP", "CNN1d"]
