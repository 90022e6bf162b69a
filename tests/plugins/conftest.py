"""Tests that only a GPU can run are collected only where there is one: two thousand skips would hide all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out ``test_*_cuda.py`` where PyTorch sees no GPU, unless the file is named on the command line."""
    return True if _is_for_a_gpu(collection_path) and not torch.cuda.is_available() else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say so in one line."""
    files = sorted(path.name for path in HERE.iterdir() if _is_for_a_gpu(path))
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"not collected, for want of a GPU: {', '.join(files)} in tests/plugins")


def _is_for_a_gpu(path: Path) -> bool:
    return path.parent == HERE and path.name.startswith("test_") and path.name.endswith("_cuda.py")
