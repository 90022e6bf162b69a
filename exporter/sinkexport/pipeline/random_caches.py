"""Caches filled with random rows, as if a stream had run for long."""

from __future__ import annotations

import numpy as np
import torch
from sinkrt.contract import RECURRENT_KINDS, SCALE_KINDS, Manifest


def random_states(manifest: Manifest, sizes: dict[int, tuple[float, float]]) -> dict[str, np.ndarray]:
    """States of one stream by input name; those of recurrent layers as they begin."""
    random, states = np.random.default_rng(1), {}
    for state in manifest.states:
        values: np.ndarray
        shape, size = state.shape[1:], sizes[state.layer]["_v" in state.kind] if state.layer in sizes else 0.0
        if state.kind in RECURRENT_KINDS:
            values = np.zeros(shape)
        elif state.kind in SCALE_KINDS:
            values = np.full(shape, max(size, 1e-3) * 3 / 127)
        elif state.dtype == "int8":
            values = np.clip(np.rint(random.standard_normal(shape, np.float32) * 127 / 3), -127, 127)
        else:
            values = random.standard_normal(shape, np.float32) * np.float32(size)
        states[state.input] = values.astype(state.dtype)
    return states


def rows_of(manifest: Manifest, states: dict[str, np.ndarray]) -> dict[int, dict[str, torch.Tensor]]:
    """Keys and values [1, Hkv, S or W, D] by layer and kind, float32."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for state in manifest.states:
        found.setdefault(state.layer, {})[state.kind] = torch.from_numpy(states[state.input])[None].float()
    for one in found.values():
        for kind in SCALE_KINDS:
            if kind in one:
                one[kind.removesuffix("_scale")] *= one[kind][..., None]
    return found
