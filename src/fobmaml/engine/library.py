"""The compiled kernels ``fused.c`` and ``images.c``: finding them, and what their functions take.

They were compiled when the package was installed: for x86-64 once for AVX2 and once for AVX-512, for ARM with NEON.
"""

import ctypes
import platform
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from fobmaml.engine.activations import SiLU
from fobmaml.engine.layers import Convolution, Dense

ARM = ("aarch64", "arm64")  # 64 bits, as Linux and macOS call it
MOST_LAYERS = 512  # a thread describes them on its stack
LANES = 16  # of the widest vectors


class Layer(ctypes.Structure):
    """As in fused.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "kernel_size",
            "stride",
            "inputs",
            "outputs",
            "length_in",
            "length_out",
            "dense",
            "turned",
            "weight",
            "bias",
        )
    )


class Image(ctypes.Structure):
    """A Node as in images.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("kind", "inputs", "height", "width", "outputs", "height_out", "width_out"),
                *("kernel_height", "kernel_width", "stride_height", "stride_width", "pad_height", "pad_width"),
                *("weight", "bias", "channel_step", "place_step", "groups", "activation", "of", "other"),
            )
        ),
        ("eps", ctypes.c_double),
    )


def instructions() -> str:
    """The set of vector instructions that the kernel is chosen for: neon on ARM, which always has it; elsewhere what
    torch uses: avx512, avx2 or another."""
    return "neon" if platform.machine() in ARM else torch.backends.cpu.get_cpu_capability().lower()


@cache
def kernel() -> ctypes.CDLL | None:
    """The library for ``instructions()``; None if there is none, see ``missing``.

    On x86-64 ATEN_CPU_CAPABILITY=default, an environment variable of torch, turns it off.
    """
    try:
        return load(path) if (path := _compiled()) else None
    except (OSError, AttributeError):  # it, or a library that it takes, is another system's or another version's
        return None


def _compiled() -> str | None:
    """The library's file."""
    found = find_spec(f"fobmaml.engine.fused_{instructions()}")
    return None if found is None else found.origin


def load(path: str) -> ctypes.CDLL:
    """The kernel compiled into the library ``path``."""
    library = ctypes.CDLL(path)
    layers, whole, memory = ctypes.POINTER(Layer), ctypes.c_int64, ctypes.c_void_p
    library.fused_scratch.argtypes, library.fused_scratch.restype = [layers, whole, whole], whole
    library.fused_prepare.argtypes, library.fused_prepare.restype = [layers, whole, whole, memory, ctypes.c_int], None
    library.fused_kept.argtypes, library.fused_kept.restype = [layers, whole, whole], whole
    library.fused_gradient.argtypes = [
        layers,
        *[whole] * 6,
        memory,
        whole,
        *[memory] * 5,
        whole,
        *[memory] * 5,
        ctypes.c_int,
    ]
    library.fused_product.argtypes = [
        layers,
        *[whole] * 5,
        memory,
        whole,
        *[memory] * 2,
        *[ctypes.c_float] * 2,
        *[memory] * 3,
        ctypes.c_int,
    ]
    library.fused_gradient.restype = library.fused_product.restype = None
    nodes = ctypes.POINTER(Image)
    library.images_scratch.argtypes, library.images_scratch.restype = [nodes, whole, whole], whole
    library.images_prepare.argtypes, library.images_prepare.restype = [nodes, whole, whole, memory, ctypes.c_int], None
    library.images_gradient.argtypes = [
        nodes,
        *[whole] * 6,
        memory,
        whole,
        *[memory] * 5,
        whole,
        *[memory] * 4,
        ctypes.c_int,
    ]
    library.images_outputs.argtypes = [nodes, *[whole] * 4, memory, whole, *[memory] * 3, ctypes.c_int]
    library.images_gradient.restype = library.images_outputs.restype = None
    return library


def missing() -> str:
    """Why there is no kernel, in a few words; nothing where there is one."""
    if kernel() is not None:
        return ""
    machine, compiler = platform.machine(), (sysconfig.get_config_var("CC") or "cc").split()[0]
    if machine not in ("x86_64", "AMD64", *ARM):
        return f"it is for x86-64 processors with AVX2 and for ARM's of 64 bits, and this one is {machine}"
    if instructions() not in ("avx2", "avx512", "neon"):
        return "it is for processors with AVX2, which torch does not use here (ATEN_CPU_CAPABILITY, or none)"
    if path := _compiled():
        return f"{path} cannot be loaded"
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler})"
    return f"the C compiler ({compiler}) does not compile it: it takes gcc or clang"


def fits(layers: Sequence[Convolution | Dense], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel knows such a network: float32 on a CPU, SiLU after all layers but the last, which is dense;
    padding of one and biases."""
    if not 0 < len(layers) <= MOST_LAYERS:
        return False
    *hidden, last = layers
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and isinstance(last, Dense)
        and last.activation is None
        and all(isinstance(layer.activation, SiLU) for layer in hidden)
        and all(layer.bias is not None and getattr(layer, "padding", 1) == 1 for layer in layers)
        and kernel() is not None
    )
