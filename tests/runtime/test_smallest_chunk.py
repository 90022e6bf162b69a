"""From how many tokens on a session takes a chunk."""

from __future__ import annotations

import sys

import pytest
from sinkrt.graph_runner import smallest_chunk


@pytest.mark.parametrize(
    ("chunk_size", "target", "expected"),
    [
        (1, "tensorrt", sys.maxsize),
        (64, "onnx", 8),
        (8, "onnx", 2),
        (256, "cpu", 2),
        (256, "tensorrt", 4),
        (64, "tensorrt", 2),
        (2048, "tensorrt", 32),
    ],
)
def test_from_how_many_tokens_on(chunk_size, target, expected):
    assert smallest_chunk(chunk_size, target) == expected
