"""A module's operations, recorded while it runs once: as nodes, where all are known."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fobmaml.engine.modules import PureModule
from fobmaml.engine.nodes import Node
from fobmaml.engine.reading import Reading
from fobmaml.engine.recording import Recording, UnknownLayerError


def trace(module: PureModule, parameters: Mapping[str, Tensor], x: Tensor) -> list[Node]:
    """The operations of ``module`` with ``parameters`` on examples like ``x`` [N, ...], in their order.

    Where nodes are found, they are what was done to these inputs: that the module does the same to others, and has the
    derivatives that they have, is to be tried. Raises UnknownLayerError for an operation that there is no node for,
    parameters that are used twice or not at all, and hooks; besides, what the module does.
    """
    for name, layer in module.model.named_modules():
        if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
            raise UnknownLayerError(f"{type(layer).__name__} '{name}' has hooks")
    names, recording = list(parameters), Recording()

    def call(values: Sequence[Tensor], inputs: Tensor) -> Tensor:
        return module(dict(zip(names, values, strict=True)), inputs)

    with module.noting(recording.entered):
        given, start, end = recording.of(call, list(parameters.values()), x)
    reading = Reading(dict(zip(given, names, strict=True)), start)
    for operation in recording.operations:
        reading.read(operation)
    if end is None or not reading.ends(end):
        raise UnknownLayerError("the module (output)")
    if reading.unused:
        raise UnknownLayerError(f"parameter '{next(iter(reading.unused))}' is not used")
    return reading.nodes
