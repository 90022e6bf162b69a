"""What all tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from sinkrt.contract.constants import CPU_LIBRARY, CPU_LIBRARY_VARIABLE

from tests import slow_tests
from tests.support import SharedExports, built_once, read_operators_once, shared_folder

if TYPE_CHECKING:
    from tests.cpp.build import CppRuntime

# Exports that name no target would differ between machines with the CPU library and those without: here nobody finds
# one, nor do programs that tests start, but in files that ask for it by the fixture `cpu_library`. Workers of
# pytest-xdist inherit what the first process has set.
NO_CPU_LIBRARY, GIVEN_VARIABLE = "/no-cpu-library-in-this-test", "SINKEXPORT_TESTS_CPU_LIBRARY"
if os.environ.get(CPU_LIBRARY_VARIABLE, NO_CPU_LIBRARY) != NO_CPU_LIBRARY:
    os.environ[GIVEN_VARIABLE] = os.environ[CPU_LIBRARY_VARIABLE]
os.environ[CPU_LIBRARY_VARIABLE] = NO_CPU_LIBRARY

# A test run that a shell starts in the background inherits an ignored SIGINT, and so would the programs that tests
# start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what slow_tests.txt lists, before pytest leaves out what ``-m`` says.

    Files that take long come first, so that little is left when workers begin to take each other's tests.

    The first half of the tests goes to the first worker, the second half to the second.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    listed = slow_tests.read()
    for item in items:
        if item.nodeid in listed:
            item.add_marker("slow")
    items.sort(key=lambda item: (item.path not in slow, "exporter" not in item.path.parts))


@pytest.fixture(autouse=True)
def _interrupts_as_before() -> Iterator[None]:
    """`main()` called inside the test process changes what Ctrl-C does, for good, as it may: its process ends there."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = hook


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> None:
    """In processes whose tests have imported torch."""
    if "torch" in sys.modules:
        read_operators_once()


@pytest.fixture(scope="session")
def shared_export(tmp_path_factory: pytest.TempPathFactory) -> SharedExports:
    """Exports of tiny models for tests that only read them."""
    return SharedExports(shared_folder(tmp_path_factory) / "exports")


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TensorRT plugin, compiled once."""
    from tests.plugins.trt_library import build_plugin

    return built_once(shared_folder(tmp_path_factory) / "plugin", build_plugin)


@pytest.fixture(scope="session")
def cpu_plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which plugins/cpu is compiled, once."""
    from tests.plugins.cpu_library import compile_for_this_machine

    return built_once(shared_folder(tmp_path_factory) / "cpu-plugins", compile_for_this_machine)


@pytest.fixture(scope="module")
def cpu_library(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The CPU library, which the file's tests find from here on: what SINKEXPORT_CPU_LIBRARY named, else our own."""
    given = os.environ.get(GIVEN_VARIABLE)
    path = Path(given) if given else request.getfixturevalue("cpu_plugins") / "ort" / CPU_LIBRARY
    with mock.patch.dict(os.environ, {CPU_LIBRARY_VARIABLE: str(path)}):
        yield path


@pytest.fixture(scope="session")
def cpp_runtime(tmp_path_factory: pytest.TempPathFactory) -> CppRuntime:
    """The C++ runtime and its tests' programs, compiled once."""
    from tests.cpp.build import build_cpp

    return built_once(shared_folder(tmp_path_factory) / "cpp", lambda folder: build_cpp(folder, sanitize=False))


@pytest.fixture(scope="session")
def sanitized_cpp_runtime(tmp_path_factory: pytest.TempPathFactory) -> CppRuntime:
    """The same with AddressSanitizer and UndefinedBehaviorSanitizer, and the fuzzers."""
    from tests.cpp.build import build_cpp

    return built_once(
        shared_folder(tmp_path_factory) / "cpp-sanitized", lambda folder: build_cpp(folder, sanitize=True)
    )
