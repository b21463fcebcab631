"""Meta-gradients by JAX, on the same network and tasks, as a user of it would write them: compiled (jit), vmap or map
over tasks, scan over inner steps.

Run by itself this file is a process that computes what its parent asks for. It has processors of its own, because JAX
takes as many threads as there are when it starts, and it can be stopped, because what is compiled cannot. What the two
say to each other are plain numbers and numpy arrays; the parent needs no JAX.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

METHODS = {"jax_maml": "maml", "jax_symmetric": "symmetric"}
HOW = tuple(f"{convolution}, {over}" for convolution, over in product(("windows", "own"), ("map", "vmap")))
"""Convolutions as products of windows, or XLA's own; tasks one by one, or all at once."""
COMPILE_SECONDS = 300.0

Arrays = Sequence[np.ndarray]
Layers = Sequence[tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Work:
    """One meta-gradient: ``method`` maml or symmetric, ``how`` of HOW, the network's ``layers`` (weights
    [window, channels in, channels out] and biases; the last dense, its window the whole signal) with their ``strides``,
    and the ``tasks``: support and query inputs and labels."""

    method: str
    how: str
    steps: int
    lr: float
    lam: float
    nu: float
    strides: Sequence[int]
    layers: Sequence[tuple[np.ndarray, np.ndarray]]
    tasks: Arrays


def missing() -> bool:
    return importlib.util.find_spec("jax") is None


class TooLong(Exception):
    """A call took longer than it was given."""


class Failed(Exception):
    """The process could not do it; the text says why."""


@dataclass
class Worker:
    """A process of JAX with so many ``threads``, in float64 if it is ``double``; it starts when it is needed."""

    threads: int
    double: bool = False
    process: subprocess.Popen[bytes] | None = None
    prepared: dict[Work, dict[str, float]] = field(default_factory=dict)
    connection: Connection | None = None

    def prepare(self, work: Work) -> dict[str, float]:
        """Compiles it, unless it is: ``compile_seconds`` and ``bytes``, what XLA sets aside for it. Raises TooLong."""
        if work not in self.prepared:
            self.prepared[work] = self._ask("prepare", (id(work), vars(work)), COMPILE_SECONDS)
        return self.prepared[work]

    def run(self, work: Work, limit: float | None = None) -> None:
        """Computes what was prepared. Raises TooLong where it takes more seconds than ``limit``; the process is stopped
        then, and knows nothing any more."""
        self._ask("run", id(work), limit)

    def gradient(self, work: Work) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the last run of it found: of weights and biases, laid out as they are."""
        return self._ask("gradient", id(work), None)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None
        self.prepared.clear()

    def _ask(self, what: str, about: object, limit: float | None) -> Any:
        if self.connection is None:
            self.connection, theirs = Pipe()
            number = theirs.fileno()
            command = [sys.executable, __file__, str(number), str(self.threads)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(int(self.double))}
            self.process = subprocess.Popen(command, pass_fds=[number], env=environment)
            theirs.close()
        try:
            self.connection.send((what, about))
            if not self.connection.poll(limit):
                self.stop()
                raise TooLong(f"more than {limit:.0f} s")
            done, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise Failed("the process of JAX has ended") from error
        if not done:
            raise Failed(answer)
        return answer


def compute(work: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """The function of layers and tasks that JAX compiles: the mean meta-gradient."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    convolution, over = work["how"].split(", ")
    strides, steps, lr, lam, nu = (work[name] for name in ("strides", "steps", "lr", "lam", "nu"))

    def convolve(h: Any, weights: Any, stride: int) -> Any:
        """[N, length, channels in] -> [N, length, channels out], padded by one place on both sides."""
        if convolution == "own":
            layout = ("NHC", "HIO", "NHC")
            return lax.conv_general_dilated(h, weights, (stride,), [(1, 1)], dimension_numbers=layout)
        h = jnp.pad(h, ((0, 0), (1, 1), (0, 0)))
        size, count = len(weights), (h.shape[1] - len(weights)) // stride + 1
        windows = [h[:, k : k + stride * (count - 1) + 1 : stride] for k in range(size)]
        return jnp.einsum("nlkc,kco->nlo", jnp.stack(windows, axis=2), weights)

    def losses(layers: Layers, x: Any, y: Any) -> Any:
        h = x[:, :, None]
        for (weights, bias), stride in zip(layers[:-1], strides, strict=True):
            h = jax.nn.silu(convolve(h, weights, stride) + bias)
        weights, bias = layers[-1]
        logits = h.reshape(len(x), -1) @ weights.reshape(-1, len(bias)) + bias
        return jax.nn.logsumexp(logits, axis=-1) - (jax.nn.one_hot(y, len(bias)) * logits).sum(-1)

    def descend(theta: Any, slope: Callable[[Any], Any]) -> Any:
        def step(phi: Any, _: None) -> tuple[Any, None]:
            return jax.tree.map(lambda p, g: p - lr * g, phi, slope(phi)), None

        return lax.scan(step, theta, None, length=steps)[0]

    def of_each_task(gradient: Callable[[Any], Any], tasks: Any) -> Any:
        return jax.vmap(gradient)(tasks) if over == "vmap" else lax.map(gradient, tasks)

    def mean(gradients: Any) -> Any:
        return jax.tree.map(lambda g: g.mean(0), gradients)

    def maml(theta: Any, tasks: Any) -> Any:
        def of_task(task: Any) -> Any:
            x, y, query_x, query_y = task

            def after(start: Any) -> Any:
                phi = descend(start, jax.grad(lambda phi: losses(phi, x, y).mean()))
                return losses(phi, query_x, query_y).mean()

            return jax.grad(after)(theta)

        return mean(of_each_task(of_task, tasks))

    def symmetric(theta: Any, tasks: Any) -> Any:
        def of_row(row: Any) -> Any:
            (x, y, query_x, query_y), offset = row
            every_x, every_y = jnp.concatenate([x, query_x]), jnp.concatenate([y, query_y])
            weights = jnp.concatenate(
                [jnp.full(len(x), 1 / len(x), x.dtype), jnp.full(len(query_x), offset / len(query_x))]
            )
            slope = jax.grad(lambda phi: weights @ losses(phi, every_x, every_y))
            phi = descend(theta, lambda phi: jax.tree.map(lambda g, p, t: g + lam * (p - t), slope(phi), phi, theta))
            return jax.tree.map(lambda p: -lam / (2 * offset) * p, phi)

        count = len(tasks[0])
        offsets = jnp.repeat(jnp.array([nu, -nu], tasks[0].dtype), count)
        rows = [jnp.concatenate([part, part]) for part in tasks]
        both = of_each_task(of_row, (rows, offsets))
        return jax.tree.map(lambda g: g.sum(0) / count, both)

    return {"maml": maml, "symmetric": symmetric}[work["method"]]


def serve(connection: Connection) -> None:
    """Does what the parent asks for, until it is gone."""
    import jax

    known: dict[int, tuple[Any, Any]] = {}
    found: dict[int, Any] = {}

    def prepare(about: tuple[int, Mapping[str, Any]]) -> dict[str, float]:
        number, work = about
        given = jax.device_put((list(work["layers"]), list(work["tasks"])))
        started = time.perf_counter()
        compiled = jax.jit(compute(work)).lower(*given).compile()
        spent = time.perf_counter() - started
        known[number] = compiled, given
        memory = compiled.memory_analysis()
        return {"compile_seconds": round(spent, 2), "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes}

    def run(number: int) -> None:
        compiled, given = known[number]
        found[number] = jax.block_until_ready(compiled(*given))

    def gradient(number: int) -> Any:
        return jax.tree.map(np.asarray, found[number])

    does: dict[str, Callable[[Any], Any]] = {"prepare": prepare, "run": run, "gradient": gradient}
    while True:
        try:
            what, about = connection.recv()
        except EOFError:
            return
        try:
            answer = True, does[what](about)
        except Exception as error:  # it is the parent's to say
            answer = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        connection.send(answer)


def main() -> None:
    number, threads = map(int, sys.argv[1:])
    if hasattr(os, "sched_setaffinity"):  # what JAX counts when it starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    serve(Connection(number))


if __name__ == "__main__":
    main()
