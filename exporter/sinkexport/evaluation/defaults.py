"""Defaults of `verify` and `eval`, for functions and for help texts, which must not import torch."""

from __future__ import annotations

from collections.abc import Mapping

EVAL_TOKENS = 20_000
EVAL_SEGMENT_TOKENS = 512
EVAL_DENSE_TOKENS = 4096
"""Where `eval` stops the dense model: its memory and its time for a token grow with the text."""

VERIFY_WRAPS = 6
VERIFY_DENSE_TOKENS = 256
QUALITY_TOKENS = 4000

DEFAULT_TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.25}
"""Largest error of a logit, as a share of the spread of its step's logits, by the bundle's weights_dtype.

Bundle and reference round differently (order of sums, fused operators). Measured over six wraps with W = 60:

                     SmolLM2-135M   tiny random models of every family
float32                      4e-5                           up to 2e-5
float16                      8e-2                           up to 4e-2.

float16 rounds weights and large activations, which the reference keeps in float32. The tolerances leave room for larger
models.
"""

TOLERANCE_PER_TOKEN = 2e-6
"""The same for each token of the cache's capacity, where that is more.

transformers multiplies position and frequency in float32. Near position C that is wrong by up to C * 2^-24 radians, in
the dense model and in the reference alike; the bundle's own angles are exact. Measured for SmolLM2-135M with a window
of 1,020 tokens over six wraps: 5e-4, and 6e-5 if the reference's cos and sin are computed in float64.
"""
