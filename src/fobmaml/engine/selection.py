"""Which of a network's parameters the inner problem moves."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from fobmaml.arguments import refuse

Adapt = str | Sequence[str]
CHOICES = ("all", "head", "norm-and-head")
SHOWN = 6
"""Names of parameters in a message."""


def adapted_names(model: nn.Module, trainable: Collection[str], adapt: Adapt) -> frozenset[str]:
    """Those of the ``trainable`` parameters that tasks adapt; the others keep θ's values in the inner problem.

    ``adapt``: ``all``; ``head``, the layer that is defined last (of those that have trainable parameters), as in ANIL;
    ``norm-and-head``, besides it the layers whose class is called a norm (GroupNorm, LayerNorm, ...); or patterns of
    parameter names, as ``["blocks.3.*", "head.*"]``, where * stands for any text.

    Reference: Raghu, Raghu, Bengio & Vinyals 2020, arXiv:1909.09157 (head). Raises ValueError for other words, for a
    pattern that no name fits, and where there is no such layer.
    """
    if isinstance(adapt, str):
        if adapt not in CHOICES:
            raise refuse("adapt", adapt, f"one of {', '.join(CHOICES)}, or a list of patterns of parameter names")
        return frozenset(trainable) if adapt == "all" else _by_layer(model, trainable, with_norms=adapt != "head")
    if not isinstance(adapt, Sequence) or not adapt or not all(isinstance(pattern, str) for pattern in adapt):
        raise refuse("adapt", adapt, f"one of {', '.join(CHOICES)}, or a list of patterns of parameter names")
    for pattern in adapt:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            known = ", ".join([*trainable][:SHOWN]) + ", ..." * (len(trainable) > SHOWN)
            raise refuse("adapt", pattern, f"patterns of the model's parameters: {known}")
    return frozenset(name for name in trainable if any(fnmatchcase(name, pattern) for pattern in adapt))


def _by_layer(model: nn.Module, trainable: Collection[str], with_norms: bool) -> frozenset[str]:
    names = {id(p): name for name, p in model.named_parameters() if name in trainable}  # of a tied one, the first
    layers = {}
    for module in model.modules():
        if own := [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]:
            layers[module] = own
    head = [*layers][-1]
    if isinstance(head, nn.ParameterList | nn.ParameterDict):
        raise refuse("adapt", "head", "a model whose last layer is a module, or patterns of parameter names")
    norms = [own for module, own in layers.items() if "norm" in type(module).__name__.lower()]
    if with_norms and not norms:
        raise refuse("adapt", "norm-and-head", "a model that has layers called a norm; head takes any")
    return frozenset(name for own in [layers[head], *(norms if with_norms else [])] for name in own)
