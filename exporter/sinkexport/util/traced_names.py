"""Names of parameters and buffers in a trace and in its graph, where the model is a part of the traced step."""

from __future__ import annotations

MODEL = "model."
"""Prefix of the names of all that is the model's."""
