"""The kernels for ARM: cross-compiled, run by an emulator, and compared with autograd on random descriptions."""

import shutil
import struct
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from sanitize_images import Images, RandomImages
from sanitize_kernel import Description, Random

from fobmaml.engine import library
from fobmaml.engine.fused import FusedGradient
from fobmaml.engine.images import ImageGradient
from fobmaml.engine.memory import in_order

COMPILER, EMULATOR, THREADS = "aarch64-linux-gnu-gcc", "qemu-aarch64", 2
DESCRIPTIONS = 40


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """arm.c and the kernels, as setup.py compiles them where there is no OpenMP."""
    if missing := [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    (module,) = (module for module in modules if module["name"].endswith("neon"))
    flags = [flag for flag in module["extra-compile-args"] if flag != "-fopenmp"]
    sources = [ROOT / "tests" / "arm.c", *(ROOT / source for source in module["sources"])]
    program = tmp_path_factory.mktemp("arm") / "arm"
    command = [COMPILER, *flags, "-pthread", "-Wall", "-Werror", "-static", "-o", program, *sources, "-lm"]
    subprocess.run(command, check=True)
    return program


def _request(d: Description) -> tuple[bytes, list[int]]:
    """As arm.c reads it, and how many numbers it answers: derivatives, outputs."""
    images, (rows, examples) = isinstance(d, Images), d.inputs.shape[:2]
    gradient = (ImageGradient.of if images else FusedGradient)(d.layers, d.shapes, d.inputs, d.targets, d.weights)
    chosen = examples if d.order is None else d.order.shape[2]
    descent = d.displacement is d.into
    tensors = [
        d.start.expand(rows, -1),
        None if descent else d.displacement,
        gradient.data["inputs"],
        d.targets,
        d.weights if d.order is None else d.chosen_weights,
        d.order,
        *(torch.tensor(each if isinstance(each, list) else [each] * d.times) for each in (d.scale, d.step)),
        d.along,
        d.into,
    ]
    data = [bytes(gradient.layers), *(b"" if t is None else in_order(t).numpy().tobytes() for t in tensors)]
    answered = [d.into.numel(), d.targets.numel() if images else 0]
    numbers = [images, len(gradient.layers), rows, examples, chosen, gradient.block_of(chosen), gradient.parameters]
    numbers += [d.times, THREADS, descent, *map(len, data), 4 * answered[1]]
    return struct.pack(f"{len(numbers)}q", *numbers) + b"".join(data), answered


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Random, RandomImages])
def test_derivatives_on_arm_are_autograds(program, kind):
    """Outputs, too. Networks are described to it as to this machine's kernel."""
    if library.kernel() is None:
        pytest.skip("the kernel was not compiled for this machine")
    torch.manual_seed(0)
    chance = kind(0)
    found = [chance.description() for _ in range(DESCRIPTIONS)]
    found = [d for d in found if d.inputs.numel() and (d.order is None or d.order.numel())]  # others do not reach it
    requests, answered = zip(*map(_request, found), strict=True)
    done = subprocess.run([EMULATOR, program], input=b"".join(requests), capture_output=True, check=True)
    answers = iter(torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).split([*chain(*answered)]))
    for d in found:
        wanted = d.wanted()
        d.into = next(answers).view(d.into.shape)
        assert d.agrees(wanted), d
        outputs = next(answers)
        if not outputs.numel():
            continue
        for phi, x, own in zip(d.start.expand(len(d.inputs), -1), d.inputs, outputs.view(d.targets.shape), strict=True):
            right = d.outputs(d.folded(phi.double()), x.double())
            torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-4, equal_nan=True)
