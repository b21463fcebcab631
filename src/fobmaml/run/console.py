"""Standard streams that outlast whoever reads them and take any character."""

import codecs
import io
import os
import sys
from typing import Any

PLAIN = {
    "±": "+-",
    "λ": "lambda",
    "ν": "nu",
    "δ": "delta",
    "θ": "theta",
    "φ": "phi",
    "∇": "grad ",
    "–": "-",
    "−": "-",
    "‖": "|",
    "⁶": "^6",
    "²": "^2",
    "…": "...",
}
"""For what an encoding does not have; of other characters it prints a question mark."""


class _Lasting(io.FileIO):
    """A file whose reader may have gone: what it does not take is dropped, and the work goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError:
            return memoryview(data).nbytes


def make_lasting() -> None:
    """Prepares standard output and error of this process; a second time it does nothing."""
    codecs.register_error("plain", _plain)
    _open_what_is_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:
            stream.flush()
            file: Any = _Lasting(stream.fileno(), "w", closefd=False)
            if hasattr(stream.buffer, "raw"):  # it has none with PYTHONUNBUFFERED
                file = io.BufferedWriter(file)
            setattr(
                sys,
                name,
                io.TextIOWrapper(
                    file,
                    stream.encoding,
                    "plain",
                    line_buffering=stream.line_buffering,
                    write_through=stream.write_through,
                ),
            )


def _open_what_is_closed() -> None:
    """A file opened later does not get the number of a closed standard stream, to which libraries may write."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end
