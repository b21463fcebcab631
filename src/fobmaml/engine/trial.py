"""What a module does, found by trying it once: whether it is a sequence of known operations, whether rows can be
batched, whether its examples see each other."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fobmaml.arguments import refuse
from fobmaml.engine.autograd import rows_batched
from fobmaml.engine.chain import Chain, chain_of
from fobmaml.engine.described import Described, described
from fobmaml.engine.loop import rows_one_by_one
from fobmaml.engine.losses import close, hvp
from fobmaml.engine.modules import differentiable, private_copy
from fobmaml.engine.network import Network
from fobmaml.engine.nodes import GroupNorm, LayerNorm, Node, RMSNorm, as_module
from fobmaml.engine.trace import trace
from fobmaml.precision import full_precision

LOOP_FROM = 10_000_000
"""Floating-point operations of a row's forward pass from which a loop over rows is taken for faster than
``torch.func.vmap``, where it is not measured."""
FLOPS_AT_ONCE = 10**8
"""Of a forward pass of all rows by vmap: with more, the activations leave the cache, and time grows."""
MOST_ROWS, MORE, REPEATS, CLEARLY = 32, 4, 3, 1.05
"""Of a measurement: rows at most, how many times more of them than by rule are tried, how often each way is, and how
many times faster one has to be than the rule's, so that roundings repeat where it does not matter."""


Kind = tuple[torch.Size, torch.dtype]
"""Of examples: shape and type."""


class Trial:
    """Answers are remembered. ``engine``: the one asked for; ValueError where it cannot do what it is asked for."""

    def __init__(self, network: Network, engine: str):
        self.network, self.engine = network, engine
        self._nodes: dict[Kind, list[Node] | None] = {}
        self._chains: dict[Kind, Chain | None] = {}
        self._images: dict[Kind, Described | None] = {}
        self.untraced = ""  # the layer because of which the network is no sequence that an engine by hand takes
        self._batches: dict[bool, bool] = {}  # by whether Hessian products follow
        self.measured: dict[bool, int] = {}  # of these, how many times the rule's rows at once; 0: one by one
        self._joint: bool | None = None
        self.flops_an_example = 0.0  # of the forward pass, once ``batched`` was asked

    def nodes(self, x: Tensor) -> list[Node] | None:
        """What the network does with examples like those of ``x`` [R, N, ...], or None: ``untraced`` says why."""
        kind = x.shape[2:], x.dtype
        if kind not in self._nodes:
            with full_precision(self.network.device):
                self._nodes[kind] = self._try_tracing(x[0])
        return self._nodes[kind]

    def chain(self, x: Tensor) -> Chain | None:
        """The same for the engines by hand."""
        kind = x.shape[2:], x.dtype
        if kind not in self._chains:
            nodes = None if self.engine in ("autograd", "loop") else self.nodes(x)
            found = self.untraced if nodes is None else chain_of(nodes, self.network, x)
            if isinstance(found, str):
                self.untraced = found
                if self.engine in ("stacked", "fused"):
                    known = "1-d convolutions, activations and linear layers"
                    raise refuse("engine", self.engine, f"a sequence of {known}, not {found}; auto takes any")
            self._chains[kind] = None if isinstance(found, str) else found
        return self._chains[kind]

    def images(self, x: Tensor) -> Described | None:
        """And for the kernel for images."""
        kind = x.shape[2:], x.dtype
        if kind not in self._images:
            nodes = self.nodes(x)
            self._images[kind] = None if nodes is None else described(nodes, self.network, x.shape[2:])
        return self._images[kind]

    def batched(self, x: Tensor, second_order: bool) -> bool:
        """Whether rows are evaluated by vmap: it agrees with the module itself, and is taken for faster."""
        if second_order not in self._batches:
            with full_precision(self.network.device):
                self._batches[second_order] = self._try_batching(self._elsewhere(), x[[0, -1]], second_order)
        return self._batches[second_order]

    def measure(self, x: Tensor, examples: int, second_order: bool, before: int | None) -> None:
        """Settles ``batched`` with a stopwatch, for derivatives of so many ``examples`` like those of ``x``
        [R, N, ...], if the engine is ``auto``. ``before``: what was ``measured`` of them, if it was."""
        if self.engine != "auto" or second_order in self.measured:
            return
        with full_precision(self.network.device):
            phi, times = self._elsewhere(), before
            if not self._try_batching(phi, x[[0, -1]], second_order, by_rule=False):
                times = 0
            if times is None:
                times = self._fastest(phi, x, examples, second_order)
        for order in {False, second_order} - self.measured.keys():  # what goes for Hessian products goes for gradients
            self.measured[order], self._batches[order] = times, times > 0

    def rows_at_once(self, examples: int, second_order: bool) -> int:
        """For vmap, of derivatives of so many examples."""
        flops = max(self.flops_an_example * examples, 1)
        return self.measured.get(second_order, 1) * math.ceil(FLOPS_AT_ONCE / flops)

    def _fastest(self, phi: Tensor, x: Tensor, examples: int, second_order: bool) -> int:
        """How many times the rule's rows at once; 0: one by one."""
        few = max(2, min(MOST_ROWS, self.rows_at_once(examples, second_order)))
        ways = {0: 2, 1: few} | ({MORE: min(MORE * few, MOST_ROWS)} if few < MOST_ROWS else {})
        spent: dict[int, list[float]] = {way: [] for way in ways}
        with differentiable(second_order):
            for _ in range(1 + REPEATS):
                for way, count in ways.items():
                    rows = torch.arange(count)
                    inputs = phi[rows % 2], x[rows % len(x)][:, torch.arange(examples) % x.shape[1]]
                    call = partial(rows_batched if way else rows_one_by_one, self.network)
                    started = time.perf_counter()
                    self._derivatives(call, *inputs, second_order)
                    if phi.is_cuda:
                        torch.cuda.synchronize(phi.device)
                    spent[way].append((time.perf_counter() - started) / count)
        of_a_row = {way: min(times[1:]) for way, times in spent.items()}  # the first warms up
        by_rule = int(self.flops_an_example * examples < LOOP_FROM)
        best = min(of_a_row, key=lambda way: of_a_row[way])
        return best if of_a_row[best] * CLEARLY < of_a_row[by_rule] else by_rule

    def joint(self, x: Tensor, parts: Sequence[slice]) -> bool:
        """Whether examples do not see each other, so that the parts may be evaluated at once."""
        if self._joint is None:
            p, inputs = self._elsewhere()[:1], x[:1]
            together = partial(rows_one_by_one, self.network)

            def apart(phi: Tensor, x: Tensor) -> Tensor:
                return torch.cat([together(phi, x[:, part]) for part in parts], dim=1)

            with differentiable(), full_precision(self.network.device):
                wanted = self._called(x, lambda: self._derivatives(apart, p, inputs, False))
                try:
                    found = self._derivatives(together, p, inputs, False)
                    self._joint = all(map(close, found, wanted)) and close(
                        self.network.one_row(p[0], inputs[0, :1]), wanted[0][0, :1]
                    )
                except Exception:  # takes sets of certain sizes only
                    self._joint = False
        return self._joint

    def _elsewhere(self) -> Tensor:
        """Two rows near the model's parameters, [2, P], where nothing is zero by initialisation."""
        theta, generator = self.network.theta().to(self.network.dtype), torch.Generator().manual_seed(0)
        noise = torch.randn(2, len(theta), generator=generator, dtype=torch.float64).to(theta)
        return theta + 0.1 * (theta.square().mean().sqrt() + 0.1) * noise

    def _try_tracing(self, x: Tensor) -> list[Node] | None:
        """Takes the trace for the network if it has its outputs and gradient, in float64 on a copy."""
        network, phi = self.network, self._elsewhere()[0].double()
        self._called(x.unsqueeze(0), lambda: network.one_row(phi.to(network.dtype), x))
        try:
            double = Network(private_copy(network.model, share=False).double())
            inputs = x.double() if x.is_floating_point() else x
            nodes = trace(double.module, double.unflatten(phi), inputs)
            traced = as_module(nodes)
            wanted = _gradient(lambda leaf: double.one_row(leaf, inputs), phi)
            found = _gradient(lambda leaf: traced(double.unflatten(leaf), inputs), phi)
            if not all(map(close, found, wanted)):
                self.untraced = "a forward or backward that its operations do not show"
                return None
            own = trace(network.module, network.unflatten(phi.to(network.dtype)), x)
            if len(own) == len(nodes) and all(map(partial(_alike, dtype=network.dtype), nodes, own)):
                return own
            self.untraced = f"other operations in {network.dtype} than in float64"
        except Exception as error:  # whatever a module raises whose inputs are not numbers
            self.untraced = (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def _try_batching(self, phi: Tensor, x: Tensor, second_order: bool, by_rule: bool = True) -> bool:
        """``by_rule``: False, too, where it is taken for slower."""
        network = self.network
        one_by_one, at_once = partial(rows_one_by_one, network), partial(rows_batched, network)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            first = self._called(x, lambda: network.one_row(phi[0], x[0]))
        if not isinstance(first, Tensor) or first.dim() < 1 or len(first) != x.shape[1]:
            got = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
            raise refuse(
                "model",
                f"outputs of {got}",
                f"a module that returns a tensor [{x.shape[1]}, ...], an entry for each example",
            )
        self.flops_an_example = counter.get_total_flops() / x.shape[1]
        with torch.no_grad():
            again = network.one_row(phi[0], x[0])
        if not close(again, first):
            layer = network.module.first_differing(network.unflatten(phi[0]), x[0]) or "its forward"
            raise ValueError(
                f"model: {layer} returns something else for the same inputs, so differences of solutions "
                "are noise: takes a deterministic one, or .eval()"
            )
        with differentiable(second_order):
            wanted = self._called(x, lambda: self._derivatives(one_by_one, phi, x, second_order, own=True))
            if second_order and not _symmetric(wanted[2:], phi):
                raise ValueError(
                    "model: its Hessian by autograd is not symmetric, so a layer's backward has a wrong "
                    "derivative: takes Forward, Symmetric, Central, FOMAML or Reptile, which need none"
                )
            slower = by_rule and counter.get_total_flops() >= LOOP_FROM
            better_not = slower or any(map(_batches_wrongly, network.module.copy.modules()))
            if self.engine == "loop" or (better_not and self.engine != "autograd"):
                return False
            try:
                found = self._derivatives(at_once, phi, x, second_order)
                reason = "" if all(map(close, found, wanted)) else "it gives other numbers"
            except Exception as error:  # whatever a rule for batching raises
                reason = str(error).split("\n")[0]
        if reason and self.engine == "autograd":
            raise refuse("engine", self.engine, f"a network that torch.func.vmap can batch ({reason}); loop takes any")
        return not reason

    def _derivatives(
        self, of_rows: Callable[[Tensor, Tensor], Tensor], phi: Tensor, x: Tensor, second_order: bool, own: bool = False
    ) -> list[Tensor]:
        """Outputs, a gradient and a Hessian product of a function of them. ``own``: refuses outputs that the caller's
        own parameters have a part in."""
        with torch.enable_grad():
            leaf = phi.detach().requires_grad_()
            outputs = of_rows(leaf, x)
            if own and (name := self.network.module.foreign(outputs)):
                raise ValueError(
                    f"model: parameter '{name}' is read around the call, by a function that holds on to "
                    "the module (a hook, a forward set on it): takes one that uses its own arguments"
                )
            value = (outputs.sin() + outputs).sum()
            (g,) = torch.autograd.grad(value, leaf, create_graph=second_order)
            return [
                outputs.detach(),
                g.detach(),
                *([hvp(g, leaf, d) for d in (phi, phi.flip(1))] if second_order else []),
            ]

    def _called(self, x: Tensor, call: Callable[[], Any]) -> Any:
        """``call()``, of rows ``x``; ValueError, with the layer and the way out, for whatever the module raises."""
        try:
            return call()
        except Exception as error:
            layer = self.network.module.failing(call) or type(self.network.model).__name__
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, ValueError) and reason.startswith(("model:", "model=", "estimator:", "inputs=")):
                raise
            raise ValueError(f"model: {layer} fails on inputs {tuple(x.shape[1:])} of {x.dtype}: {reason}") from error


def _alike(double: Node, own: Node, dtype: torch.dtype) -> bool:
    """Whether a node traced in float64 and one in ``dtype`` are the same but for an ε that is rounded, or the one of
    their types (nn.RMSNorm)."""
    norms, (precise, rounding) = (GroupNorm, LayerNorm, RMSNorm), (torch.finfo(t).eps for t in (torch.float64, dtype))
    if not isinstance(double, norms) or not isinstance(own, norms):
        return double == own
    same = (double.eps, own.eps) == (precise, rounding) or abs(double.eps - own.eps) <= rounding * double.eps
    return same and replace(double, eps=own.eps) == own


def _gradient(outputs_at: Callable[[Tensor], Tensor], phi: Tensor) -> list[Tensor]:
    """Outputs, and the gradient of a function of them."""
    with torch.enable_grad(), differentiable():
        leaf = phi.detach().requires_grad_()
        outputs = outputs_at(leaf)
        return [outputs.detach(), *torch.autograd.grad((outputs.sin() + outputs).sum(), leaf)]


def _symmetric(along: list[Tensor], v: Tensor) -> bool:
    """Whether Hessian products along v and along v reversed are those of one symmetric matrix a row."""
    u = v.flip(1)
    one, other = (u * along[0]).sum(), (v * along[1]).sum()
    size = u.norm() * along[0].norm() + v.norm() * along[1].norm()
    return bool((one - other).abs() <= torch.finfo(v.dtype).eps ** 0.5 * size) or not bool(size.isfinite())


def _batches_wrongly(module: nn.Module) -> bool:
    """vmap's rule for embeddings forgets the row that gets no gradient."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
