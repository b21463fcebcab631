"""How fast the meta-gradient changes: the local smoothness of F where training passes."""

from dataclasses import dataclass
from typing import ClassVar

from fobmaml.arguments import number
from fobmaml.engine import Learner
from fobmaml.estimators import Estimator, chunk_size, estimate
from fobmaml.measure.base import Event, OnValidationTasks, Training
from fobmaml.tasks.batch import TaskBatch


@dataclass(frozen=True)
class Smoothness:
    """``local``: ‖∇F(θ + d) − ∇F(θ)‖ / ‖d‖ with d along −∇F(θ), the way a gradient step goes; ``gradient_norm``:
    ‖∇F(θ)‖."""

    local: float
    gradient_norm: float


def smoothness(estimator: Estimator, learner: Learner, tasks: TaskBatch, radius: float = 1e-3) -> Smoothness:
    """At the present parameters of the network of ``learner``, with ∇F by ``estimator`` on ``tasks`` and ‖d‖ =
    ``radius``.

    It is the F of the estimator: use ``MAML``, whose gradient is that of its K-step objective, or ``Exact``, in
    float64. Cost: two meta-gradients. Reference: Zhang, He, Sra & Jadbabaie 2020, arXiv:1905.11881, section 5, who
    measure the smoothness of training losses so. Raises ValueError unless radius > 0.
    """
    number("radius", radius, above=0.0)
    theta, chunk = learner.theta(), chunk_size(learner, tasks, estimator)
    here = estimate(estimator, learner, theta, tasks, chunk, diagnose=False).gradient
    norm = here.norm()
    there = estimate(estimator, learner, theta - radius / norm * here, tasks, chunk, diagnose=False).gradient
    return Smoothness(float((there - here).norm() / radius), float(norm))


@dataclass
class SmoothnessMeasurement(OnValidationTasks):
    """``smoothness`` of the run's estimator at ``radius``, every so many meta-steps. Raises ValueError
    unless radius > 0."""

    tasks: int = 16
    radius: float = 0.001

    keys: ClassVar = {
        "smoothness/local": "‖∇F(θ + d) − ∇F(θ)‖ / ‖d‖, d along −∇F(θ), F the estimator's objective",
        "smoothness/gradient_norm": "‖∇F(θ)‖",
    }
    stream = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        number("radius", self.radius, above=0.0)

    def __call__(self, training: Training) -> Event:
        tasks = training.placed(self.sample(training))
        found = smoothness(training.estimator, training.learner, tasks, self.radius)
        return {"smoothness/local": found.local, "smoothness/gradient_norm": found.gradient_norm}
