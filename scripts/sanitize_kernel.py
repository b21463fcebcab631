"""Tries random descriptions on the compiled kernels, built with address and undefined-behaviour sanitizers.

    python scripts/sanitize_kernel.py --count 300

Valid descriptions have to give plain autograd's gradient or Hessian product, invalid ones have to be refused before the
kernel is called, and mistakes made behind the checks have to be seen by the sanitizers. Takes gcc with libasan, on
Linux.
"""

import argparse
import copy
import ctypes
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fobmaml.engine import fused, library
from fobmaml.engine.activations import ACTIVATIONS
from fobmaml.engine.layers import Convolution, Dense
from fobmaml.engine.rows import RowGradient

ROOT = Path(__file__).parents[1]
SILU = ACTIVATIONS["silu"]
NEEDED = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "avx2": {"avx2", "fma"},
    "neon": {"asimd"},  # as ARM calls it
}
FLAGS = ["-O1", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
MISTAKES_EACH = 4
ZERO = 1e-12  # a norm of single numbers gives none, and so no derivatives
ROUNDING = 2e-7  # of softmax minus target, where they are nearly equal, times an input of one
SCRIPTS = "sanitize_kernel.py", "sanitize_images.py"
"""One for each kernel."""


@dataclass
class Description:
    """All that ``FusedGradient`` and its ``add`` are told."""

    layers: list[Any]
    shapes: dict[str, torch.Size]
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    start: Tensor
    displacement: Tensor | None
    into: Tensor
    scale: Any
    step: Any
    times: Any
    order: Tensor | None = None
    chosen_weights: Tensor | None = None
    along: Tensor | None = None

    def compute(self) -> None:
        """By the kernel, into ``into``."""
        gradient = fused.FusedGradient(self.layers, self.shapes, self.inputs, self.targets, self.weights)
        if self.along is not None:
            first = torch.full((self.inputs.shape[0], gradient.parameters), torch.nan)
            gradient.linearize(self.start, first).add(self.along, self.into, self.scale, self.step)
            return
        gradient.add(
            self.start,
            self.displacement,
            self.into,
            self.scale,
            self.step,
            self.times,
            self.order,
            self.chosen_weights,
        )

    def wanted(self) -> Tensor:
        """The same by plain autograd in float64, a row at a time."""
        rows = []
        for r, into in enumerate(self.into.double()):
            start = self.start[r if len(self.start) > 1 else 0].double()
            for t in range(self.times):
                moved = (
                    into
                    if self.displacement is self.into
                    else (0.0 if self.displacement is None else self.displacement[r].double())
                )
                scale, step = (f[t] if isinstance(f, list) else f for f in (self.scale, self.step))
                before = scale * into if scale else 0.0  # as the kernel: 0 takes nothing over, no NaN either
                into = before + step * self._gradient(r, t, start + moved)
            rows.append(into)
        return torch.stack(rows) if rows else self.into.double()

    def _gradient(self, r: int, t: int, phi: Tensor) -> Tensor:
        x, targets, weights = self.inputs[r].double(), self.targets[r].double(), self.weights[r].double().flatten()
        if self.order is not None and self.chosen_weights is not None:
            x, targets, weights = x[self.order[r, t]], targets[self.order[r, t]], self.chosen_weights[r, t].double()
        phi = phi.clone().requires_grad_()
        each = -(targets * self.outputs(self.folded(phi), x).log_softmax(1)).sum(1)
        along = None if self.along is None else self.along[r].double()
        (gradient,) = torch.autograd.grad((each * weights).sum(), phi, create_graph=along is not None)
        if along is None or not gradient.requires_grad:  # of no examples
            return gradient
        return torch.autograd.grad(gradient, phi, along)[0]

    def folded(self, phi: Tensor) -> dict[str, Tensor]:
        """A row [P] as parameters."""
        parts = phi.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def agrees(self, wanted: Tensor) -> bool:
        """Whether ``into`` is, up to roundings, what is ``wanted``: row by row, numbers or none."""
        for found, right, x in zip(self.into, wanted, self.inputs, strict=True):
            finite = bool(right.isfinite().all())
            rounding = ROUNDING * x.nan_to_num(0.0, 0.0, 0.0).abs().max() if x.numel() else 0.0
            if bool(found.isfinite().all()) != finite or (
                finite and (found - right).norm() > 1e-5 * right.norm() + rounding + ZERO
            ):
                return False
        return True

    def outputs(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """[N, ...] -> [N, classes], by torch's operators."""
        h = x.mT  # [N, channels, length]
        for layer in self.layers:
            weight, bias = parameters[layer.weight], parameters[str(layer.bias)]
            if isinstance(layer, Convolution):
                h = F.conv1d(h, weight.mT, bias, stride=layer.stride, padding=1)
            else:
                signal = h if layer.turned else h.mT
                h = F.linear(signal.flatten(1), weight.flatten(1), bias).unsqueeze(2)
            h = F.silu(h) if layer is not self.layers[-1] else h
        return h[:, :, 0]


class Random(random.Random):
    """Descriptions by chance."""

    KERNEL = "fused"

    def description(self) -> Description:
        """A valid one, with sizes on both sides of all that the kernel cuts into blocks."""
        convolutions, dense, large = self.choice([0, 1, 2, 3, 4]), self.choice([1, 1, 2, 3]), self.random() < 0.02
        length, channels = self.randint(1, 60), self.choice([1, 1, 2, 5])
        rows, examples = self.choice([0, 1, 2, 3, 5]), self.choice([0, 1, 3, 24, 25, 26, 60])
        at_first = length, channels
        layers: list[Convolution | Dense] = []
        shapes: dict[str, torch.Size] = {}
        for i in range(convolutions + dense):
            last = i == convolutions + dense - 1
            out = self.choice([1, 2, 5, 7, 8, 9, 16, 17, 25, 33, 49, 70]) if not large or last else 230
            if i < convolutions:
                kernel_size, stride = self.randint(1, min(7, length + 2)), self.randint(1, 3)
                shape, length = torch.Size((out, kernel_size, channels)), (length + 2 - kernel_size) // stride + 1
                layers.append(Convolution(f"w{i}", f"b{i}", stride, SILU))
            else:
                shape = torch.Size(self.choice([(out, length, channels), (out, length * channels)]))
                length = 1
                layers.append(Dense(f"w{i}", f"b{i}", None if last else SILU, turned=self.random() < 0.3))
            shapes |= {f"w{i}": shape, f"b{i}": torch.Size((out,))}
            channels = out
        shapes = dict(self.sample(list(shapes.items()), len(shapes)))  # a row has them in any order
        along = self.parameters(shapes, rows) if self.random() < 0.4 else None
        return self.told(Description, layers, shapes, torch.randn(rows, examples, *at_first), channels, along)

    def told(
        self,
        kind: type[Description],
        layers: list[Any],
        shapes: dict[str, torch.Size],
        inputs: Tensor,
        channels: int,
        along: Tensor | None = None,
    ) -> Description:
        """All else, for a network with so many outputs ``channels``."""
        rows, examples = inputs.shape[:2]
        labels = torch.randint(channels, (rows, examples))
        targets = 3.0 * torch.eye(channels)[labels] - 2.0 / channels  # far from all probabilities: nothing cancels
        if inputs.numel() and self.random() < 0.1:
            inputs.view(-1)[self.randrange(inputs.numel())] = torch.nan
        weights = torch.rand(rows, examples, *self.choice([(), (1,)])) / max(examples, 1)
        into = 0.3 * self.parameters(shapes, rows)
        displacement = None if along is not None else self.choice([None, into, 0.3 * self.parameters(shapes, rows)])
        start = self.parameters(shapes, self.choice([1, rows]) if rows else 1)
        times, order, chosen_weights = 1 if along is not None else self.choice([1, 1, 2, 3]), None, None
        if along is None and self.random() < 0.4:
            chosen = self.choice([0, 1, 5, 26, 60]) if examples else 0
            order = torch.randint(max(examples, 1), (rows, times, chosen))
            order = order.mT.contiguous().mT if self.random() < 0.3 else order
            chosen_weights = self.laid_out(torch.rand(rows, times, chosen) / max(chosen, 1))
        scale, step = self.choice([0.0, 1.0, 0.9]), -0.1 if displacement is into else self.choice([1.0, -0.1])
        each = self.random() < 0.3  # a number for each time
        return kind(
            layers,
            shapes,
            self.laid_out(inputs),
            self.laid_out(targets),
            self.laid_out(weights),
            self.laid_out(start),
            displacement,
            into,
            scale=[scale * self.random() for _ in range(times)] if each else scale,
            step=[step * self.random() for _ in range(times)] if each else step,
            times=times,
            order=order,
            chosen_weights=chosen_weights,
            along=along,
        )

    def parameters(self, shapes: dict[str, torch.Size], rows: int) -> Tensor:
        """Weights so large that signals neither grow nor vanish."""
        return torch.cat(
            [torch.randn(rows, *shape).flatten(1) / math.prod(shape[1:]) ** 0.5 for shape in shapes.values()], 1
        )

    def laid_out(self, t: Tensor) -> Tensor:
        """The same numbers, differently in memory."""
        way = self.randrange(6)
        if way == 0 and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if way == 1:
            return torch.stack([t, t], -1)[..., 1]
        if way == 2 and t.numel():  # at an odd address
            memory = bytearray(4 * t.numel() + 1)
            memory[1:] = t.contiguous().numpy().tobytes()
            return torch.frombuffer(memory, dtype=torch.float32, offset=1).view(t.shape)
        if way == 3:
            return torch.complex(t, -t).conj().imag  # negated when it is read
        return t.clone()

    def mistake(self, right: Description) -> tuple[Description, str]:
        """One with something wrong in it, and the names by which it may be refused."""
        while True:
            d = copy.copy(right)
            name = self.choice(["inputs", "targets", "weights", "start", "displacement", "along", "into"])
            kind = self.choice(
                [self._tensor, self._tensor, self._layers, self._shapes, self._overlap, self._number, self._order]
            )
            if names := kind(d, name):
                return d, names

    def _tensor(self, d: Description, name: str) -> str | None:
        t = getattr(d, name)
        if t is None:
            return None
        ways: list[Callable[[], object]] = [
            t.double,
            t.half,
            t.long,
            lambda: t.to("meta"),
            t.to_sparse,
            t.tolist,
            t.flatten,
            lambda: t[None, None],
            lambda: t.new_zeros(*t.shape[:-1], t.shape[-1] + self.choice([1, 7])),
            lambda: t.new_zeros(t.shape[0] + 7, *t.shape[1:]),
        ]
        if t.shape[-1]:
            ways.append(lambda: t[..., :-1].contiguous())
        if t.numel():
            ways.append(lambda: self._without_memory(t))
        if t.numel() and name in ("displacement", "along", "into"):
            ways += [lambda: torch.stack([t, t], -1)[..., 0], lambda: t[:, :1].expand(t.shape)]
        setattr(d, name, self.choice(ways)())
        return "inputs, targets" if name == "inputs" else name  # of more rows, either may be the wrong one

    def _without_memory(self, t: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        t.untyped_storage().resize_(self.choice([0, t.nbytes - 4]))
        return t

    def _layers(self, d: Description, _: str) -> str:
        i = self.randrange(len(d.layers))
        layer, *others = d.layers[i:] + d.layers[:i]
        named = [name for other in others for name in (other.weight, str(other.bias))] + ["none"]
        ways = [
            [],
            others,
            d.layers * 2,
            d.layers * 600,
            self._with(d, i, replace(layer, weight=self.choice(named))),
            self._with(d, i, replace(layer, activation=ACTIVATIONS["tanh"])),
            self._with(d, -1, replace(d.layers[-1], activation=SILU)),
            self._with(d, -1, Convolution(d.layers[-1].weight, d.layers[-1].bias, 1, None)),
        ]
        d.layers = self.choice(ways)
        return "model"

    def _with(self, d: Description, i: int, layer: Any) -> list[Any]:
        layers = d.layers.copy()
        layers[i] = layer
        return layers

    def _shapes(self, d: Description, _: str) -> str:
        name = self.choice(list(d.shapes))
        shape = list(d.shapes[name])
        shape[self.randrange(len(shape))] += self.choice([-1, 1, 16, 2**20, 2**62])
        d.shapes = d.shapes | {name: torch.Size(shape)}
        return "model, inputs, targets, start"

    def _overlap(self, d: Description, name: str) -> str | None:
        """``into`` begins a few numbers behind another tensor's beginning."""
        name = "chosen_weights" if name == "weights" and d.order is not None else name  # which are read
        t, size = getattr(d, name), d.into.numel()
        unread = (name == "weights" and d.order is not None) or (name == "start" and d.along is not None)
        if name == "into" or t is None or unread or t.numel() <= 3 or not size:
            return None
        memory = torch.zeros(max(t.numel(), size) + 3)
        d.into = memory[3 : size + 3].view(d.into.shape)
        setattr(d, name, memory[: t.numel()].view(t.shape))
        return "into"

    def _order(self, d: Description, _: str) -> str | None:
        if d.order is None or d.chosen_weights is None:
            return None
        order, weights = d.order, d.chosen_weights
        ways: list[tuple[str, object]] = [
            ("order", None),
            ("weights", None),
            ("order", order.int()),
            ("order", order.double()),
            ("order", order.tolist()),
            ("order", order.flatten()),
            ("order", torch.cat([order, order, order.new_zeros(7, *order.shape[1:])])),
            ("order", torch.cat([order, order], 1)),
            ("order", order.to("meta")),
            ("weights", weights.double()),
            ("weights", weights.new_zeros(*weights.shape[:-1], weights.shape[-1] + 1)),
            ("weights", weights.flatten()),
        ]
        if order.numel():
            wrong = order.clone()
            wrong[-1, -1, -1] = self.choice([-1, d.inputs.shape[1], 2**62, -(2**63)])
            ways += [("order", wrong)] * 4
            ways += [("order", self._without_memory(order)), ("weights", self._without_memory(weights))]
        name, value = self.choice(ways)
        setattr(d, "order" if name == "order" else "chosen_weights", value)
        return "order, weights" if order.shape[0] == 0 or d.inputs.shape[1] == 0 else name

    def _number(self, d: Description, _: str) -> str:
        name = self.choice(["times", "scale", "step"] if d.along is None else ["scale", "step"])
        bad = [float("nan"), float("inf"), 1e300, "1", None]
        values = (
            [0, -1, 1.5, True, 2**70, "1"] if name == "times" else [*bad, [], [1.0] * (d.times + 1), [bad] * d.times]
        )
        setattr(d, name, self.choice(values))
        return name


class Watched:
    """The library, and which of its functions were called."""

    def __init__(self, library: ctypes.CDLL):
        self._library, self.called = library, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self._library, name)


def try_all(path: str, count: int, chance: Random, is_caught: Mapping[str, Callable[[], bool]]) -> dict[str, int]:
    """``count`` valid descriptions and some times as many invalid ones. Runs within the sanitizers."""
    watched = Watched(library.load(path))
    library.kernel = lambda: watched  # type: ignore[assignment]
    torch.set_printoptions(threshold=10, edgeitems=1)  # of the description that fails
    tried = {"caught": sum(caught() for caught in is_caught.values()), "valid": 0, "invalid": 0}
    for _ in range(count):
        torch.set_num_threads(1)  # the reference's products are small
        d = chance.description()
        for _ in range(MISTAKES_EACH):
            wrong, names = chance.mistake(d)
            watched.called.clear()
            try:
                wrong.compute()
            except ValueError as error:
                if str(error).partition("=")[0] not in names.split(", "):
                    raise RuntimeError(f"refused by another name than {names}: {wrong}") from error
            else:
                raise RuntimeError(f"not refused: {wrong}")
            if f"{chance.KERNEL}_{'gradient' if wrong.along is None else 'product'}" in watched.called:
                raise RuntimeError(f"refused after the kernel was called: {wrong}")
            tried["invalid"] += 1
        wanted = d.wanted()
        torch.set_num_threads(chance.choice([1, 2, 3]))
        d.compute()
        if not d.agrees(wanted):
            raise RuntimeError(f"off by {float((d.into - wanted).norm() / wanted.norm())}: {d}")
        tried["valid"] += 1
    return tried


def shorter(name: str) -> Callable[[RowGradient], None]:
    def change(gradient: RowGradient) -> None:
        gradient.data[name] = gradient.data[name][..., :-1].contiguous()

    return change


def fewer_parameters(gradient: RowGradient) -> None:
    gradient.parameters -= 5


def larger_blocks(gradient: RowGradient) -> None:
    phi = torch.zeros(1, gradient.parameters)
    gradient.add(phi, None, torch.zeros(2, gradient.parameters), 0.0, 1.0)  # takes memory
    gradient.at_once *= 2
    gradient.block *= 2
    gradient.examples *= 2
    gradient.data = {name: torch.cat([t, t], 1).contiguous() for name, t in gradient.data.items()}


def _another_length(gradient: fused.FusedGradient) -> None:
    gradient.layers[0].length_in += 1


def _wide_stride(gradient: fused.FusedGradient) -> None:
    gradient.layers[0].stride = 2**62


def _half_the_memory(gradient: fused.FusedGradient) -> None:
    phi = torch.zeros(1, gradient.parameters)
    gradient.add(phi, None, torch.zeros(2, gradient.parameters), 0.0, 1.0)
    gradient.parts = 2  # as if a Hessian product's were there


def _half_is_kept(gradient: fused.FusedGradient) -> None:
    kernel = gradient.kernel
    gradient.kernel = Mock(wraps=kernel)
    gradient.kernel.fused_kept = lambda *described: kernel.fused_kept(*described) // 2


def more_examples(gradient: RowGradient) -> None:
    gradient.examples += 1


BEHIND_THE_CHECKS: dict[str, Callable[[fused.FusedGradient], None]] = {
    "inputs": shorter("inputs"),
    "targets": shorter("targets"),
    "weights": shorter("weights"),
    "parameters": fewer_parameters,
    "block": larger_blocks,
    "length": _another_length,
    "stride": _wide_stride,
    "order": more_examples,
    "along": _half_the_memory,
    "kept": _half_is_kept,
}


def ends(name: str, mistake: Callable[[], None]) -> bool:
    """Whether the sanitizers end a process that makes this mistake. Raises RuntimeError if not."""
    with tempfile.TemporaryFile() as report:
        process = os.fork()
        if process == 0:
            os.dup2(report.fileno(), 2)
            torch.set_num_threads(1)
            mistake()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        report.seek(0)
        text = report.read().decode(errors="replace")
    if status == 0 or not ("AddressSanitizer" in text or "runtime error" in text):
        raise RuntimeError(f"the sanitizers do not see a mistake in {name}: {text[-2000:]}")
    return True


def _make(name: str) -> None:
    """The mistake of that name, and then a call."""
    shapes = {"w0": torch.Size((9, 3, 1)), "b0": torch.Size((9,)), "w1": torch.Size((5, 10, 9)), "b1": torch.Size((5,))}
    gradient = fused.FusedGradient(
        [Convolution("w0", "b0", 2, SILU), Dense("w1", "b1", None)],
        shapes,
        torch.randn(2, 20, 20, 1),
        torch.full((2, 20, 5), 0.2),
        torch.rand(2, 20),
    )
    BEHIND_THE_CHECKS[name](gradient)
    phi = torch.randn(2, gradient.parameters)
    if name in ("along", "kept"):
        gradient.linearize(phi, torch.zeros_like(phi)).add(torch.randn_like(phi), phi, 0.0, 1.0)
    else:
        call(gradient, phi, name)


def call(gradient: RowGradient, phi: Tensor, name: str) -> None:
    """Of batches, where the mistake is in their ``order``."""
    order = torch.full((2, 1, 20), gradient.examples - 1) if name == "order" else None
    weights = None if order is None else torch.rand(order.shape)
    gradient.add(phi, None, torch.zeros_like(phi), 0.0, 1.0, 1, order, weights)


def instruction_sets() -> list[str]:
    """Those of this processor that the kernel is compiled for."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    return [name for name, needed in NEEDED.items() if needed <= flags]


def runtime() -> list[str]:
    """The libraries that a process has to start with; none where there is no gcc, or not all of it."""
    if shutil.which("gcc") is None:
        return []
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so.6")
    ]  # the second: exceptions have to be known to the first
    paths = [str(Path(path.strip()).resolve()) for path in found if Path(path.strip()).is_absolute()]
    return paths if len(paths) == len(found) else []


def build(folder: Path) -> dict[str, Path]:
    """Compiles the kernel for every instruction set of this processor."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    libraries, compilers = {}, []
    for module in modules:
        name = module["name"].rpartition("_")[2]
        if name in instruction_sets():
            libraries[name] = folder / f"{name}.so"
            flags = [flag for flag in module["extra-compile-args"] if not flag.startswith("-O")]
            compilers.append(
                subprocess.Popen(
                    ["gcc", *FLAGS, *flags, *(ROOT / s for s in module["sources"]), "-lm", "-o", libraries[name]]
                )
            )
    if sum(compiler.wait() for compiler in compilers):
        raise RuntimeError("gcc cannot compile the kernel with sanitizers")
    return libraries


def main(chance: type[Random], is_caught: Mapping[str, Callable[[], bool]]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--count", type=int, default=300, help="valid descriptions, for each kernel and instruction set"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        torch.manual_seed(arguments.seed)
        print(json.dumps(try_all(arguments.library, arguments.count, chance(arguments.seed), is_caught)))
        return
    preload, sets = runtime(), instruction_sets()
    if not preload or not sets:
        sys.exit("error: takes gcc with libasan, and an x86-64 processor with AVX2 or an ARM of 64 bits")
    environment = os.environ | {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    total: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for script, (name, library) in itertools.product(SCRIPTS, build(Path(folder)).items()):
            done = subprocess.run(
                [
                    sys.executable,
                    Path(__file__).with_name(script),
                    "--library",
                    library,
                    "--count",
                    str(arguments.count),
                    "--seed",
                    str(arguments.seed),
                ],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{done.stdout}{done.stderr}\nerror: {script}: the kernel for {name} failed")
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                total[key] = total.get(key, 0) + value
    print(
        f"sanitized kernels ({' and '.join(sets)}): {total['valid']} valid descriptions give autograd's derivatives, "
        f"{total['invalid']} invalid ones are refused, {total['caught']} mistakes behind the checks are caught"
    )


if __name__ == "__main__":
    main(Random, {name: partial(ends, name, partial(_make, name)) for name in BEHIND_THE_CHECKS})
