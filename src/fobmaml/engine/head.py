"""The last module of a network, and what leads up to it."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fobmaml.arguments import refuse
from fobmaml.engine.losses import close
from fobmaml.engine.network import Network


def module_of(model: nn.Module, names: Collection[str]) -> str:
    """The innermost module within ``model`` whose trainable parameters are those of ``names``; '' if none."""
    found = ""
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" for name, p in module.named_parameters() if p.requires_grad}
        found = prefix if prefix and own == set(names) else found
    return found


class Body:
    """What leads up to the module ``name`` of a network: examples to what that module gets of them, its features.

    Once it ``fits``, a call gives those of several tasks' examples at the same parameters, [P], [T, N, ...] ->
    [T, N, ...], all at once where that is the same as task by task.
    """

    def __init__(self, network: Network, name: str):
        self.network, self.name = network, name
        self._at_once: bool | None = None

    @torch.no_grad()
    def __call__(self, phi: Tensor, x: Tensor) -> Tensor:
        if len(x) == 1 or self._at_once is False:
            return torch.stack([self._features(phi, examples) for examples in x])
        found = self._features(phi, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self._at_once is None:
            each = torch.stack([self._features(phi, examples) for examples in x])
            self._at_once = close(found, each)
            return found if self._at_once else each  # as later calls, so that a run that goes on has the same bits
        return found

    @torch.no_grad()
    def fits(self, head: Callable[[Tensor, Tensor], Tensor], moves: Tensor, phi: Tensor, x: Tensor) -> bool:
        """Whether the network is ``head`` of its features, rows of the parameters that ``moves`` [P] marks and of
        features to outputs, and these do not depend on those parameters: near ``phi`` [P] on examples [N, ...]."""
        noise = 0.1 * torch.randn(2, len(phi), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(phi)
        rows = torch.stack([phi + noise[0], phi + noise[0] + noise[1] * moves])
        try:
            (first, outputs), (second, others) = (self._called(row, x) for row in rows)
            found = head(rows[:, moves != 0], torch.stack([first, second]))
        except Exception:  # whatever a module raises; an engine says it better
            return False
        return torch.equal(first, second) and close(found, torch.stack([outputs, others]))

    def _features(self, phi: Tensor, x: Tensor) -> Tensor:
        return self._called(phi, x)[0]

    def _called(self, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and the network's outputs: [P], [N, ...] -> [N, ...], [N, ...]. Raises ValueError where the module
        is not called once, on one tensor with an entry for each example."""
        calls: list[tuple[Any, ...]] = []

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append(tuple(each.clone() if isinstance(each, Tensor) else each for each in (*given, *named.items())))

        module = self.network.module.copy.get_submodule(self.name)
        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            outputs = self.network.one_row(phi, x)
        finally:
            handle.remove()
        if len(calls) != 1 or len(calls[0]) != 1 or not isinstance(calls[0][0], Tensor) or len(calls[0][0]) != len(x):
            raise refuse("model", f"'{self.name}'", "a module that is called once, on one tensor, as in the first call")
        return calls[0][0], outputs
