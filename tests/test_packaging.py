"""What an install brings: the CPU library where it compiles, and everything else without it where it does not.

The library here is a stand-in that compiles in a second: tests/runtime/test_without_torch.py installs the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from sinkrt.contract.constants import CPU_ABI, CPU_LIBRARY

REPOSITORY = Path(__file__).parents[1]
CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(stand_in LANGUAGES CXX)
add_library(sinkexport_cpu SHARED library.cpp)
"""
SOURCE = """
extern "C" const char* sinkexport_cpu_abi() { return "ABI"; }
extern "C" const char* sinkexport_cpu_problem() { return nullptr; }
extern "C" const char* sinkexport_cpu_isa() { return "avx512_bf16"; }
extern "C" void* RegisterCustomOps() { return nullptr; }
"""
LIBRARY = f"sinkrt/{CPU_LIBRARY}"
PLAIN = "sinkexport-0.1.0-py3-none-any.whl"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or shutil.which("cmake") is None,
    reason="needs CMake and a C++ compiler",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The sources, with a library that compiles in a second."""
    folder = tmp_path / "source"
    for name in ("exporter", "runtime"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "cpp")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    plugin = folder / "plugins/cpu"
    plugin.mkdir(parents=True)
    (plugin / "CMakeLists.txt").write_text(CMAKE, encoding="utf-8")
    (plugin / "library.cpp").write_text(SOURCE.replace("ABI", CPU_ABI), encoding="utf-8")
    return folder


def hook(source: Path, name: str, out: Path, code: int = 0, **changed: str) -> str:
    """Call setuptools as pip does after it has made an environment to build in; returns what it printed to stderr."""
    out.mkdir(exist_ok=True)
    script = f"import sys; from setuptools import build_meta; build_meta.{name}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        cwd=source,
        env=_environment() | changed,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


def build_wheel(source: Path, code: int = 0, **changed: str) -> tuple[Path, list[str]]:
    """A wheel made from the sources, and what the build said about the library."""
    out = source.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    said = hook(source, "build_wheel", out, code, **changed)
    (wheel,) = out.glob("*.whl") if code == 0 else [out]
    return wheel, [line for line in said.splitlines() if "CPU library" in line or "SINKEXPORT_BUILD_CPU" in line]


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command of what lies in a folder, from another one."""
    environment = _environment() | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "sinkexport.cli", *arguments]
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=60)


def auto_target(folder: Path) -> str:
    """What ``--target auto`` takes there, and why."""
    script = "from sinkexport.auto_target import auto_target as a; print(a('fp32').target.name, a('fp32').reason)"
    environment = _environment() | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment() -> Mapping[str, str]:
    """This one, without what says where the sources or a library are."""
    ours = ("PYTHONPATH", "CXX", "SINKEXPORT_BUILD_CPU", "SINKEXPORT_CPU_LIBRARY", "SINKEXPORT_CPU_ISA")
    return {key: value for key, value in os.environ.items() if key not in ours}


@needs_compiler
def test_a_wheel_of_this_platform_has_the_library(source: Path, tmp_path: Path) -> None:
    wheel, said = build_wheel(source, SINKEXPORT_BUILD_CPU="required")
    assert not said
    assert wheel.name.startswith("sinkexport-0.1.0-py3-none-") and wheel.name != PLAIN
    assert {LIBRARY, "sinkrt/py.typed", "sinkexport/py.typed", "sinkexport/recipes/int8-weights.yaml"} <= names(wheel)
    assert not [name for name in names(wheel) if ".data/" in name]

    elsewhere = tmp_path / "elsewhere/installed"
    zipfile.ZipFile(wheel).extractall(elsewhere)
    done = run(elsewhere, "inspect", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "avx512_bf16" in done.stdout and str(elsewhere / LIBRARY) in done.stdout
    assert json.loads(run(elsewhere, "inspect", "cpu", "--json").stdout) == {
        "library": str(elsewhere / LIBRARY),
        "version": CPU_ABI,
        "isa": "avx512_bf16",
        "problem": None,
    }
    assert auto_target(elsewhere).startswith("cpu the CPU library runs here")


def test_without_a_compiler_it_is_a_plain_wheel(source: Path, tmp_path: Path) -> None:
    stale = source / "build/lib/sinkrt" / CPU_LIBRARY  # of a build when there was one
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    wheel, (said,) = build_wheel(source, PATH=str(empty))
    assert said.startswith("warning: sinkexport is built without its CPU library: no C++ compiler")
    assert wheel.name == PLAIN
    assert LIBRARY not in names(wheel) and "sinkexport/recipes/int8-weights.yaml" in names(wheel)

    elsewhere = tmp_path / "elsewhere/installed"
    zipfile.ZipFile(wheel).extractall(elsewhere)
    done = run(elsewhere, "inspect", "cpu")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert "install sinkexport where there is a C++ compiler" in done.stdout
    assert auto_target(elsewhere) == "onnx no CPU library here, see 'sinkexport inspect cpu'\n"
    assert run(elsewhere, "--version").returncode == 0


@needs_compiler
def test_an_error_of_the_compiler_is_one_line(source: Path) -> None:
    with (source / "plugins/cpu/library.cpp").open("a", encoding="utf-8") as file:
        file.write("#error not for this compiler\n")
    wheel, (said,) = build_wheel(source)
    assert "not for this compiler" in said
    assert wheel.name == PLAIN
    _, (said,) = build_wheel(source, code=1, SINKEXPORT_BUILD_CPU="required")
    assert "not for this compiler" in said and "run all the same" not in said


def test_a_choice_that_there_is_not(source: Path) -> None:
    _, (said,) = build_wheel(source, code=1, SINKEXPORT_BUILD_CPU="perhaps")
    assert said == "SINKEXPORT_BUILD_CPU: received 'perhaps', expected one of auto, required, no"


@needs_compiler
def test_sources_that_have_moved(source: Path) -> None:
    """CMake refuses what it made in another folder: that is made anew."""
    assert build_wheel(source, SINKEXPORT_BUILD_CPU="required")[0].name != PLAIN
    moved = source.rename(source.with_name("moved"))
    assert build_wheel(moved, SINKEXPORT_BUILD_CPU="required")[0].name != PLAIN
    assert build_wheel(moved, SINKEXPORT_BUILD_CPU="no")[0].name == PLAIN


@needs_compiler
def test_an_editable_install_has_it_beside_the_sources(source: Path, tmp_path: Path) -> None:
    hook(source, "build_editable", tmp_path / "editable", SINKEXPORT_BUILD_CPU="required")
    assert (source / "runtime" / LIBRARY).is_file()
    hook(source, "build_editable", tmp_path / "editable", SINKEXPORT_BUILD_CPU="no")
    assert (source / "runtime" / LIBRARY).is_file()  # kept
    wheel, _ = build_wheel(source, SINKEXPORT_BUILD_CPU="no")
    assert LIBRARY not in names(wheel)  # what lies there is no part of a wheel


def test_the_sources_are_complete(source: Path, tmp_path: Path) -> None:
    hook(source, "build_sdist", tmp_path / "sdist")
    shutil.unpack_archive(next((tmp_path / "sdist").glob("*.tar.gz")), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in ("setup.py", "plugins/cpu/library.cpp", "plugins/cpu/CMakeLists.txt"):
        assert (unpacked / name).is_file()
    assert (unpacked / "exporter/sinkexport/recipes/int8-weights.yaml").is_file()
