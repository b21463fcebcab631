"""Puts the settings, which stand at the top of the repository, into the package that is built, and compiles the kernel
for this machine."""

import copy
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

X86, ARM = ("avx512", "avx2"), ("neon",)
INSTRUCTIONS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
"""What processors of a machine may have; ``fobmaml.engine.library`` takes one."""


class WithConfigs(build_py):
    """An editable installation finds them where they are (``fobmaml.run.program.own_configs``)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            packaged = Path(self.build_lib, "fobmaml", "configs")
            shutil.rmtree(packaged, ignore_errors=True)
            shutil.copytree("configs", packaged)


class ForThisMachine(build_ext):
    """Threads are OpenMP's where the compiler has it (gcc; clang with libomp), and POSIX threads elsewhere, as on macOS
    always: torch brings an OpenMP of its own there, and a process takes one only."""

    def finalize_options(self) -> None:
        super().finalize_options()
        known = INSTRUCTIONS.get(platform.machine(), ())
        self.extensions = [module for module in self.extensions or [] if module.name.rpartition("_")[2] in known]
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        alone = copy.copy(self)
        alone.build_temp = str(Path(self.build_temp, ext.name))  # they are of the same sources, and built side by side
        if sys.platform != "darwin":
            try:
                return build_ext.build_extension(alone, ext)
            except (CompileError, LinkError):
                self.warn(f"{ext.name} cannot be compiled with OpenMP")
        for flags in (ext.extra_compile_args, ext.extra_link_args):
            flags[:] = ["-pthread" if flag == "-fopenmp" else flag for flag in flags]
        return build_ext.build_extension(alone, ext)


setup(cmdclass={"build_py": WithConfigs, "build_ext": ForThisMachine})
