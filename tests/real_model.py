"""The real model that some tests need: SmolLM2-135M-Instruct as a GGUF file, which `make model` fetches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_file() -> Path:
    """Its path: SINKEXPORT_SMOLLM2, or where `make model` puts it. Without the file the test is skipped, but fails
    where nothing may be skipped (SINKEXPORT_NO_SKIP)."""
    path = Path(os.environ.get("SINKEXPORT_SMOLLM2", DEFAULT))
    if not path.is_file():
        message = f"no file at '{path}': run 'make model', or set SINKEXPORT_SMOLLM2"
        if os.environ.get("SINKEXPORT_NO_SKIP"):
            pytest.fail(message)
        pytest.skip(message)
    return path
