"""The program: what ``python train.py`` and the command ``fobmaml`` do."""

import sys
from pathlib import Path


def main(configs: Path | None = None) -> None:
    """Runs the command line, the arguments of ``sys.argv``. ``configs``: the folder of the settings, by default the
    package's. Ends by SystemExit where something is wrong."""
    try:
        from fobmaml.run import program
    except ModuleNotFoundError as error:
        if (error.name or "fobmaml").startswith("fobmaml"):
            raise
        sys.exit(f"error: {error.name} is not installed: pip install 'fobmaml[run]'")
    program.main(configs)
