"""Meta-gradient estimators, one family a file."""

from fobmaml.estimators.base import (
    Adaptation,
    Cost,
    Estimate,
    Estimator,
    MeanEstimate,
    MetaGradient,
    chunk_size,
    estimate,
    meta_gradient,
)
from fobmaml.estimators.finite_difference import Central, FiniteDifference, Forward, Symmetric
from fobmaml.estimators.first_order import FOMAML, Reptile
from fobmaml.estimators.implicit import IMAML, Exact, NotConverged
from fobmaml.estimators.tangent import Tangent
from fobmaml.estimators.unrolled import MAML

__all__ = [
    "FOMAML",
    "IMAML",
    "MAML",
    "Adaptation",
    "Central",
    "Cost",
    "Estimate",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "Forward",
    "MeanEstimate",
    "MetaGradient",
    "NotConverged",
    "Reptile",
    "Symmetric",
    "Tangent",
    "chunk_size",
    "estimate",
    "meta_gradient",
]
