"""The last module of a network, apart from what leads up to it."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fobmaml.engine.network import Network


def module_of(model: nn.Module, names: Collection[str]) -> str:
    """The innermost module within ``model`` whose trainable parameters are those of ``names``; '' if none."""
    found = ""
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" for name, p in module.named_parameters() if p.requires_grad}
        found = prefix if prefix and own == set(names) else found
    return found


@torch.no_grad()
def features(network: Network, name: str, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the module ``name`` gets, and the network's outputs: [P], [N, ...] -> [N, ...], [N, ...].

    None if it is not called once, on one tensor with an entry for each example.
    """
    calls: list[tuple[Any, ...]] = []

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(tuple(each.clone() if isinstance(each, Tensor) else each for each in (*given, *named.items())))

    handle = network.module.copy.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        outputs = network.one_row(phi, x)
    finally:
        handle.remove()
    if len(calls) != 1 or len(calls[0]) != 1 or not isinstance(calls[0][0], Tensor):
        return None
    (found,) = calls[0]
    return (found, outputs) if found.dim() and len(found) == len(x) else None
