"""Far along a stream nothing may drift: positions 10^7, 2^33 and just below the limit.

What a step computes depends on rotations between tokens only. So a stream at position t is moved to t + delta by
turning its window keys by delta (in float64, from the exact integer frequencies), and must then give the same
logits as the stream that was left where it was.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sinkexport.config import ExportConfig
from sinkexport.families.probe import probe_attention
from sinkrt import UsageError
from sinkrt.ring import POSITION_LIMIT, TURN

from tests.support import SharedExports, random_ids

GEOMETRY = {"num_sink_tokens": 4, "window_size": 12}
CONFIG = ExportConfig(**GEOMETRY)


def turned(keys: np.ndarray, frequency: list[int], delta: int) -> np.ndarray:
    """Rotate [B, Hkv, W, D] keys (pairs of halves) by `delta` tokens, in float64 and exact integers."""
    angles = np.array([delta * f % TURN for f in frequency]) * (2 * np.pi / TURN)
    pairs = len(frequency)
    a, b = keys[..., :pairs].astype(np.float64), keys[..., pairs : 2 * pairs].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin, keys[..., 2 * pairs :]), axis=-1)


def moved_state(path: Path, target: Path, frequency: list[int], delta: int) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for name, tensor in tensors.items():
        if name.startswith("window_k"):
            tensors[name] = np.ascontiguousarray(turned(tensor, frequency, delta).astype(tensor.dtype))
    tensors["position"] = tensors["position"] + delta
    tensors["recent_ids"] = np.maximum(tensors["recent_ids"], 0)  # so far on, each of the last tokens has an id
    save_file(tensors, target, metadata=metadata)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("where", [10**7, 2**33, 2**31 - 5, POSITION_LIMIT - 200])
def test_far_positions(name: str, where: int, shared_export: SharedExports, tmp_path: Path) -> None:
    bundle = shared_export(name, **GEOMETRY)
    model = bundle.model
    _, rotary = probe_attention(model, model.config.num_hidden_layers)
    frequency = [int(f) for f in rotary.tables[""].frequency]
    near, far = bundle.session(), bundle.session()
    near.prefill(random_ids(1, 2 * CONFIG.capacity + 3))
    near.save_state(tmp_path / "near.safetensors")
    delta = where // CONFIG.window_size * CONFIG.window_size  # whole windows: every token keeps its slot
    moved_state(tmp_path / "near.safetensors", tmp_path / "far.safetensors", frequency, delta)
    far.load_state(tmp_path / "far.safetensors")
    assert far.position[0] == near.position[0] + delta
    ids = random_ids(1, 3 * CONFIG.capacity, seed=5)
    feeds = [lambda s, i=i: s.step(ids[:, i]) for i in range(ids.shape[1])]
    for feed in (*feeds, lambda s: s.prefill(ids)):
        want, got = feed(near).copy(), feed(far)
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_past_the_limit_is_refused(shared_export: SharedExports, tmp_path: Path) -> None:
    session = shared_export("llama", **GEOMETRY).session()
    session.step([5])
    session.save_state(tmp_path / "state")
    frequency = [0] * 8
    moved_state(tmp_path / "state", tmp_path / "far", frequency, POSITION_LIMIT - 2)
    session.load_state(tmp_path / "far")
    session.step([5])
    with pytest.raises(UsageError, match="position"):
        session.step([5])
