"""Builds the CPU library (plugins/cpu) into the package sinkrt where there is a C++ compiler. All else: pyproject.toml.

SINKEXPORT_BUILD_CPU says what happens where it cannot be built:
  auto      the package is installed without it, and one line says why (the default; pip shows it with -v)
  required  the build fails with that line
  no        it is not tried; an editable install keeps the one that it has
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

NAME = "build_cpu_library"
SOURCE = Path("plugins/cpu")
TARGET = "sinkexport_cpu"
LIBRARY = "libsinkexport_cpu.so"
"""CPU_LIBRARY of sinkrt.contract: its name on every platform."""

VARIABLE = "SINKEXPORT_BUILD_CPU"
CHOICES = ("auto", "required", "no")
CMAKE_READS = ("CXX", "CXXFLAGS", "LDFLAGS")
COMPILERS = ("c++", "g++", "clang++")


class BuildCpuLibrary(Command):
    """Compile plugins/cpu: into the wheel's tree, or beside the sources of an editable install."""

    description = "build the CPU library"
    user_options = ()

    def initialize_options(self) -> None:
        self.editable_mode = False
        self.build_lib: str | None = None
        self.folder = Path()

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        # Kept: the next install compiles what has changed. CMake reads these once in a folder.
        chosen = zlib.crc32(repr([os.environ.get(name) for name in CMAKE_READS]).encode())
        self.folder = Path(self.get_finalized_command("build").build_base, f"cpu-library-{chosen:08x}")

    def run(self) -> None:
        choice = os.environ.get(VARIABLE) or CHOICES[0]
        if choice not in CHOICES:
            sys.exit(f"{VARIABLE}: received '{choice}', expected one of {', '.join(CHOICES)}")
        if choice == "no" and self.editable_mode:
            return
        self.target.unlink(missing_ok=True)  # an older one would be taken for this one
        if choice == "no":
            return
        if reason := self._problem() or self._compile():
            line = f"sinkexport is built without its CPU library: {reason}"
            if choice == "required":
                sys.exit(line)
            print(f"warning: {line}; bundles of --target onnx run all the same", file=sys.stderr)

    @property
    def target(self) -> Path:
        """Where the library goes, and is if it was built."""
        return (self._in_sources if self.editable_mode else self._in_wheel) / LIBRARY

    @property
    def _in_wheel(self) -> Path:
        return Path(str(self.build_lib), "sinkrt")

    @property
    def _in_sources(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("sinkrt"))

    def get_source_files(self) -> list[str]:
        """Files that belong into the sdist."""
        return sorted(map(str, [*SOURCE.rglob("CMakeLists.txt"), *SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h")]))

    def get_outputs(self) -> list[str]:
        return [str(self._in_wheel / LIBRARY)] if self.target.is_file() else []

    def get_output_mapping(self) -> dict[str, str]:
        """Output -> file in the sources, of an editable install."""
        return {name: str(self.target) for name in self.get_outputs()} if self.editable_mode else {}

    def _problem(self) -> str | None:
        """What is missing, or None."""
        if os.name != "posix":
            return f"{sys.platform} is not supported"
        if not (SOURCE / "CMakeLists.txt").is_file():
            return f"no sources in {SOURCE}"
        compiler = os.environ.get("CXX")
        if compiler is None and not any(map(shutil.which, COMPILERS)):
            return f"no C++ compiler ({', '.join(COMPILERS)}) on the PATH, and CXX is not set"
        return None if shutil.which("cmake") else "no cmake on the PATH"

    def _compile(self) -> str | None:
        """The first error, or None."""
        was_there = self.folder.exists()
        ninja = shutil.which("ninja")
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        options += ["-DCMAKE_BUILD_TYPE=Release", "-DSINKEXPORT_CPU_WARNINGS_ARE_ERRORS=OFF"]
        failed = _run("cmake", "-S", SOURCE, "-B", self.folder, *options)
        if failed and was_there:  # by another generator, or for a tree that has moved since
            shutil.rmtree(self.folder)
            failed = _run("cmake", "-S", SOURCE, "-B", self.folder, *options)
        parallel = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        failed = failed or _run("cmake", "--build", self.folder, "--target", TARGET, "--parallel", parallel)
        if failed:
            return failed
        self.target.parent.mkdir(parents=True, exist_ok=True)
        (built,) = self.folder.rglob(f"lib{TARGET}.*")
        shutil.copy(built, self.target)
        return None


def _run(*command: str | Path) -> str | None:
    """Run a command; return the first line of its output that names an error, or None where it ends well."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this file's commands
    except OSError as error:
        return str(error)
    print(done.stdout + done.stderr, end="")
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.search(r"\berror(:| at\b)", line, re.IGNORECASE)]
    # CMake's own say where on one line and what on the next.
    first = " ".join(lines[errors[0] : errors[0] + 1 + lines[errors[0]].endswith("):")]) if errors else "no message"
    return f"{command[0]} ended with {done.returncode} ({first})"


class Build(build):
    """The library is one more thing to build."""

    sub_commands = (*build.sub_commands, (NAME, None))


class PlatformWheel(bdist_wheel):
    """A wheel of this platform if the library is in it; for any version of Python in both cases."""

    def run(self) -> None:
        self.run_command(NAME)
        has_library = self.get_finalized_command(NAME).target.is_file()
        self.root_is_pure = not has_library
        self.distribution.has_ext_modules = lambda: has_library
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build": Build, NAME: BuildCpuLibrary, "bdist_wheel": PlatformWheel})
