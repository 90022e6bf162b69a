"""Defaults of `verify` and `eval`, for functions and for help texts, which must not import torch."""

from __future__ import annotations

EVAL_TOKENS = 20_000
EVAL_SEGMENT_TOKENS = 512
EVAL_DENSE_TOKENS = 4096
"""Where `eval` stops the dense model: its memory and its time for a token grow with the text."""

VERIFY_WRAPS = 6
VERIFY_DENSE_TOKENS = 256
QUALITY_TOKENS = 4000
