"""What all tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A test run that a shell starts in the background inherits an ignored SIGINT, and so would the programs that tests
# start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TensorRT plugin, compiled once."""
    from tests.plugins.trt_library import build_plugin

    return build_plugin(tmp_path_factory.mktemp("plugin"))
