"""What the C++ runtime's tests share."""

from __future__ import annotations

import pytest

from tests.cpp.build import CppRuntime
from tests.cpp.probe import Probe


@pytest.fixture(scope="session")
def probe(cpp_runtime: CppRuntime) -> Probe:
    return Probe(cpp_runtime.programs / "libprobe.so")
