"""Measurements that look on from the side."""

from fobmaml.measure.bias import Bias, bias
from fobmaml.measure.memory import peak_bytes

__all__ = ["Bias", "bias", "peak_bytes"]
