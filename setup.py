"""Puts the settings, which stand at the top of the repository, into the package that is built."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    """An editable installation finds them where they are (``fobmaml.run.program.own_configs``)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            packaged = Path(self.build_lib, "fobmaml", "configs")
            shutil.rmtree(packaged, ignore_errors=True)
            shutil.copytree("configs", packaged)


setup(cmdclass={"build_py": WithConfigs})
