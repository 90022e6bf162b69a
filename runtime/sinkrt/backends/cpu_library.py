"""This project's kernels for ONNX Runtime on a CPU (plugins/cpu): found, checked, registered.

Twin of runtime/cpp/src/backends/cpu_library.cpp.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from sinkrt.backends.shared_library import open_library, text_of
from sinkrt.contract import CPU_ABI
from sinkrt.contract.constants import CPU_LIBRARY, CPU_LIBRARY_VARIABLE
from sinkrt.errors import BackendError, printable, problem

INSTALL = f"install sinkexport where there is a C++ compiler, set {CPU_LIBRARY_VARIABLE}, or export with --target onnx"

OTHER_FUNCTIONS = ("sinkexport_cpu_isa", "RegisterCustomOps")
"""Functions of a library beside those that say its version and whether it runs here."""


def find_library() -> Path | None:
    """The library's path: as SINKEXPORT_CPU_LIBRARY says, else beside the package; None: there is none."""
    named = os.environ.get(CPU_LIBRARY_VARIABLE)
    path = Path(named) if named else Path(__file__).parent.with_name(CPU_LIBRARY)
    return path if named or path.is_file() else None


def checked_library(abi: str | None = CPU_ABI) -> Path:
    """The library's path, if it has operators of this version and runs on this processor.

    Raises: BackendError.
    """
    path = find_library()
    if path is None:
        _refuse("no library that has its operators", CPU_LIBRARY, INSTALL)
    try:
        library = open_library(path)
        found, reason = (text_of(library, f"sinkexport_cpu_{name}") for name in ("abi", "problem"))
        for name in OTHER_FUNCTIONS:
            getattr(library, name)
    except (OSError, AttributeError) as error:
        _refuse(f"'{path}' ({' '.join(str(error).split())})", CPU_LIBRARY, INSTALL)
    if abi != CPU_ABI:
        _refuse(
            f"a bundle for its version {abi}", CPU_ABI, "export the model again, or install the bundle's sinkexport"
        )
    if found != abi:
        _refuse(f"version {found} at '{path}'", f"version {abi}", "build the library of this version")
    if reason is not None:
        raise BackendError(printable(f"CPU library: {reason}; change it, or export with --target onnx"))
    return path


def is_usable() -> bool:
    """Whether bundles for the library run here."""
    try:
        checked_library()
    except BackendError:
        return False
    return True


def instruction_set(path: Path) -> str:
    """Name of the instruction set whose kernels are used, of a library that `checked_library` returned."""
    return text_of(open_library(path), "sinkexport_cpu_isa") or "none"


def _refuse(received: str, expected: str, fix: str) -> NoReturn:
    raise BackendError(problem("CPU library", received=received, expected=expected, fix=fix))
