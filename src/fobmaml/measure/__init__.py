"""Measurements that look on from the side."""

from fobmaml.measure.bias import Bias, bias
from fobmaml.measure.curvature import Curvature, curvature
from fobmaml.measure.memory import peak_bytes
from fobmaml.measure.smoothness import Smoothness, smoothness

__all__ = ["Bias", "Curvature", "Smoothness", "bias", "curvature", "peak_bytes", "smoothness"]
