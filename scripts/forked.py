"""train.py started many times: each start is a fork of one process that has imported what takes seconds to import.

What is imported beforehand is other people's; this project's own modules are read anew by every start.
"""

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

TRAIN = Path(__file__).parents[1] / "train.py"
POSSIBLE = sys.platform == "linux"  # elsewhere a process that has loaded PyTorch may not fork, or no process may
IMPORTED = (
    "torch._dynamo",
    "torch.optim",
    "hydra._internal.hydra",
    "hydra._internal.core_plugins.basic_launcher",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "mnist1d",
    "wandb",
    "wandb.sdk.wandb_run",
)


class Forks:
    """A context, in which one run at a time is started."""

    def __enter__(self) -> "Forks":
        self.server = subprocess.Popen(
            [sys.executable, __file__], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self.server.stdin is None or self.server.stdout is None:
            raise RuntimeError("there are no pipes")
        self.calls, self.answers = self.server.stdin, self.server.stdout
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.communicate()

    def start(
        self,
        overrides: tuple[str, ...],
        folder: Path,
        out: str = os.devnull,
        err: str = os.devnull,
        environment: Mapping[str, str] = os.environ,
    ) -> int:
        """Starts ``train.py OVERRIDES`` in ``folder``, with its output into the files ``out`` and ``err``; its process
        number."""
        call = {
            "argv": [str(TRAIN), *overrides],
            "folder": str(folder),
            "files": [os.devnull, out, err],
            "environment": dict(environment),
        }
        self.calls.write(json.dumps(call).encode() + b"\n")
        if not (answer := self.answers.readline()):
            raise RuntimeError("the process that is forked has ended: what it takes cannot be imported, see its error")
        return int(answer)

    def ended(self) -> bool:
        """Whether what was started last has ended; its number may then be another process's."""
        return bool(select.select([self.answers], [], [], 0)[0])

    def wait(self) -> int:
        """The exit status of what was started last, as ``subprocess`` gives it."""
        return int(self.answers.readline())


def serve() -> None:
    """Answers each call with the number of its process and, once that has ended, with its exit status."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # so that a fork neither copies all of it nor takes it apart when it ends
    for line in sys.stdin:
        if not (process := os.fork()):
            return become(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


def become(call: dict[str, Any]) -> None:
    """The run, in the process that is to be it."""
    os.environ.clear()
    os.environ.update(call["environment"])
    os.chdir(call["folder"])
    for number, path in enumerate(call["files"]):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    given = filter(None, call["environment"].get("PYTHONPATH", "").split(os.pathsep))
    sys.argv, sys.path[:1] = call["argv"], [str(TRAIN.parent), *given]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    serve()
