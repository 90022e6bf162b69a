"""What all tests share."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from tests.cpp.build import CppRuntime

Built = TypeVar("Built")

# A test run that a shell starts in the background inherits an ignored SIGINT, and so would the programs that tests
# start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that workers end at about the same time: slow ones, then the exporter's."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, "exporter" not in item.path.parts))


@pytest.fixture(autouse=True)
def _interrupts_as_before() -> Iterator[None]:
    """`main()` called inside the test process changes what Ctrl-C does, for good, as it may: its process ends there."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = hook


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TensorRT plugin, compiled once."""
    from tests.plugins.trt_library import build_plugin

    return _built_once(tmp_path_factory, "plugin", build_plugin)


@pytest.fixture(scope="session")
def cpp_runtime(tmp_path_factory: pytest.TempPathFactory) -> CppRuntime:
    """The C++ runtime and its tests' programs, compiled once."""
    from tests.cpp.build import build_cpp

    return _built_once(tmp_path_factory, "cpp", lambda folder: build_cpp(folder, sanitize=False))


@pytest.fixture(scope="session")
def sanitized_cpp_runtime(tmp_path_factory: pytest.TempPathFactory) -> CppRuntime:
    """The same with AddressSanitizer and UndefinedBehaviorSanitizer, and the fuzzers."""
    from tests.cpp.build import build_cpp

    return _built_once(tmp_path_factory, "cpp-sanitized", lambda folder: build_cpp(folder, sanitize=True))


def _built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Built]) -> Built:
    """What `build` makes in a folder of its own, however many workers ask for it: the others read what it returned."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "built.pickle"
        if not done.exists():
            done.write_bytes(pickle.dumps(build(folder)))
        built: Built = pickle.loads(done.read_bytes())
        return built
