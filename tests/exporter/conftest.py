"""What tests of the exporter share."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from torch.onnx._internal.exporter import _registration


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> None:
    """torch.onnx reads the sources of all its translations anew in every export: a third of a tiny model's."""
    read = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def from_torchlib(*version: int, **named: int) -> Any:
        registry = copy.copy(read(*version, **named))
        # An export adds its own translations.
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    _registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
