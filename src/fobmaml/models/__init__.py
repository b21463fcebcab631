"""Networks, by width and depth."""

from fobmaml.models.cnn import CNN1d
from fobmaml.models.conv4 import Conv4
from fobmaml.models.gru import GRU
from fobmaml.models.mlp import MLP
from fobmaml.models.resnet12 import ResNet12
from fobmaml.models.transformer import Transformer

__all__ = ["GRU", "MLP", "CNN1d", "Conv4", "ResNet12", "Transformer"]
