"""A network and a loss as functions of stacked flat parameters: one row a task."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fobmaml.arguments import one_of, refuse
from fobmaml.losses import CrossEntropy, LossFn, RowLoss, moved, row_loss
from fobmaml.models import fused
from fobmaml.models.stacked import StackedNetwork
from fobmaml.tasks.batch import TaskBatch

ENGINES = ("auto", "autograd", "stacked", "fused")
STEPS_A_CALL = 10
"""Of the compiled kernel: within a call no thread waits for another, and nobody can interrupt."""


class Evaluation(Protocol):
    """The sum over rows of a loss L(network(φᵣ, xᵣ)), with the parameters φ [R, P] in a layout of its own.

    ``parameters``: in that layout, as a list of tensors [R, ...]; ``pack`` and ``unpack``
    go between such lists and rows [R, P]; what is unpacked may be the list's own memory.
    """

    parameters: list[Tensor]

    def pack(self, rows: Tensor) -> list[Tensor]: ...

    def unpack(self, packed: list[Tensor]) -> Tensor: ...

    def move(self, start: list[Tensor], displacement: list[Tensor]) -> None:
        """φ ← start + displacement, lists like ``parameters``; ``start`` may have a single row for all."""
        for phi, theta, d in zip(self.parameters, start, displacement, strict=True):
            torch.add(theta, d, out=phi)

    def descend(self, start: list[Tensor], displacement: list[Tensor], steps: int, scale: float, step: float) -> None:
        """``steps`` times: displacement ← scale · displacement + step · the gradient at start + displacement."""
        for _ in range(steps):
            self.move(start, displacement)
            self.add_gradient(displacement, scale, step)

    def loss(self) -> Tensor:
        """Of each row, [R]."""

    def add_gradient(self, into: list[Tensor], scale: float = 0.0, step: float = 1.0) -> None:
        """into ← scale · into + step · gradient, both lists like ``parameters``, and ``into`` another one."""

    def hessian_product(self, v: Tensor) -> Tensor:
        """Each row's Hessian times v[r], [R, P] -> [R, P], where the last gradient was computed."""


class Learner:
    """The only place that knows how a flat row of parameters folds into a network's layers.

    ``model``: any ``torch.nn.Module``; its trainable parameters, in the order of ``named_parameters``, are a row.
    One that lists its layers (``stacked_layers`` and ``stacked_inputs``, see ``CNN1d``) is evaluated and differentiated
    by ``StackedNetwork``, several times faster; others by ``torch.func.vmap`` and autograd. Gradients of a
    cross-entropy are faster again where ``models.fused`` fits. ``engine`` insists on one of the three: ``stacked``,
    ``autograd``, ``fused`` (whose Hessian products are ``stacked``); ``used`` says which were.
    ``loss_fn(outputs [N, ...], targets [N, ...])`` returns the mean loss.

    Raises ValueError for a model without trainable parameters, and for one whose loss is not a function of
    parameters and one example set alone (batch statistics, active dropout).
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, engine: str = "auto"):
        one_of("engine", engine, ENGINES)
        _check_pure(model)
        self.model, self.loss_fn = model, loss_fn
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model: takes a module with trainable parameters, got none")
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1:
            raise ValueError(f"model: takes parameters of one dtype on one device, got {sorted(map(str, kinds))}")
        ((self.dtype, self.device),) = kinds
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self.sizes = [p.numel() for p in trainable.values()]
        self.stacked = engine != "autograd" and _lists_its_layers(model, set(trainable))
        if engine in ("stacked", "fused") and not self.stacked:
            raise refuse("engine", engine, "a network that lists its layers (CNN1d, MLP); auto takes any")
        listed: Any = model
        self.fused = (engine in ("auto", "fused") and self.stacked
                      and fused.fits(listed.stacked_layers(), self.dtype, self.device))
        if engine == "fused" and not self.fused:
            raise refuse("engine", engine,
                         "float32 on a CPU that the kernel was compiled for, and SiLU; auto takes any")
        self._used: dict[str, None] = {}

    @property
    def used(self) -> str:
        """The engines that have computed gradients so far: ``fused-avx512``, ``stacked``, ``autograd``, or several."""
        return "+".join(sorted(self._used))

    @property
    def parameter_count(self) -> int:
        return sum(self.sizes)

    def theta(self) -> Tensor:
        """A copy of the model's trainable parameters, flat: [P]."""
        parameters = dict(self.model.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.shapes])

    def fold(self, rows: Tensor) -> dict[str, Tensor]:
        """[R, P] (or [P]) -> {parameter name: [R, ...] (or [...])}, views of ``rows``."""
        parts = rows.split(self.sizes, dim=-1)  # one backward for all parts, unlike slicing
        return {name: part.reshape(*rows.shape[:-1], *shape)
                for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """The network with parameters phi[r] on the examples x[r]: [R, P], [R, N, ...] -> [R, N, ...].

        Stacked, no graph is recorded: to differentiate, take an ``evaluation``.
        """
        if self.stacked:
            return _by_hand(self, phi, x).outputs()
        return vmap(lambda p, inputs: functional_call(self.model, p, (inputs,)))(self.fold(phi), x)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of each row: [R, N, ...], [R, N, ...] -> [R]."""
        return row_loss(self.loss_fn, targets, [(slice(None), 1.0)])(outputs)

    def evaluation(self, phi: Tensor, x: Tensor, loss: RowLoss, second_order: bool = False) -> Evaluation:
        """At ``phi`` [R, P] and inputs ``x`` [R, N, ...]. ``second_order``: for Hessian products."""
        if self.fused and isinstance(loss, CrossEntropy) and not second_order:
            self._used[f"fused-{fused.instructions()}"] = None
            return _Fused(self, phi, x, loss)
        self._used["stacked" if self.stacked else "autograd"] = None
        return (_ByHand if self.stacked else _ByAutograd)(self, phi, x, loss, second_order)

    def query_loss(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """fᵢ(φᵢ), row i on task i: [T, P] -> [T]."""
        return self.losses(self.outputs(phi, tasks.query_x), tasks.query_y)

    def query_gradient(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """∇fᵢ(φᵢ), row i on task i: [T, P] -> [T, P]. Cost: one query gradient a task."""
        loss = row_loss(self.loss_fn, tasks.query_y, [(slice(None), 1.0)])
        return gradient_of(self.evaluation(phi, tasks.query_x, loss))


def gradient_of(evaluation: Evaluation) -> Tensor:
    """By each row, [R, P]."""
    packed = [torch.empty_like(part) for part in evaluation.parameters]
    evaluation.add_gradient(packed)
    return evaluation.unpack(packed)


def _by_hand(learner: Learner, phi: Tensor, x: Tensor, second_order: bool = False) -> StackedNetwork:
    model: Any = learner.model
    network = StackedNetwork(model.stacked_layers(), learner.shapes, model.stacked_inputs(x), second_order)
    network.pack(learner.fold(phi.detach()), network.parameters)
    return network


class _ByHand(Evaluation):
    """All passes written out by hand."""

    def __init__(self, learner: Learner, phi: Tensor, x: Tensor, loss: RowLoss, second_order: bool):
        self.network = _by_hand(learner, phi, x, second_order)
        self.learner, self.row_loss, self.second_order = learner, loss, second_order
        self.parameters = self.network.parameters

    def pack(self, rows: Tensor) -> list[Tensor]:
        return self.network.pack(self.learner.fold(rows))

    def unpack(self, packed: list[Tensor]) -> Tensor:
        rows = packed[0].new_empty(len(packed[0]), self.learner.parameter_count)
        self.network.unpack(packed, self.learner.fold(rows))
        return rows

    def loss(self) -> Tensor:
        return self.row_loss(self.network.outputs())

    def add_gradient(self, into: list[Tensor], scale: float = 0.0, step: float = 1.0) -> None:
        g, self.loss_tangent = self.row_loss.linearize(self.network.outputs(), self.second_order)
        self.network.add_gradient(g, into, scale, step)

    def hessian_product(self, v: Tensor) -> Tensor:
        direction = self.pack(v)
        product = [torch.empty_like(part) for part in direction]
        self.network.add_gradient_tangent(self.loss_tangent(self.network.tangent(direction)), direction, product)
        return self.unpack(product)


class _InRows(Evaluation):
    """The layout is that of the rows."""

    def pack(self, rows: Tensor) -> list[Tensor]:
        return [rows.clone(memory_format=torch.contiguous_format)]

    def unpack(self, packed: list[Tensor]) -> Tensor:
        return packed[0]


class _ByAutograd(_InRows):
    """Everything by autograd, for any module."""

    def __init__(self, learner: Learner, phi: Tensor, x: Tensor, loss: RowLoss, second_order: bool):
        self.parameters = self.pack(phi.detach())
        self.row_losses, self.second_order = (lambda p: loss(learner.outputs(p, x))), second_order

    def loss(self) -> Tensor:
        with torch.no_grad():
            return self.row_losses(self.parameters[0])

    def add_gradient(self, into: list[Tensor], scale: float = 0.0, step: float = 1.0) -> None:
        with torch.enable_grad():
            # Where Hessian products follow, at a copy: the parameters may change before they are asked for.
            phi = self.parameters[0].clone() if self.second_order else self.parameters[0]
            self.phi = phi.detach().requires_grad_()
            (self.g,) = torch.autograd.grad(self.row_losses(self.phi).sum(), self.phi, create_graph=self.second_order)
        if scale == 0.0:
            torch.mul(self.g.detach(), step, out=into[0])
        else:
            into[0].mul_(scale).add_(self.g.detach(), alpha=step)

    def hessian_product(self, v: Tensor) -> Tensor:
        return moved(self.g, self.phi, v)


class _Fused(_InRows):
    """All passes of a gradient in one call of a compiled kernel."""

    def __init__(self, learner: Learner, phi: Tensor, x: Tensor, loss: CrossEntropy):
        model: Any = learner.model
        layers = model.stacked_layers()
        loss.prepare(phi.new_empty(*x.shape[:2], learner.shapes[layers[-1].weight][0]))
        self.kernel = fused.FusedGradient(layers, learner.shapes, model.stacked_inputs(x), loss.one_hot, loss.weights)
        self.parameters = [phi.detach()]
        self.learner, self.x, self.row_loss = learner, x, loss

    def move(self, start: list[Tensor], displacement: list[Tensor]) -> None:
        self.parameters = [start[0] + displacement[0]]  # what it began with belongs to somebody else

    def loss(self) -> Tensor:
        return self.row_loss(self.learner.outputs(self.parameters[0], self.x))

    def add_gradient(self, into: list[Tensor], scale: float = 0.0, step: float = 1.0) -> None:
        self.kernel.add(self.parameters[0], None, into[0], scale, step)

    def descend(self, start: list[Tensor], displacement: list[Tensor], steps: int, scale: float, step: float) -> None:
        for done in range(0, steps, STEPS_A_CALL):
            self.kernel.add(start[0], displacement[0], displacement[0], scale, step, min(STEPS_A_CALL, steps - done))

    def hessian_product(self, v: Tensor) -> Tensor:
        raise NotImplementedError("the compiled kernel knows no second derivatives: ask for second_order")


def _lists_its_layers(model: nn.Module, trainable: set[str]) -> bool:
    """Whether ``stacked_layers`` is the model: it stands beside ``forward``, and all that it names is trainable."""
    kind = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    if "stacked_layers" not in vars(kind):
        return False
    listed: Any = model
    return {name for layer in listed.stacked_layers() for name in (layer.weight, layer.bias)} == trainable


def _check_pure(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = f"model: {type(module).__name__} '{name}'"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            batch_statistics = module.training or module.running_mean is None
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                batch_statistics = module.training and module.track_running_stats
            if batch_statistics:
                raise ValueError(f"{kind} uses or updates batch statistics, so a task's loss is not a function of its "
                                 "parameters alone: takes a layer without them (GroupNorm, LayerNorm), or .eval()")
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{kind} is random, so differences of solutions are noise: takes p=0 or .eval()")
