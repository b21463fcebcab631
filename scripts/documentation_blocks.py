"""The code blocks of a page, run from top to bottom in one folder that is empty at the start.

``python`` blocks share a namespace, ``sh`` blocks are bash's, ``console`` blocks are only shown. A block whose first
line is a comment with the name of a file becomes that file.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```(python|sh|yaml(?=\n# [\w/]+\.yaml\n))\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")
STAMP = re.compile(r"^\[\d{4}-[^]]*\]\[\w+\]\[INFO\] - ", re.MULTILINE)
"""What the program's log puts before a line."""


class BlockFailed(RuntimeError):
    """A block of a page ended with an error; the text is the error and the block."""


def one_thread() -> None:
    """For torch in this process, which has not imported it yet, and in those that a page starts."""
    os.environ["OMP_NUM_THREADS"] = "1"


def executed(text: str) -> str:
    """A page with the output of each block below it, without times and the folder's name. Raises BlockFailed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = (STAMP.sub("", output).replace(f"{folder}/", "") for output in run_blocks(text, Path(folder)))
        return BLOCK.sub(lambda block: block[0] + _shown(next(outputs)), text)


def _shown(output: str) -> str:
    return f"\n`````{{code-block}} text\n:class: output\n\n{output.rstrip()}\n`````\n" if output.strip() else ""


def run_blocks(text: str, folder: Path) -> Iterator[str]:
    """Runs a page's blocks in ``folder``, and yields what each printed. Raises BlockFailed."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    imported = {*sys.modules}
    try:
        for block in BLOCK.finditer(text):
            language, code = block.groups()
            if file := FILE.match(code):
                path = folder / file[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(code, encoding="utf-8")
                yield ""
            else:
                yield _run_shell(code, folder) if language == "sh" else _run_python(code, namespace, folder)
    finally:
        for name in {*sys.modules} - imported:  # another page may have a file of the same name
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}{os.sep}"):
                del sys.modules[name]


def _run_python(code: str, namespace: dict[str, Any], folder: Path) -> str:
    printed = io.StringIO()
    sys.path.insert(0, str(folder))  # for the files that the page makes
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(compile(code, "<block>", "exec"), namespace)
    except Exception as error:
        raise BlockFailed(f"{type(error).__name__}: {error}\n{code}") from error
    finally:
        sys.path.remove(str(folder))
    return printed.getvalue()


def _run_shell(code: str, folder: Path) -> str:
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)])),
        "WANDB_MODE": "disabled",
    }
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    if done.returncode:
        raise BlockFailed(f"exit status {done.returncode}\n{code}\n{done.stdout}\n{done.stderr}")
    return done.stdout
