"""The command line around Hydra: what ``train.job`` does, with every expected end told in one line; and beside it what
``commands`` does."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser

from fobmaml import distributed
from fobmaml.run import commands, folders, sweeps
from fobmaml.run.console import make_lasting
from fobmaml.run.errors import EXPECTED, ConfigError, one_line
from fobmaml.run.train import job


def main(configs: Path | None = None) -> None:
    """``configs``: the folder of the settings, by default the package's. The arguments are ``sys.argv``'s."""
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it logs is raised, too
    logging.raiseExceptions = False  # a log that cannot be written does not fill the screen
    command, given = sys.argv[1:2], sys.argv[2:]
    if command == ["evaluate"]:
        sys.argv[1:] = commands.evaluation(given)
    if command == ["runs"]:
        commands.runs(given)
    elif distributed.rank() == 0:
        start(configs or own_configs())
    else:  # only the first process of a run writes and speaks
        logging.disable()
        with tempfile.TemporaryDirectory() as folder:
            sys.argv += [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
            start(configs or own_configs())


def own_configs() -> Path:
    """The package's, or in a checkout those at its top."""
    packaged = Path(__file__).parents[1] / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "configs"


def start(configs: Path) -> None:
    """``begin``, with each of its ends told."""
    make_lasting()
    with errors_raised() as traced:
        try:
            begin(configs)
        except SystemExit as end:  # of a job
            if traced and end.__cause__:
                raise end.__cause__ from None
            raise
        except EXPECTED as error:
            if traced:
                raise
            if not sweeps.failures():
                sweeps.undo()
                sys.exit(f"error: {one_line(error)}" if distributed.rank() == 0 else 1)
        except OSError as error:  # Hydra's own files, before a run begins
            if traced or error.errno is None:
                raise
            sys.exit(f"error: {error.filename or 'the output folder'}: cannot be written ({error.strerror})")
        except KeyboardInterrupt as error:
            print(f"\n{str(error) or 'stopped; the same command continues'}", file=sys.stderr)
            sys.exit(130)
        finally:
            folders.remove_empty()
    if listed := sweeps.results():
        print(f"\n{listed}\n", flush=True)
    if failed := sweeps.failures():
        jobs = "\n".join(f"  {failure['job']}: {failure['reason']}" for failure in failed)
        sys.exit(f"error: {len(failed)} of the jobs failed; the same command runs them again:\n{jobs}")


def begin(configs: Path) -> None:
    """Hands over to Hydra."""
    sweeps.Failures.listed = None
    os.environ["FOBMAML_SWEEP"] = sweeps.name_of(sys.argv[1:])
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv):
        if distributed.size() > 1:
            raise ConfigError("--multirun: takes one process, and torchrun started this one with others")
        if any(argument.startswith("hydra/launcher=") for argument in sys.argv):
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # jobs side by side do not fight for cores
    given = get_args_parser().parse_known_args(sys.argv[1:])[0].config_path
    if given and "://" not in given:  # Hydra looks beside the file of ``job``; people, beside that of the program
        sys.argv.append(f"--config-path={configs.parent / given}")
    hydra.main(version_base="1.3", config_path=str(configs), config_name="train")(job)()


@contextmanager
def errors_raised() -> Iterator[bool]:
    """Inside, Hydra raises errors instead of printing them. Yields whether the user has asked for tracebacks."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield before == "1"
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
