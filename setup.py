"""Build the CPU library (plugins/cpu) into the package where there are CMake and a C++ compiler.

Everything else is in pyproject.toml. Without them, or where the build fails, the package is pure Python: bundles for
target cpu are refused then, and all others run. Editable installs do not build it: CONTRIBUTING.md says how.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).parent / "plugins/cpu"
LIBRARY = "libsinkexport_cpu.so"
"""Its name in sinkrt.contract.constants, which cannot be imported before there is a package."""


class BuildWithLibrary(build_py):
    """Modules and packages, and the library beside sinkrt's."""

    def run(self) -> None:
        """Build the library after the modules; a build that fails is reported, and no error."""
        super().run()
        if self.editable_mode or not (SOURCE / "CMakeLists.txt").is_file():
            return
        if (cmake := shutil.which("cmake")) is None:
            self.warn("no CMake: built without the CPU library")
            return
        try:
            self._build(cmake)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"built without the CPU library: {error}")

    def _build(self, cmake: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
            for arguments in (
                ["-S", str(SOURCE), "-B", folder, "-DCMAKE_BUILD_TYPE=Release"],
                ["--build", folder, "--target", "sinkexport_cpu", "--parallel", jobs],
            ):
                subprocess.run([cmake, *arguments], check=True)
            shutil.copy(Path(folder, "ort", LIBRARY), Path(self.build_lib, "sinkrt", LIBRARY))


class WheelOfPlatform(bdist_wheel):
    """A wheel for this platform and any Python if it has the library, else for all platforms."""

    def run(self) -> None:
        """Build first: the wheel's kind depends on what came of it."""
        self.run_command("build")
        built = self.get_finalized_command("build_py").build_lib
        self.root_is_pure = not Path(built, "sinkrt", LIBRARY).is_file()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of the wheel."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelOfPlatform})
