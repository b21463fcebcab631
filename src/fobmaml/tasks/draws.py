"""Which examples of a task the steps of an inner solver take, as a function of the task's key alone."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def drawn(keys: Tensor, examples: int, batch: int, steps: int, stream: int = 0) -> Tensor:
    """The examples of each step, numbers below ``examples``: keys [T] -> [T, steps, batch].

    Without replacement: all examples in a random order, then all again in another, cut into batches of ``batch``, or
    of all where that is fewer. Nothing but a task's key and ``stream`` decides: not the tasks beside it, the device,
    or what was drawn before.
    """
    batch = min(batch, examples)
    orders = math.ceil(steps * batch / examples)
    places = _places(orders, examples, stream, keys.device)
    order = _scrambled(keys.view(-1, 1, 1) + places).argsort(dim=-1, stable=True)
    return order.flatten(1)[:, : steps * batch].view(len(keys), steps, batch)


@lru_cache(64)
def _places(orders: int, examples: int, stream: int, device: torch.device) -> Tensor:
    """A random number for each place in each order."""
    with torch.inference_mode(False):
        return _scrambled(torch.arange(orders * examples, device=device).view(orders, examples) + (stream << 40))


def _scrambled(z: Tensor) -> Tensor:
    """A random permutation of the 64-bit integers: the last part of SplitMix64 (Steele, Lea & Flood 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, zeros following."""
    return (z >> by) & ((1 << (64 - by)) - 1)
