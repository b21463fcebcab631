"""A network and a loss as functions of stacked flat parameters: one row a task."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from fobmaml.arguments import one_of, refuse
from fobmaml.engine import fused
from fobmaml.engine.losses import CrossEntropy, Loss, LossFn, Part, RowLoss, close, moved
from fobmaml.engine.modules import PureModule, differentiable, private_copy
from fobmaml.engine.stacked import StackedNetwork
from fobmaml.tasks.batch import TaskBatch

ENGINES = ("auto", "autograd", "loop", "stacked", "fused")
LOOP_FROM = 10_000_000
"""Floating-point operations of a row's forward pass from which a loop over rows is faster than ``torch.func.vmap``:
measured on multilayer, convolutional and attention networks. A rule and no stopwatch, so that roundings repeat."""
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

    ``model``: any ``torch.nn.Module``; its trainable parameters, in the order of ``named_parameters``, are a row. It is
    called as a private copy and comes back as it was. ``loss_fn(outputs [N, ...], targets [N, ...])``: the mean loss.
    ``engine``, what computes gradients; ``used`` says which have:

    - ``stacked``: networks that list their layers (``stacked_layers``, ``stacked_inputs``, see ``CNN1d``), by hand;
    - ``fused``: their gradients of a cross-entropy by a compiled kernel (Hessian products are ``stacked``);
    - ``autograd``: any module that ``torch.func.vmap`` batches, all rows at once;
    - ``loop``: any module, row by row;
    - ``auto``: the fastest that gives what the module itself gives. Between the last two the work decides.

    Where a network's examples interact, support and query set are evaluated apart. Raises ValueError for a model
    without trainable parameters, and for one whose outputs are not a function of parameters and inputs (running batch
    statistics, active dropout).
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, engine: str = "auto"):
        one_of("engine", engine, ENGINES)
        if not isinstance(model, nn.Module):
            raise refuse("model", type(model).__name__, "a torch.nn.Module")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model: takes a module with trainable parameters, got none")
        for name, p in trainable.items():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"model: parameter '{name}' has no shape yet: takes a module that was called once")
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1 or not all(dtype.is_floating_point and device.type != "meta" for dtype, device in kinds):
            raise ValueError("model: takes parameters of one real dtype on one real device, got "
                             f"{sorted(map(str, kinds))}")
        ((self.dtype, self.device),) = kinds
        self.model, self.loss_fn, self.engine = model, loss_fn, engine
        self.module, self.loss = PureModule(model, trainable), Loss(loss_fn)
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self.sizes = [p.numel() for p in trainable.values()]
        self.stacked = engine not in ("autograd", "loop") and _lists_its_layers(model, set(trainable))
        if engine in ("stacked", "fused") and not self.stacked:
            raise refuse("engine", engine, "a network that lists its layers (CNN1d, MLP) and has no hooks; auto takes "
                                           "any")
        listed: Any = model
        self.fused = (engine in ("auto", "fused") and self.stacked
                      and fused.fits(listed.stacked_layers(), self.dtype, self.device))
        if engine == "fused" and not self.fused:
            raise refuse("engine", engine,
                         "float32 on a CPU that the kernel was compiled for, and SiLU; auto takes any")
        self._used: dict[str, None] = {}
        self._batches: dict[bool, bool] = {}  # by whether Hessian products follow
        self._joint: bool | None = None
        self._listing_tried = False

    @property
    def used(self) -> str:
        """The engines that have computed gradients so far: ``fused-avx512``, ``stacked``, ``loop``, or several."""
        return "+".join(sorted(self._used))

    @property
    def parameter_count(self) -> int:
        return sum(self.sizes)

    def theta(self) -> Tensor:
        """A copy of the model's trainable parameters, flat: [P]."""
        parameters = dict(self.model.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.shapes])

    def in_double(self) -> "Learner":
        """The same network and loss in float64, on copies of everything."""
        model = private_copy(self.model, share=False).double()
        return Learner(model, self.loss.to(torch.float64), "auto" if self.engine == "fused" else self.engine)

    def fold(self, rows: Tensor) -> dict[str, Tensor]:
        """[R, P] (or [P]) -> {parameter name: [R, ...] (or [...])}, views of ``rows``."""
        parts = rows.split(self.sizes, dim=-1)  # one backward for all parts, unlike slicing
        return {name: part.reshape(rows.shape[:-1] + shape)
                for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def outputs(self, phi: Tensor, x: Tensor, parts: Sequence[slice] = (slice(None),)) -> Tensor:
        """The network with parameters phi[r] on the examples x[r]: [R, P], [R, N, ...] -> [R, N, ...].

        ``parts``: examples that may not see each other. Stacked, no graph is recorded: to differentiate, take an
        ``evaluation``.
        """
        if self._is_stacked(phi, x):
            return _by_hand(self, phi, x).outputs()
        of_rows = self._rows_batched if self._is_batched(phi, x, False) else self._rows_one_by_one
        with differentiable():
            if len(parts) > 1 and not self._is_joint(phi, x, parts):
                return torch.cat([of_rows(phi, x[:, part]) for part in parts], dim=1)
            return of_rows(phi, x)

    def one_row(self, phi: Tensor, x: Tensor, parts: Sequence[slice] = (slice(None),)) -> Tensor:
        """The same by the module itself, of a single row: [P], [N, ...] -> [N, ...]."""
        folded = self.fold(phi)
        if len(parts) > 1 and not self._is_joint(phi[None], x[None], parts):
            return torch.cat([self.module(folded, x[part]) for part in parts])
        return self.module(folded, x)

    def _rows_one_by_one(self, phi: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self.one_row(p, inputs) for p, inputs in zip(phi, x, strict=True)])

    def _rows_batched(self, phi: Tensor, x: Tensor) -> Tensor:
        return vmap(self.module)(self.fold(phi), x)

    def row_loss(self, targets: Tensor, parts: Sequence[Part] | None = None) -> RowLoss:
        """``targets`` [R, N, ...]; ``parts``: by default all examples of a row are one."""
        return self.loss.rows(targets, parts or [Part(slice(None), 1.0)])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of each row: [R, N, ...], [R, N, ...] -> [R]."""
        return self.row_loss(targets)(outputs)

    def evaluation(self, phi: Tensor, x: Tensor, loss: RowLoss, second_order: bool = False) -> Evaluation:
        """At ``phi`` [R, P] and inputs ``x`` [R, N, ...]. ``second_order``: for Hessian products."""
        stacked = self._is_stacked(phi, x)
        if stacked and self.fused and isinstance(loss, CrossEntropy) and not second_order:
            self._used[f"fused-{fused.instructions()}"] = None
            return _Fused(self, phi, x, loss)
        if stacked:
            self._used["stacked"] = None
            return _ByHand(self, phi, x, loss, second_order)
        batched = self._is_batched(phi, x, second_order)
        self._used["autograd" if batched else "loop"] = None
        return (_ByAutograd if batched else _ByLoop)(self, phi, x, loss, second_order)

    def query_loss(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """fᵢ(φᵢ), row i on task i: [T, P] -> [T]."""
        return self.row_loss(tasks.query_y, [QUERY])(self.outputs(phi, tasks.query_x))

    def query_gradient(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """∇fᵢ(φᵢ), row i on task i: [T, P] -> [T, P]. Cost: one query gradient a task."""
        return gradient_of(self.evaluation(phi, tasks.query_x, self.row_loss(tasks.query_y, [QUERY])))

    def check(self, tasks: TaskBatch) -> TaskBatch:
        """``tasks``, once they are known to fit the model. Raises ValueError naming what does not."""
        tensors = {}
        for name in ("support_x", "support_y", "query_x", "query_y"):
            t = getattr(tasks, name)
            if t.device != self.device:
                raise refuse("tasks", f"tensors on {t.device}", f"the model's device, {self.device}")
            if name.endswith("x") and t.is_floating_point() and t.dtype != self.dtype:
                raise refuse(name, t.dtype, f"the model's dtype, {self.dtype}")
            tensors[name] = t.clone() if t.is_inference() else t  # autograd does not take those
        return TaskBatch(**tensors) if any(tensors[n] is not getattr(tasks, n) for n in tensors) else tasks

    def _is_stacked(self, phi: Tensor, x: Tensor) -> bool:
        """Whether the layers that a network lists are the network, tried once."""
        if self.stacked and not self._listing_tried:
            p, inputs = _elsewhere(phi)[:1], x[:1]
            with torch.no_grad():
                wanted = self._called(inputs, lambda: self.one_row(p[0], inputs[0]))
            self.stacked = close(_by_hand(self, p, inputs).outputs()[0], wanted)
            self._listing_tried = True
            if not self.stacked and self.engine in ("stacked", "fused"):
                raise refuse("engine", self.engine, "a network whose forward is what its stacked_layers list")
        return self.stacked

    def _is_batched(self, phi: Tensor, x: Tensor, second_order: bool) -> bool:
        """Whether rows are evaluated by vmap: it is the faster, and agrees with the module itself, tried once."""
        if second_order not in self._batches:
            self._batches[second_order] = self._try_batching(_elsewhere(phi), x[[0, -1]], second_order)
        return self._batches[second_order]

    def _try_batching(self, phi: Tensor, x: Tensor, second_order: bool) -> bool:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            first = self._called(x, lambda: self.one_row(phi[0], x[0]))
        if not isinstance(first, Tensor) or first.dim() < 1 or len(first) != x.shape[1]:
            got = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
            raise refuse("model", f"outputs of {got}", f"a module that returns a tensor [{x.shape[1]}, ...], an entry "
                                                       "for each example")
        with torch.no_grad():
            again = self.one_row(phi[0], x[0])
        if not close(again, first):
            layer = self.module.first_differing(self.fold(phi[0]), x[0]) or "its forward"
            raise ValueError(f"model: {layer} returns something else for the same inputs, so differences of solutions "
                             "are noise: takes a deterministic one, or .eval()")
        with differentiable(second_order):
            wanted = self._called(x, lambda: self._derivatives(self._rows_one_by_one, phi, x, second_order))
            if second_order and not _symmetric(wanted[2:], phi):
                raise ValueError("model: its Hessian by autograd is not symmetric, so a layer's backward has a wrong "
                                 "derivative: takes Forward, Symmetric, Central, FOMAML or Reptile, which need none")
            if self.engine == "loop" or (self.engine != "autograd" and (
                    counter.get_total_flops() >= LOOP_FROM or any(map(_batches_wrongly, self.module.copy.modules())))):
                return False
            try:
                found = self._derivatives(self._rows_batched, phi, x, second_order)
                reason = "" if all(map(close, found, wanted)) else "it gives other numbers"
            except Exception as error:  # whatever a rule for batching raises
                reason = str(error).split("\n")[0]
        if reason and self.engine == "autograd":
            raise refuse("engine", self.engine, f"a network that torch.func.vmap can batch ({reason}); loop takes any")
        return not reason

    def _derivatives(self, of_rows: Callable[[Tensor, Tensor], Tensor], phi: Tensor, x: Tensor,
                     second_order: bool) -> list[Tensor]:
        """Outputs, a gradient and a Hessian product of a function of them."""
        with torch.enable_grad():
            leaf = phi.detach().requires_grad_()
            outputs = of_rows(leaf, x)
            if of_rows == self._rows_one_by_one and (name := self.module.foreign(outputs)):
                raise ValueError(f"model: parameter '{name}' is read around the call, by a function that holds on to "
                                 "the module (a hook, a forward set on it): takes one that uses its own arguments")
            value = (outputs.sin() + outputs).sum()
            (g,) = torch.autograd.grad(value, leaf, create_graph=second_order)
            return [outputs.detach(), g.detach(), *([moved(g, leaf, d) for d in (phi, phi.flip(1))] if second_order
                                                    else [])]

    def _called(self, x: Tensor, call: Callable[[], Any]) -> Any:
        """``call()``, of rows ``x``; ValueError, with the layer and the way out, for whatever the module raises."""
        try:
            return call()
        except Exception as error:
            layer = self.module.failing(call) or type(self.model).__name__
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, ValueError) and reason.startswith(("model:", "model=", "estimator:", "inputs=")):
                raise
            raise ValueError(f"model: {layer} fails on inputs {tuple(x.shape[1:])} of {x.dtype}: {reason}") from error

    def _is_joint(self, phi: Tensor, x: Tensor, parts: Sequence[slice]) -> bool:
        """Whether examples do not see each other, so that the parts may be evaluated at once; tried once."""
        if self._joint is None:
            self._joint = True  # in what follows
            p, inputs = _elsewhere(phi)[:1], x[:1]

            def derivatives(of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
                return self._derivatives(of, p, inputs, False)

            def apart(phi: Tensor, x: Tensor) -> Tensor:
                return torch.cat([self._rows_one_by_one(phi, x[:, part]) for part in parts], dim=1)

            wanted = self._called(x, lambda: derivatives(apart))
            try:
                self._joint = all(map(close, derivatives(self._rows_one_by_one), wanted)) and close(
                    self.one_row(p[0], inputs[0, :1]), wanted[0][0, :1])
            except Exception:  # takes sets of certain sizes only
                self._joint = False
        return self._joint


QUERY = Part(slice(None), 1.0, "query_y")


def _elsewhere(phi: Tensor) -> Tensor:
    """Two rows near the first, [2, P], where nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, phi.shape[1], generator=generator, dtype=torch.float64).to(phi)
    row = phi[0].detach()
    return row + 0.1 * (row.square().mean().sqrt() + 0.1) * noise


def _symmetric(along: list[Tensor], v: Tensor) -> bool:
    """Whether Hessian products along v and along v reversed are those of one symmetric matrix a row."""
    u = v.flip(1)
    one, other = (u * along[0]).sum(), (v * along[1]).sum()
    size = u.norm() * along[0].norm() + v.norm() * along[1].norm()
    return bool((one - other).abs() <= torch.finfo(v.dtype).eps ** 0.5 * size) or not bool(size.isfinite())


def _batches_wrongly(module: nn.Module) -> bool:
    """vmap's rule for embeddings forgets the row that gets no gradient."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None


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
    """Everything by autograd, all rows at once by ``torch.func.vmap``."""

    def __init__(self, learner: Learner, phi: Tensor, x: Tensor, loss: RowLoss, second_order: bool):
        self.parameters = self.pack(phi.detach())
        self.learner, self.x, self.row_loss, self.second_order = learner, x, loss, second_order
        self.parts = [part.examples for part in loss.parts]

    def loss(self) -> Tensor:
        with torch.no_grad():
            return self._losses(self.parameters[0])

    def _losses(self, phi: Tensor) -> Tensor:
        return self.row_loss(self.learner.outputs(phi, self.x, self.parts))

    def add_gradient(self, into: list[Tensor], scale: float = 0.0, step: float = 1.0) -> None:
        with torch.enable_grad(), differentiable(self.second_order):
            gradient = self._gradient()
        if scale == 0.0:
            torch.mul(gradient, step, out=into[0])
        else:
            into[0].mul_(scale).add_(gradient, alpha=step)

    def _gradient(self) -> Tensor:
        # Where Hessian products follow, at a copy: the parameters may change before they are asked for.
        phi = self.parameters[0].clone() if self.second_order else self.parameters[0]
        self.phi = phi.detach().requires_grad_()
        (self.g,) = torch.autograd.grad(self._losses(self.phi).sum(), self.phi, create_graph=self.second_order)
        return self.g.detach()

    def hessian_product(self, v: Tensor) -> Tensor:
        return moved(self.g, self.phi, v)


class _ByLoop(_ByAutograd):
    """Everything by autograd, row by row."""

    def _gradient(self) -> Tensor:
        self.rows = []
        for r, row in enumerate(self.parameters[0]):
            phi = (row.clone() if self.second_order else row).detach().requires_grad_()
            loss = self.row_loss.of_row(r, self.learner.one_row(phi, self.x[r], self.parts))
            (g,) = torch.autograd.grad(loss, phi, create_graph=self.second_order)
            self.rows.append((g, phi) if self.second_order else (g.detach(), phi))
        return torch.stack([g.detach() for g, _ in self.rows])

    def hessian_product(self, v: Tensor) -> Tensor:
        return torch.stack([moved(g, phi, along) for (g, phi), along in zip(self.rows, v, strict=True)])


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
    """Whether ``stacked_layers`` can be the model: it stands beside ``forward``, all that it names is trainable, and
    nothing is hooked in between."""
    kind = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    if "stacked_layers" not in vars(kind):
        return False
    for module in model.modules():
        if "forward" in vars(module) or any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                                             module._backward_pre_hooks)):
            return False
    listed: Any = model
    return sorted(n for layer in listed.stacked_layers() for n in (layer.weight, layer.bias)) == sorted(trainable)
