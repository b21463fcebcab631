"""What runs have left in their folders, read again: a trained network, settings, results. It knows nothing of Hydra."""

from fobmaml.saved.checkpoints import CheckpointError
from fobmaml.saved.loading import Run, load_run
from fobmaml.saved.results import read_runs

__all__ = ["CheckpointError", "Run", "load_run", "read_runs"]
