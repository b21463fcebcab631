"""A network and a loss as functions of stacked flat parameters: one row a task."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fobmaml.arguments import one_of, refuse
from fobmaml.engine import fused, images, library
from fobmaml.engine.autograd import Autograd
from fobmaml.engine.base import WHOLE, Engine
from fobmaml.engine.chain import Chain
from fobmaml.engine.described import Described
from fobmaml.engine.head import Body, module_of
from fobmaml.engine.loop import Loop
from fobmaml.engine.losses import CrossEntropy, Loss, LossFn, Part, RowLoss
from fobmaml.engine.modules import private_copy
from fobmaml.engine.network import Network
from fobmaml.engine.selection import Adapt, adapted_names
from fobmaml.engine.stacked import Stacked
from fobmaml.engine.trial import Trial
from fobmaml.engine.work import Counted, Counter
from fobmaml.tasks.batch import TaskBatch
from fobmaml.tasks.layout import Layout

WORK_AT_ONCE = 2**25
"""Rows × parameters × examples of a gradient by hand that hides the cost of calling torch's operators: with less, calls
cost time; with more, memory grows and time does not fall (results/bench_chunks.csv)."""
ENGINES = ("auto", "autograd", "loop", "stacked", "fused")
"""What may compute gradients; ``auto`` takes the fastest that fits."""


class Learner(Network):
    """A network, its loss, and the choice of what computes their gradients.

    ``model``: see ``Network``. ``loss_fn(outputs [N, ...], targets [N, ...])``: the mean loss.
    ``engine``, what computes gradients; ``used`` says which have:

    - ``stacked``: sequences of 1-d convolutions, activations and linear layers, by hand, whatever class or function
      the module has them from (``engine.trace``);
    - ``fused``: those padded by one, with biases and SiLU, for a cross-entropy by a compiled kernel, in float32 on a
      CPU;
    - ``images``: first derivatives of a cross-entropy of networks of convolutions, norms, activations, pools and
      residual sums, and of linear layers, norms (``LayerNorm``, ``RMSNorm``) and attention on sequences of vectors or
      of words, by a compiled kernel, in float32 on a CPU; by ``auto`` alone;
    - ``autograd``: any module that ``torch.func.vmap`` batches, all rows at once;
    - ``loop``: any module, row by row;
    - ``auto``: the fastest that gives what the module itself gives. Between the last two the work of a row decides, or
      ``measure``.

    ``adapt``, what the inner problem moves: all parameters, ``head``, ``norm-and-head`` or names by pattern
    (``adapted_names``). ``adapted``: their names. ``moves`` [P]: 1 for them and 0 for the others, or None: all. Where
    they are those of the network's last module, ``features`` takes it apart. ``support_loss``: of the support examples,
    where that is not ``loss_fn``.

    Where a network's examples interact, support and query set are evaluated apart. ``work`` counts all that engines
    compute but outputs. Raises ValueError as ``Network`` and ``adapted_names`` do, for a loss that is no function, and
    for an engine that does not take the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        engine: str = "auto",
        adapt: Adapt = "all",
        support_loss: LossFn | None = None,
    ):
        one_of("engine", engine, ENGINES)
        super().__init__(model)
        self.loss_fn, self.engine, self.loss = loss_fn, engine, Loss(loss_fn)
        self.support_loss = None if support_loss is None else Loss(support_loss)
        self._trial = Trial(self, engine)
        self._used: dict[str, None] = {}
        self.measured: dict[bool, int] = {}
        self.work = Counter()
        self.layout: Layout | None = None
        self.adapt, self.adapted = adapt, adapted_names(model, self.shapes, adapt)
        self.moves: Tensor | None = None
        if len(self.adapted) < len(self.shapes):
            parts = [torch.full((shape.numel(),), float(name in self.adapted)) for name, shape in self.shapes.items()]
            self.moves = torch.cat(parts).to(self.device, self.dtype)
        name = "" if self.moves is None else module_of(model, self.adapted)
        self._body = Body(self, name) if name else None
        self._head: Learner | None = None

    @property
    def used(self) -> str:
        """The engines that have computed gradients so far: ``fused-avx512``, ``stacked``, ``loop``, or several."""
        return "+".join(sorted(self._used))

    def in_double(self) -> "Learner":
        """The same network and loss in float64, on copies of everything."""
        model = private_copy(self.model, share=False).double()
        support_loss = None if self.support_loss is None else self.support_loss.to(torch.float64)
        engine = "auto" if self.engine == "fused" else self.engine
        double = Learner(model, self.loss.to(torch.float64), engine, self.adapt, support_loss)
        double.take(self.layout)
        return double

    def take(self, layout: Layout | None) -> None:
        """From now on, inputs are rows of numbers that the model gets as ``layout`` says. None: as they are.

        Raises ValueError once gradients have been computed with another one, and where an engine, or a dtype, cannot.
        """
        if layout == self.layout:
            return
        if self._used or layout is None:
            raise refuse("tasks", "inputs of another layout", "the same tensors in all tasks of a model")
        if self.engine in ("stacked", "fused"):
            raise refuse("engine", self.engine, "inputs that are one tensor; auto takes any")
        if any(layout.dtypes) and self.dtype not in (torch.float32, torch.float64):
            raise refuse("model", self.dtype, "float32 or float64 parameters, beside inputs of whole numbers")
        self.layout, self.module.unpack = layout, layout.unpack

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """The network with parameters phi[r] on the examples x[r]: [R, P], [R, N, ...] -> [R, N, ...].

        No graph is recorded: to differentiate, take an engine's ``gradient``.
        """
        loss = RowLoss(self.loss, x, [Part(slice(None), 1.0)])  # outputs ask for nothing of it
        with torch.no_grad():
            if described := self._of_images(x):
                return images.outputs(described, phi, x)
            return self._chosen(x, loss, second_order=False)[1].outputs(phi)

    def row_loss(self, targets: Tensor, parts: Sequence[Part] | None = None, mask: Tensor | None = None) -> RowLoss:
        """``targets`` [R, N, ...]; ``parts``: by default all examples of a row are one. ``mask`` [R, N]: the examples
        that there are, None: all."""
        return self.loss.rows(targets, parts or [Part(slice(None), 1.0)], mask)

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean loss of each row: [R, N, ...], [R, N, ...] -> [R]."""
        return self.row_loss(targets, mask=mask)(outputs)

    def engine_for(self, x: Tensor, loss: RowLoss, second_order: bool = False) -> Engine:
        """The engine for inputs ``x`` [R, N, ...]. ``second_order``: for Hessian products."""
        name, engine = self._chosen(x, loss, second_order)
        self._used[name] = None
        return Counted(engine, self.work)

    def _chosen(self, x: Tensor, loss: RowLoss, second_order: bool) -> tuple[str, Engine]:
        chain = self._chain(x)
        if isinstance(loss, CrossEntropy):
            if chain and self.fuses(chain):
                return f"fused-{library.instructions()}", fused.Fused(self, x, loss, chain)
            if not second_order and (described := self._of_images(x)):
                return f"images-{library.instructions()}", images.FusedImages(described, self, x, loss)
        if chain:
            return "stacked", Stacked(self, x, loss, chain)
        batched = self._trial.batched(x, second_order)
        parts = [part.examples for part in loss.parts]
        if loss.padded and not self._trial.joint(x, [slice(1), slice(1, None)]):
            raise refuse("tasks", "masks", "tasks of equal numbers of examples, for a model whose examples interact")
        apart = parts if len(parts) > 1 and not self._trial.joint(x, parts) else WHOLE
        return ("autograd", Autograd(self, x, loss, apart)) if batched else ("loop", Loop(self, x, loss, apart))

    def _chain(self, x: Tensor) -> Chain | None:
        """The network as the engines by hand take it, or None."""
        return None if self.layout else self._trial.chain(x)

    def _of_images(self, x: Tensor) -> Described | None:
        """The network as the kernel for images takes it, or None; what the other kernel takes is its own."""
        known = self.dtype == torch.float32 and x.dtype in (torch.float32, torch.int64) and x.device.type == "cpu"
        if self.engine != "auto" or self.layout or not known:
            return None
        if (chain := self._chain(x)) and self.fuses(chain):
            return None
        return self._trial.images(x) if library.kernel() is not None else None

    def fuses(self, chain: Chain) -> bool:
        """Whether the compiled kernel takes the network."""
        if self.engine not in ("auto", "fused"):
            return False
        fits = chain.as_stored and library.fits(chain.layers, self.dtype, self.device)
        if self.engine == "fused" and not fits:
            raise refuse(
                "engine",
                self.engine,
                "float32 on a CPU that the kernel was compiled for, SiLU, biases, padding of one; auto takes any",
            )
        return fits

    @property
    def untraced(self) -> str:
        """The layer because of which no engine by hand takes the network, as far as one was asked for; or ''."""
        return self._trial.untraced

    def measure(self, x: Tensor, examples: int, second_order: bool) -> None:
        """Lets a stopwatch choose between ``autograd`` and ``loop``, and how many rows at once, for gradients of so
        many ``examples`` like those of ``x`` [R, N, ...], or Hessian products: once. Nothing where an engine by hand
        takes the network, or one was asked for. Cost: four gradients each of up to 32 rows, twice, and of two.

        ``measured``, by whether for Hessian products: 0 for the loop, else how many times the usual rows at once; what
        is there is not measured again."""
        x = x.to(self.dtype if x.is_floating_point() else x.dtype)
        if not ((not second_order and self._of_images(x)) or self._chain(x)):
            self._trial.measure(x, examples, second_order, self.measured.get(second_order))
            self.measured |= self._trial.measured

    def rows_at_once(self, x: Tensor, examples: int, second_order: bool) -> int:
        """As many rows as keep a CPU busy, for gradients of so many ``examples`` like those of ``x`` [R, N, ...].

        More take more memory, and no less time.
        """
        x = x[[0, -1]].to(self.dtype if x.is_floating_point() else x.dtype)
        if not second_order and self._of_images(x):
            return fused.ROWS_A_THREAD * torch.get_num_threads()
        if chain := self._chain(x):
            rows = math.ceil(WORK_AT_ONCE / (examples * self.parameter_count))
            a_thread = fused.KEPT_ROWS_A_THREAD if second_order else fused.ROWS_A_THREAD
            return max(rows, a_thread * torch.get_num_threads()) if self.fuses(chain) else rows
        if not self._trial.batched(x, second_order):
            return 1
        return self._trial.rows_at_once(examples, second_order)

    def query_loss(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """fᵢ(φᵢ), row i on task i: [T, P] -> [T]."""
        return self.row_loss(tasks.query_y, [QUERY], tasks.query_mask)(self.outputs(phi, tasks.query_x))

    def query_gradient(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """∇fᵢ(φᵢ), row i on task i: [T, P] -> [T, P]. Cost: one query gradient a task."""
        loss = self.row_loss(tasks.query_y, [QUERY], tasks.query_mask)
        return self.engine_for(tasks.query_x, loss).gradient(phi)

    def features(self, theta: Tensor, tasks: TaskBatch, query: bool) -> "tuple[Learner, TaskBatch] | None":
        """The last module as a learner of its own, and ``tasks`` with what it gets at ``theta`` [P] for examples.

        None unless its parameters are those that tasks adapt, and what it gets depends on the others alone. Without
        ``query`` the query set is the support set again. Cost: a forward pass of the examples; what the module by
        itself takes then is no part of ``work``.
        """
        if self._body is None or self.moves is None:
            return None
        if self._head is None:
            engine = self.engine if self.engine in ("autograd", "loop") else "auto"
            own = None if self.support_loss is None else self.support_loss.loss_fn
            head = Learner(self.model.get_submodule(self._body.name), self.loss_fn, engine, support_loss=own)
            if not self._body.fits(head.outputs, self.moves, theta, tasks.support_x[0]):
                self._body = None
                return None
            self._head = head
        support = self._body(theta, tasks.support_x)
        self.work.forward(*support.shape[:2])
        if not query:
            mask = tasks.support_mask
            return self._head, TaskBatch(support, tasks.support_y, support, tasks.support_y, tasks.keys, mask, mask)
        asked = self._body(theta, tasks.query_x)
        self.work.forward(*asked.shape[:2])
        return self._head, replace(tasks, support_x=support, query_x=asked, layout=None)

    def check(self, tasks: TaskBatch) -> TaskBatch:
        """``tasks``, once they are known to fit the model. Raises ValueError naming what does not."""
        self.take(tasks.layout)
        tensors = {}
        for name in ("support_x", "support_y", "query_x", "query_y"):
            t = getattr(tasks, name)
            if t.device != self.device:
                raise refuse("tasks", f"tensors on {t.device}", f"the model's device, {self.device}")
            if name.endswith("x") and t.is_floating_point() and t.dtype != self.dtype:
                raise refuse(name, t.dtype, f"the model's dtype, {self.dtype}")
            tensors[name] = t.clone() if t.is_inference() else t  # autograd does not take those
        return replace(tasks, **tensors) if any(tensors[n] is not getattr(tasks, n) for n in tensors) else tasks


QUERY = Part(slice(None), 1.0, "query_y")
