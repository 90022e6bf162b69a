"""What the tests of CPU kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.plugins.cpu.library import ISAS_OF_MACHINE, VARIABLE, isas_here


@pytest.fixture(scope="session", autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile the C interface, unless it is given."""
    if os.environ.get(VARIABLE):
        yield
        return
    plugins: Path = request.getfixturevalue("cpu_plugins")
    with mock.patch.dict(os.environ, {VARIABLE: str(plugins / "libsinkexport_cpu_capi.so")}):
        yield


@pytest.fixture(params=ISAS_OF_MACHINE)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that the library and this processor have."""
    name: str = request.param
    if name not in isas_here():
        pytest.skip(f"this processor or the compiler has no {name}")
    return name
