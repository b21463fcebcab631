"""The operations that a norm by the root of the mean square consists of, torch's own or written out."""

import torch

from fobmaml.engine.recording import Operation, Value

aten = torch.ops.aten
ADD = (aten.add.Scalar, aten.add.Tensor, aten.add_.Scalar)
"""The last writes into the mean, which is nobody else's."""


class RootMeanSquares:
    """Follows x², its mean over the last axis, ε added, the root or its inverse; and knows x by the root of that."""

    def __init__(self) -> None:
        self._parts: dict[Value, tuple[str, Value, float]] = {}  # how far it is, of which x, and ε

    def take(self, operation: Operation) -> bool:
        """Whether it is the next of these operations, but for the last."""
        what, (first, *rest) = operation.target, operation.args
        if not isinstance(first, Value) or operation.kwargs:
            return False
        made, (stage, of, eps) = operation.made[0], self._parts.get(first, ("", first, 0.0))
        last = len(first.shape) - 1
        squares = (aten.pow.Tensor_Scalar, 2), (aten.mul.Tensor, first)
        if not stage and (what, *rest) in squares:
            self._parts[made] = "square", first, 0.0
        elif what is aten.mean.dim and stage == "square" and rest in ([[-1], True], [[last], True]):
            self._parts[made] = "mean", of, 0.0
        elif what in ADD and stage == "mean" and len(rest) == 1 and isinstance(rest[0], int | float):
            self._parts[made] = "sum", of, float(rest[0])
        elif what in (aten.rsqrt.default, aten.sqrt.default) and stage == "sum":
            self._parts[made] = "root" if what is aten.sqrt.default else "inverse", of, eps
        else:
            return False
        return True

    def eps_of(self, operation: Operation) -> float | None:
        """ε, where the operation is the last one: x by the root, or times its inverse."""
        if len(operation.args) != 2 or operation.kwargs:
            return None
        pairs = [operation.args, operation.args[::-1]] if operation.target is aten.mul.Tensor else [operation.args]
        wanted = {aten.mul.Tensor: "inverse", aten.div.Tensor: "root"}.get(operation.target)
        for x, root in pairs:
            stage, of, eps = self._parts.get(root, ("", None, 0.0)) if isinstance(root, Value) else ("", None, 0.0)
            if stage and stage == wanted and of is x:
                return eps
        return None
