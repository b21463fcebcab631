"""A network and a loss as functions of stacked flat parameters: one row a task."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fobmaml.arguments import one_of, refuse
from fobmaml.engine import fused, library
from fobmaml.engine.autograd import Autograd
from fobmaml.engine.base import WHOLE, Engine
from fobmaml.engine.chain import Chain
from fobmaml.engine.loop import Loop
from fobmaml.engine.losses import CrossEntropy, Loss, LossFn, Part, RowLoss
from fobmaml.engine.modules import private_copy
from fobmaml.engine.network import Network
from fobmaml.engine.stacked import Stacked
from fobmaml.engine.trial import Trial
from fobmaml.engine.work import Counted, Counter
from fobmaml.tasks.batch import TaskBatch

WORK_AT_ONCE = 2**25
"""Rows × parameters × examples of a gradient by hand that hides the cost of calling torch's operators: with less, calls
cost time; with more, memory grows and time does not fall (results/bench_chunks.csv)."""
FLOPS_AT_ONCE = 10**8
"""Of a forward pass of all rows by vmap: with more, the activations leave the cache, and time grows."""
ENGINES = ("auto", "autograd", "loop", "stacked", "fused")


class Learner(Network):
    """A network, its loss, and the choice of what computes their gradients.

    ``model``: see ``Network``. ``loss_fn(outputs [N, ...], targets [N, ...])``: the mean loss.
    ``engine``, what computes gradients; ``used`` says which have:

    - ``stacked``: sequences of 1-d convolutions, activations and linear layers, by hand, whatever class or function
      the module has them from (``engine.trace``);
    - ``fused``: those padded by one, with biases and SiLU, for a cross-entropy by a compiled kernel, in float32 on a
      CPU;
    - ``autograd``: any module that ``torch.func.vmap`` batches, all rows at once;
    - ``loop``: any module, row by row;
    - ``auto``: the fastest that gives what the module itself gives. Between the last two the work decides.

    Where a network's examples interact, support and query set are evaluated apart. ``work`` counts all that engines
    compute but outputs. Raises ValueError as ``Network``
    does, for a ``loss_fn`` that is no function, and for an engine that does not take the model.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, engine: str = "auto"):
        one_of("engine", engine, ENGINES)
        super().__init__(model)
        self.loss_fn, self.engine, self.loss = loss_fn, engine, Loss(loss_fn)
        self._trial = Trial(self, engine)
        self._used: dict[str, None] = {}
        self.work = Counter()

    @property
    def used(self) -> str:
        """The engines that have computed gradients so far: ``fused-avx512``, ``stacked``, ``loop``, or several."""
        return "+".join(sorted(self._used))

    def in_double(self) -> "Learner":
        """The same network and loss in float64, on copies of everything."""
        model = private_copy(self.model, share=False).double()
        return Learner(model, self.loss.to(torch.float64), "auto" if self.engine == "fused" else self.engine)

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """The network with parameters phi[r] on the examples x[r]: [R, P], [R, N, ...] -> [R, N, ...].

        No graph is recorded: to differentiate, take an engine's ``gradient``.
        """
        loss = RowLoss(self.loss, x, [Part(slice(None), 1.0)])  # outputs ask for nothing of it
        with torch.no_grad():
            return self._chosen(x, loss, second_order=False)[1].outputs(phi)

    def row_loss(self, targets: Tensor, parts: Sequence[Part] | None = None) -> RowLoss:
        """``targets`` [R, N, ...]; ``parts``: by default all examples of a row are one."""
        return self.loss.rows(targets, parts or [Part(slice(None), 1.0)])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of each row: [R, N, ...], [R, N, ...] -> [R]."""
        return self.row_loss(targets)(outputs)

    def engine_for(self, x: Tensor, loss: RowLoss, second_order: bool = False) -> Engine:
        """The engine for inputs ``x`` [R, N, ...]. ``second_order``: for Hessian products."""
        name, engine = self._chosen(x, loss, second_order)
        self._used[name] = None
        return Counted(engine, self.work)

    def _chosen(self, x: Tensor, loss: RowLoss, second_order: bool) -> tuple[str, Engine]:
        if chain := self._trial.chain(x):
            if self.fuses(chain) and isinstance(loss, CrossEntropy):
                return f"fused-{library.instructions()}", fused.Fused(self, x, loss, chain)
            return "stacked", Stacked(self, x, loss, chain)
        batched = self._trial.batched(x, second_order)
        parts = [part.examples for part in loss.parts]
        apart = parts if len(parts) > 1 and not self._trial.joint(x, parts) else WHOLE
        return ("autograd", Autograd(self, x, loss, apart)) if batched else ("loop", Loop(self, x, loss, apart))

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

    def rows_at_once(self, x: Tensor, examples: int, second_order: bool) -> int:
        """As many rows as keep a CPU busy, for gradients of so many ``examples`` like those of ``x`` [R, N, ...].

        More take more memory, and no less time.
        """
        x = x[[0, -1]].to(self.dtype if x.is_floating_point() else x.dtype)
        if chain := self._trial.chain(x):
            rows = math.ceil(WORK_AT_ONCE / (examples * self.parameter_count))
            a_thread = fused.KEPT_ROWS_A_THREAD if second_order else fused.ROWS_A_THREAD
            return max(rows, a_thread * torch.get_num_threads()) if self.fuses(chain) else rows
        if not self._trial.batched(x, second_order):
            return 1
        return math.ceil(FLOPS_AT_ONCE / max(self._trial.flops_an_example * examples, 1))

    def query_loss(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """fᵢ(φᵢ), row i on task i: [T, P] -> [T]."""
        return self.row_loss(tasks.query_y, [QUERY])(self.outputs(phi, tasks.query_x))

    def query_gradient(self, phi: Tensor, tasks: TaskBatch) -> Tensor:
        """∇fᵢ(φᵢ), row i on task i: [T, P] -> [T, P]. Cost: one query gradient a task."""
        return self.engine_for(tasks.query_x, self.row_loss(tasks.query_y, [QUERY])).gradient(phi)

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
        return replace(tasks, **tensors) if any(tensors[n] is not getattr(tasks, n) for n in tensors) else tasks


QUERY = Part(slice(None), 1.0, "query_y")
