"""What a run says: on streams that outlast whoever reads them and take any character, errors in one line."""

import codecs
import io
import os
import re
import sys
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

PLAIN = {"±": "+-", "λ": "lambda", "ν": "nu", "δ": "delta", "θ": "theta", "φ": "phi", "∇": "grad ", "–": "-", "−": "-",
         "‖": "|", "⁶": "^6", "²": "^2", "…": "..."}
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
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "plain", line_buffering=stream.line_buffering,
                                                write_through=stream.write_through))


def one_line(error: BaseException) -> str:
    """What was wrong, as one line with the cause."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: takes one of {', '.join(error.options)}"
    text, _, looked_in = str(error).partition("Config search path:")
    lines = [line.strip() for line in text.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
             .splitlines() if line.strip() and "://hydra.cc" not in line
             and not line.strip().startswith(("object_type=", "reference_type="))]
    unknown = re.match("Could not override '(.+)'", text)
    if isinstance(error, OverrideParseException) and error.override:
        lines.insert(0, error.override)
    if unknown:
        return f"{unknown[1]}: there is no such setting (python train.py --help lists them)"
    if places := re.findall("path=file://(.+)", looked_in):
        lines.append(f"looked in {', '.join(places)}")
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if reason not in text:
            lines.append(reason)
    return "; ".join(line.removesuffix(".").removesuffix(":") for line in lines)


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
