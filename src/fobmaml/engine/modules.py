"""A caller's module, called as a pure function of its parameters and inputs, and left as it is."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from fobmaml.precision import SharedChange


def private_copy(model: nn.Module, share: bool = True) -> nn.Module:
    """The same modules as objects of their own, so that what ``forward`` assigns or counts stays in the copy.

    Parameters are the model's own if ``share``, else copies. What cannot be copied (a lock, a file) is shared.
    """
    modules = list(model.modules())
    memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
    for p in model.parameters():
        memo[id(p)] = p if share else nn.Parameter(p.detach().clone(), p.requires_grad)
    for module in modules:
        for value in vars(module).values():  # an earlier forward's, which deepcopy would not take
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in modules:
        attributes = vars(memo[id(module)])
        for name, value in vars(module).items():
            try:
                attributes[name] = copy.deepcopy(value, memo)
            except Exception:  # whatever an attribute's own copying raises
                attributes[name] = value
    return memo[id(model)]


class PureModule:
    """(parameters, inputs) -> outputs by a private copy of ``model``: every call begins from the model's present
    buffers and frozen parameters, and leaves nothing behind, in the inputs neither.

    Raises ValueError, naming the layer and the way out, for what cannot be a function of parameters and inputs:
    running batch statistics, active dropout, weights that ``forward`` itself changes, gradient hooks on parameters.
    """

    def __init__(self, model: nn.Module, trainable: Mapping[str, Tensor]):
        for name, p in trainable.items():
            if getattr(p, "_backward_hooks", None):
                raise ValueError(
                    f"model: parameter '{name}' has a gradient hook, which would not be called: takes "
                    "parameters without"
                )
        for name, module in model.named_modules():
            if problem := _impurity(module):
                raise ValueError(f"model: {type(module).__name__} '{name}' {problem}")
        self.model, self.trainable = model, trainable.keys()
        self._all_trainable = dict(model.named_parameters()).keys() == trainable.keys() and not list(model.buffers())
        self.copy = private_copy(model)
        self.unpack: Callable[[Tensor], Any] = _as_it_is
        self._tied = _names_beyond_the_first(self.copy)
        for module in self.copy.modules():
            _made_differentiable(module)

    def __call__(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parameters = {
            **parameters,
            **{name: parameters[first] for name, first in self._tied.items() if first in parameters},
        }
        inputs = self.unpack(x.clone())  # forward may write to them
        if self._all_trainable:
            return functional_call(self.copy, parameters, (inputs,), tie_weights=False)
        state = {
            name: p.clone() if p.is_inference() else p
            for name, p in self.model.named_parameters()
            if name not in self.trainable
        }
        state |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # and to these
        return functional_call(self.copy, {**state, **parameters}, (inputs,), tie_weights=False)

    def foreign(self, outputs: Tensor) -> str:
        """A trainable parameter of the caller's that ``outputs`` were computed with, reached around the call; or ''."""
        names = {id(p): name for name, p in self.model.named_parameters() if name in self.trainable}
        waiting, seen = [outputs.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (name := names.get(id(getattr(node, "variable", None)))) is not None:
                return name
            waiting += [following for following, _ in node.next_functions]
        return ""

    def first_differing(self, parameters: Mapping[str, Tensor], x: Tensor) -> str:
        """The first layer whose output differs between two equal calls, as text; '' if none does."""
        runs: list[list[tuple[str, Any]]] = []
        names = {module: f"{type(module).__name__} '{name}'" for name, module in self.copy.named_modules()}
        for _ in range(2):
            calls: list[tuple[str, Any]] = []
            runs.append(calls)

            def keep(module: nn.Module, _: Any, output: Any, calls: list[tuple[str, Any]] = calls) -> None:
                calls.append((names[module], output.clone() if isinstance(output, Tensor) else None))

            handles = [module.register_forward_hook(keep) for module in names]
            try:
                self(parameters, x)
            finally:
                for handle in handles:
                    handle.remove()
        for (name, first), (_, second) in zip(*runs, strict=False):
            if isinstance(first, Tensor) and not torch.equal(first, second):
                return name
        return ""

    @contextmanager
    def noting(self, enter: Callable[[str], Callable[[], None]]) -> Iterator[None]:
        """Inside, ``enter`` is called with the name of each layer, as text, whose forward begins; what it returns when
        that ends."""
        open_layers: list[Callable[[], None]] = []
        names = {module: f"{type(module).__name__} '{name}'" for name, module in self.copy.named_modules()}
        handles = [
            h
            for module, name in names.items()
            for h in (
                module.register_forward_pre_hook(lambda *_, name=name: open_layers.append(enter(name))),
                module.register_forward_hook(lambda *_: open_layers.pop()()),
            )
        ]
        try:
            yield
        finally:
            for leave in reversed(open_layers):
                leave()
            for handle in handles:
                handle.remove()

    def failing(self, call: Callable[[], object]) -> str:
        """The innermost layer in whose ``forward`` ``call()`` raises, as text; '' if none."""
        inside: list[str] = []
        names = {module: f"{type(module).__name__} '{name}'" for name, module in self.copy.named_modules()}
        handles = [
            h
            for module, name in names.items()
            for h in (
                module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
                module.register_forward_hook(lambda *_: (inside.pop(), None)[1]),
            )
        ]
        try:
            call()
        except Exception:
            return inside[-1] if inside else ""
        finally:
            for handle in handles:
                handle.remove()
        return ""


def _as_it_is(x: Tensor) -> Any:
    return x


def _names_beyond_the_first(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, each with the first one, one for each place that a parameter stands in."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                full = f"{prefix}.{name}" if prefix else name
                if first.setdefault(id(p), full) != full:
                    tied[full] = first[id(p)]
    return tied


def _made_differentiable(module: nn.Module) -> None:
    """Where torch has a fast way without the right derivative, takes the plain way to the same number."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.sparse = False  # the gradient becomes a part of a dense row
    if isinstance(module, parametrizations._WeightNorm):
        module.forward = partial(_weight_norm, dim=module.dim)  # type: ignore[method-assign]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            hook.compute_weight = partial(_hooked_weight, hook)  # type: ignore[method-assign]


def _weight_norm(g: Tensor, v: Tensor, dim: int) -> Tensor:
    """torch's own has a second derivative that is not symmetric."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hooked_weight(hook: WeightNorm, module: nn.Module) -> Tensor:
    return _weight_norm(getattr(module, hook.name + "_g"), getattr(module, hook.name + "_v"), hook.dim)


def _impurity(module: nn.Module) -> str | None:
    """Why a layer is not a function of its parameters and inputs, if its class and settings say so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, which cannot be called with other parameters: takes the module that it was made from"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "shares a batch out by itself: takes the module inside, .module"
    if type(module).__name__ == "OptimizedModule":  # of torch.compile, which takes seconds to import
        return "is compiled for its own parameters: takes the module given to torch.compile"
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
        return (
            "updates batch statistics, so a task's loss is not a function of its parameters alone: takes a layer "
            "without them (GroupNorm, LayerNorm), or .eval()"
        )
    dropout = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0)
    if module.training and isinstance(dropout, int | float) and dropout > 0:
        return "is random, so differences of solutions are noise: takes p=0 or .eval()"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "changes its weight in forward: takes max_norm=None"
    return None


@contextmanager
def _no_inference_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=False):
        yield


_no_path, _attention, _recurrence = map(SharedChange, (_no_inference_path, _plain_attention, _plain_recurrence))


@contextmanager
def differentiable(twice: bool = False) -> Iterator[None]:
    """Without torch's inference path for transformers, which has no derivative; ``twice``: also without its kernels for
    attention and recurrent layers that have a first one only."""
    with _no_path:
        if twice:
            with _attention, _recurrence:
                yield
        else:
            yield


@contextmanager
def batched(device: torch.device) -> Iterator[None]:
    """For ``torch.func.vmap``: without the kernel for attention on a CPU, which it would call row by row."""
    with _attention if device.type == "cpu" else nullcontext():
        yield
