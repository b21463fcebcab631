"""Measurements that look on from the side."""

from fobmaml.measure.accuracy import MetaTest, Validation
from fobmaml.measure.base import Event, Measurement, Metric, OnValidationTasks, Periodic, RatioMetric, Training
from fobmaml.measure.bias import Bias, BiasMeasurement, bias
from fobmaml.measure.bias_parts import BiasPartsMeasurement, bias_parts
from fobmaml.measure.curvature import Curvature, CurvatureMeasurement, curvature
from fobmaml.measure.error_estimate import ErrorEstimate, ErrorEstimateMeasurement, error_estimate
from fobmaml.measure.memory import MemoryMeasurement, peak_bytes
from fobmaml.measure.metrics import R2, Accuracy, MeanSquaredError, TokenAccuracy
from fobmaml.measure.smoothness import Smoothness, SmoothnessMeasurement, smoothness

__all__ = [
    "R2",
    "Accuracy",
    "Bias",
    "BiasMeasurement",
    "BiasPartsMeasurement",
    "Curvature",
    "CurvatureMeasurement",
    "ErrorEstimate",
    "ErrorEstimateMeasurement",
    "Event",
    "MeanSquaredError",
    "Measurement",
    "MemoryMeasurement",
    "MetaTest",
    "Metric",
    "OnValidationTasks",
    "Periodic",
    "RatioMetric",
    "Smoothness",
    "SmoothnessMeasurement",
    "TokenAccuracy",
    "Training",
    "Validation",
    "bias",
    "bias_parts",
    "curvature",
    "error_estimate",
    "peak_bytes",
    "smoothness",
]
