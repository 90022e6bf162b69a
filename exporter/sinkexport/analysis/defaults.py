"""Defaults and choices of `analyze` and `tune`, for functions and for help texts, which must not import torch."""

from __future__ import annotations

NUM_WINDOWS = 8
WINDOW_TOKENS = 1024
NUM_CANDIDATES = 16
SHORT_WINDOW = 128
LONG_SHARE = 0.5
"""Memory of the proposed windows, as a share of what they would take if all were long."""

UNITS = ("head", "layer")
"""What `tune` tries by itself at first."""
OBJECTIVES = ("labels", "entropy")
"""What `tune` improves: right answers or likely texts, or the certainty of predictions."""
