"""What the tests on a GPU share: where they run, and on which library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from tests.plugins.compiler import NVCC

Library = TypeVar("Library")


def needs_gpu(variable: str) -> list[pytest.MarkDecorator]:
    """Marks of tests that run on a GPU, on a library that the environment's `variable` names or nvcc compiles.

    No CI machine has a GPU: they are run by hand, and plugins/README.md keeps what they said.
    """
    return [
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none"),
        pytest.mark.skipif(
            NVCC is None and variable not in os.environ,
            reason=f"needs CUDA's compiler (no nvcc on the PATH) or {variable}",
        ),
    ]


def library_for_gpu(variable: str, load: Callable[[Path], Library], build: Callable[[], Library]) -> Library:
    """The library under test, after a new seed and with PyTorch's matmuls in full precision."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    path = os.environ.get(variable)
    return load(Path(path)) if path else build()
