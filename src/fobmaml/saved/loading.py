"""A trained run, back from its folder: to adapt its network to new tasks, and to look at."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fobmaml.adaptation import AdaptedTasks, adapted, one_task, placed
from fobmaml.arguments import one_of, refuse
from fobmaml.engine import Learner
from fobmaml.estimators import Adaptation, Estimator
from fobmaml.logged import loss_name
from fobmaml.measure.accuracy import class_dim
from fobmaml.outer import Outer
from fobmaml.precision import full_precision
from fobmaml.saved.checkpoints import CheckpointError, read_checkpoint
from fobmaml.saved.parts import evaluation_solver, make
from fobmaml.solvers import Solver
from fobmaml.tasks import TaskSource
from fobmaml.tasks.checks import check_members

NO_PROBABILITIES = ("mean squared error", "mean absolute error")
"""Losses whose outputs a softmax does not make probabilities of."""


class Run:
    """What a run has left, as objects.

    ``model``: the network at its last checkpoint, after ``step`` meta-steps. ``estimator``, ``data``: as it was trained
    with. ``adapting``: the estimator whose ``adapt`` is that of its meta-test tasks (``eval.solver``, ``eval.lam``).
    ``settings``: all of them by groups, as in configs/. ``folder``: where it comes from. ``learner``: the network with
    the loss and the engine that adapt it.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        step: int,
        learner: Learner,
        estimator: Estimator,
        adapting: Estimator,
        data: TaskSource,
    ):
        self.folder, self.settings, self.step = folder, settings, step
        self.estimator, self.adapting, self.data, self._learner = estimator, adapting, data, learner

    @property
    def model(self) -> nn.Module:
        """The network at the run's last checkpoint."""
        return self._learner.model

    def adapt(self, support_x: Any, support_y: Any) -> nn.Module:
        """The network adapted to a new task, as meta-test tasks are: a module of the same class, which shares nothing
        with the run and is the caller's own.

        ``support_x`` [S, ...], ``support_y`` [S, ...]: tensors or NumPy arrays, on any device; classes are 0 ... ways −
        1. No query set. Cost: the solver's K gradients of S examples; the first time, what it takes to try the
        network once. Raises ValueError for examples that do not fit.
        """
        return self.adapt_tasks(one_task("support_x", support_x), one_task("support_y", support_y), None)[0]

    def adapt_tasks(self, support_x: Any, support_y: Any, task_chunk: int | str | None = "auto") -> AdaptedTasks:
        """``adapt`` to many tasks at once: ``support_x``, ``support_y`` [T, S, ...]; ``task_chunk`` as in
        ``meta_gradient``. Memory: T rows of the network's parameters, and the work of one chunk."""
        learner, theta = self._learner, self._learner.theta()
        return adapted(
            learner, lambda part: self.adapting.adapt(learner, theta, part), support_x, support_y, task_chunk
        )

    def predict(self, network: nn.Module | AdaptedTasks, x: Any) -> Tensor:
        """What an adapted network says of ``x`` [N, ...]: of each example its class, a whole number, or, where the
        run's outputs are not classes, the outputs. ``x`` [T, N, ...] for T tasks of ``adapt_tasks``."""
        outputs = self._outputs(network, x)
        if not self.data.classification:
            return outputs
        return outputs.argmax(self._class_dim(outputs, network))

    def predict_proba(self, network: nn.Module | AdaptedTasks, x: Any) -> Tensor:
        """The probabilities of classes that go with ``predict``, the softmax of the outputs, in their shape.

        That takes a loss of probabilities, as a cross-entropy is. Raises ValueError where the run's outputs are not
        classes or were trained by a squared or absolute error; of a loss that it does not know it takes the word.
        """
        name = loss_name(self.data.loss_fn)
        if not self.data.classification or name in NO_PROBABILITIES:
            raise refuse("predict_proba", name, "a run whose loss makes probabilities of classes, a cross-entropy")
        outputs = self._outputs(network, x)
        return outputs.softmax(self._class_dim(outputs, network))

    def _outputs(self, network: nn.Module | AdaptedTasks, x: Any) -> Tensor:
        with torch.no_grad(), full_precision(self._learner.device):
            return network(placed(self._learner, "x", x))

    def _class_dim(self, outputs: Tensor, network: nn.Module | AdaptedTasks) -> int:
        """Which dimension of outputs is the classes': the one behind the examples, or the last."""
        first, last = 2 if isinstance(network, AdaptedTasks) else 1, outputs.dim() - 1
        fitting = [
            dim for dim in dict.fromkeys((first, last)) if first <= last and outputs.shape[dim] == self.data.outputs
        ]
        if not fitting:
            raise refuse("outputs", list(outputs.shape), f"{self.data.outputs} classes behind the examples, or last")
        if len(fitting) == 1:
            return fitting[0]
        several = outputs if first == 2 else outputs[None]  # as many classes as positions: the loss tells
        zeros = torch.zeros(several.shape[:2] + several.shape[3:], dtype=torch.long, device=outputs.device)
        return class_dim(several, zeros, self.data.loss_fn) + first - 2


def load_run(
    folder: str | PathLike[str],
    trust: bool = False,
    data: TaskSource | None = None,
    device: torch.device | str = "cpu",
) -> Run:
    """A run from its folder, or from a ``checkpoint.pt`` alone, which holds its settings too.

    Nothing in the file is executed: its numbers are read as numbers, and its settings make objects of fobmaml's own
    classes only. A run of your own package's classes is refused by name; with ``trust`` the settings may import and
    call anything that Python finds here, so take it for files that you trust as you do code.

    ``data``: a task source in place of the run's own, where its files are not at hand; the network takes its
    ``input_shape`` and ``outputs``, and its ``loss_fn`` adapts. ``device``: where the network is to be. Needs torch and
    numpy, and what the data set needs.
    Raises ``fobmaml.saved.CheckpointError`` for a folder without a whole checkpoint, ValueError for settings that
    cannot be taken.

    >>> run = fobmaml.load_run("outputs/first")  # of MNIST-1D
    >>> network = run.adapt(torch.randn(25, 40), torch.arange(25) % 5)
    >>> run.predict(network, torch.randn(3, 40)).shape
    torch.Size([3])
    """
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise refuse("device", device, f"a device of torch's ({str(error).splitlines()[0]})") from None
    path = Path(folder)
    path = path / "checkpoint.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    try:
        return _built(path, state, trust, data, where)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path}: takes a whole checkpoint of this program, and no run can be made of this one ({reason})"
        ) from error


def _built(path: Path, state: dict[str, Any], trust: bool, data: TaskSource | None, device: torch.device) -> Run:
    settings = state["config"]
    dtype = getattr(torch, one_of("dtype", settings["dtype"], ("float32", "float64")))
    if data is None:
        data = make("dataset", settings["dataset"], trust)
    check_members(data)
    with torch.random.fork_rng(devices=[]):  # initial values, which are replaced
        model = make("model", settings["model"], trust, input_shape=data.input_shape, outputs=data.outputs)
    model = _of_kind("model", model, nn.Module).to(device, dtype)
    solver = _of_kind("solver", make("solver", settings["solver"], trust), Solver)
    estimator = _of_kind("estimator", make("estimator", settings["estimator"], trust, solver=solver), Estimator)
    adapt, support_loss = settings.get("adapt", "all"), getattr(data, "support_loss", None)
    learner = Learner(model, data.loss_fn, adapt=adapt, support_loss=support_loss)
    Outer(learner, estimator).load_state_dict(state)
    said = evaluation_solver(settings)
    by = Adaptation(None if said is None else make("eval.solver", said, trust), settings["eval"]["lam"])
    adapting = estimator.adapting(by)  # behind Outer, to share its variables
    return Run(path.parent, settings, state["step"], learner, estimator, adapting, data)


def _of_kind(name: str, part: Any, kind: type) -> Any:
    if not isinstance(part, kind):
        raise refuse(f"{name}._target_", type(part).__name__, f"one that makes a {kind.__module__}.{kind.__qualname__}")
    return part
