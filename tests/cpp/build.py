"""Builds the C++ runtime for the tests: configured, compiled, installed, and the tests' programs against that."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

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

    def run(self, program: Path | str, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """A program and its exit code, with ONNX Runtime found."""
        return subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300,
            env={ENVIRONMENT: str(onnxruntime_library()), "PATH": "/usr/bin:/bin"}, **options,
        )  # type: ignore[call-overload, no-any-return]  # fmt: skip

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
    flags = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1 -Werror"] if sanitize else ["-DCMAKE_CXX_FLAGS=-Werror"]
    switch = "ON" if sanitize else "OFF"
    _cmake("-S", SOURCES, "-B", library, f"-DCMAKE_INSTALL_PREFIX={install}", "-DCMAKE_INSTALL_LIBDIR=lib",
           f"-DSINKRT_SANITIZE={switch}", f"-DSINKRT_BUILD_FUZZERS={switch}",
           "-DCMAKE_INSTALL_RPATH=$ORIGIN/../lib", *flags)  # fmt: skip
    _cmake("--build", library, "--parallel", "2")
    _cmake("--install", library)
    snippet = folder / "snippet.cpp"
    snippet.write_text(embedding_snippet(), encoding="utf-8")
    _cmake("-S", Path(__file__).parent, "-B", programs, f"-DCMAKE_PREFIX_PATH={install}", f"-DSNIPPET={snippet}")
    _cmake("--build", programs, "--parallel", "2")
    return CppRuntime(install, programs, library / "fuzz")


def embedding_snippet() -> str:
    """The C++ program in docs/embedding.md."""
    _, _, rest = EMBEDDING.read_text(encoding="utf-8").partition("```cpp\n")
    program, _, _ = rest.partition("```")
    return program


def _cmake(*arguments: str | Path) -> None:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
