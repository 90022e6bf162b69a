"""Builds the C++ runtime for the tests: configured, compiled, installed, and the tests' programs against that."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
from sinkrt.contract.constants import CPU_LIBRARY_VARIABLE

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "runtime/cpp"
EMBEDDING = ROOT / "docs/embedding.md"
ENVIRONMENT = "SINKRT_ONNXRUNTIME"


@dataclasses.dataclass(frozen=True)
class CppRuntime:
    """Where things are. install: of libsinkrt. programs: what tests/cpp/CMakeLists.txt builds. fuzzers: those."""

    install: Path
    programs: Path
    fuzzers: Path

    def run(self, program: Path, *arguments: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:  # noqa: A002
        """A program, with ONNX Runtime found, and the CPU library where tests have one."""
        found = {name: os.environ[name] for name in (CPU_LIBRARY_VARIABLE,) if name in os.environ}
        return _run([str(program), *map(str, arguments)], {ENVIRONMENT: str(onnxruntime_library()), **found}, input)

    def fuzz(self, name: str, bundle: Path, runs: int, corpus: list[Path]) -> subprocess.CompletedProcess[str]:
        """A fuzzer, `runs` times. bundle: whose states it reads, if it reads states."""
        command = [str(self.fuzzers / f"fuzz_{name}"), str(runs), "1", *map(str, corpus)]
        return _run(command, {"SINKRT_FUZZ_BUNDLE": str(bundle)})

    @property
    def generate(self) -> Path:
        return self.install / "bin/sinkrt_generate"


def onnxruntime_library() -> Path:
    """The library that comes with the Python package."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    return library


def build_cpp(folder: Path, *, sanitize: bool) -> CppRuntime:
    """Warnings are errors. sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, and the fuzzers."""
    if shutil.which("cmake") is None:
        pytest.fail("no cmake on the PATH: pip install cmake")
    install, library, programs = folder / "install", folder / "library", folder / "programs"
    # Quick to compile: line numbers are all that a report needs, and tiny bundles need little speed.
    flags = "-O0 -g1 -Werror" if sanitize else "-O1 -Werror"
    switch = "ON" if sanitize else "OFF"
    _cmake(
        "-S",
        SOURCES,
        "-B",
        library,
        f"-DCMAKE_INSTALL_PREFIX={install}",
        "-DCMAKE_INSTALL_LIBDIR=lib",
        f"-DSINKRT_SANITIZE={switch}",
        f"-DSINKRT_BUILD_FUZZERS={switch}",
        "-DCMAKE_INSTALL_RPATH=$ORIGIN/../lib",
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_BUILD_TYPE=None",
    )
    _cmake("--build", library, "--parallel", "2")
    _cmake("--install", library)
    snippet = folder / "snippet.cpp"
    snippet.write_text(embedding_snippet(), encoding="utf-8")
    _cmake(
        "-S",
        Path(__file__).parent,
        "-B",
        programs,
        f"-DCMAKE_PREFIX_PATH={install}",
        f"-DSNIPPET={snippet}",
        "-DCMAKE_CXX_FLAGS=-O0",
    )
    # The other programs are not for sanitizers: one counts allocations, one is loaded into Python.
    targets = ("c_api", "faults") if sanitize else ("all",)
    _cmake("--build", programs, "--parallel", "2", "--target", *targets)
    return CppRuntime(install, programs, library / "fuzz")


def embedding_snippet() -> str:
    """The C++ program in docs/embedding.md."""
    _, _, rest = EMBEDDING.read_text(encoding="utf-8").partition("```cpp\n")
    program, _, _ = rest.partition("```")
    return program


def _run(command: list[str], environment: dict[str, str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        input=text,
        env={"PATH": os.environ["PATH"], **environment},
    )


def _cmake(*arguments: str | Path) -> None:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
