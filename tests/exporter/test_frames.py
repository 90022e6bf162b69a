"""Frames forever: an exported diffusion transformer against its definition in float64, wraps and recaches included."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sinkexport.frames import FrameGeometry, export_frames
from sinkrt import BundleError, UsageError
from sinkrt.frames import SPEC_FILE, FrameSession

from tests.exporter.tiny_dit import (
    CHANNELS,
    EMBED,
    HEAD_DIM,
    HEIGHT,
    KV_HEADS,
    LAYERS,
    PROMPT_TOKENS,
    WIDTH,
    Reference,
    TinyDit,
    in_time,
)

NOISE_LEVELS = (1.0, 0.5)
CASES = [
    # (S, W, frames a block, B); S and W in blocks
    (1, 3, 1, 1),
    (2, 2, 3, 2),
    (0, 2, 1, 1),
    (3, 1, 2, 1),
]


def random_model(case: tuple[int, int, int, int]) -> TinyDit:
    sinks, window, frames, batch = case
    torch.manual_seed(1)
    model = TinyDit(frames, FrameGeometry(sinks, window, frames * HEIGHT * WIDTH, batch)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)  # enough for attention to matter
    return model


def exported(model: TinyDit, folder: Path) -> FrameSession:
    states = model.geometry.empty_states(LAYERS, KV_HEADS, HEAD_DIM, torch.float32)
    inputs = {name: torch.zeros(array.shape) for name, array in inputs_of(model, 0, 0, "").items()}
    export_frames(model, inputs, states, model.geometry, folder)
    return FrameSession.load(folder, threads=1)


def inputs_of(model: TinyDit, block: int, step: int, prompt: str) -> dict[str, np.ndarray]:
    """Noise of a block, a noise level, and a prompt's embedding: float32, the same whenever they are asked for."""
    batch = model.geometry.batch
    random, words = np.random.default_rng([block, step]), np.random.default_rng([ord(c) for c in prompt] or 0)
    return {
        "x": random.standard_normal((batch, model.frames, HEIGHT, WIDTH, CHANNELS)).astype(np.float32),
        "time": np.full(batch, NOISE_LEVELS[step] if step < len(NOISE_LEVELS) else 0.0, dtype=np.float32),
        "prompt": words.standard_normal((batch, PROMPT_TOKENS, EMBED)).astype(np.float32),
    }


def wanted(reference: Reference, block: int, inputs: dict[str, np.ndarray], oldest: int = 0) -> np.ndarray:
    with torch.no_grad():
        return reference.run(block, *(torch.from_numpy(x).double() for x in inputs.values()), oldest).numpy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streams_as_defined_past_six_wraps_with_a_new_prompt_on_the_way(case: tuple, tmp_path: Path) -> None:
    model = random_model(case)
    session, reference = exported(model, tmp_path / "dit"), Reference(copy.deepcopy(model).double())
    addresses = {name: array.ctypes.data for name, array in session.buffers.items()}
    sinks, window = case[:2]
    num_blocks, prompt = sinks + 7 * window + 2, "a cat"
    finished: dict[int, np.ndarray] = {}
    for block in range(num_blocks):
        if block in (1, sinks + 1, num_blocks - 3):  # while sinks come, while the window fills, and after wraps
            prompt += " walks"
            with_sinks = block == num_blocks - 3
            session.recache(lambda b, p=prompt: {**inputs_of(model, b, 2, p), "x": finished[b]}, sinks=with_sinks)
            first = min((b for b in session.cached_blocks if b >= sinks), default=block)
            for b in session.cached_blocks:
                if with_sinks or b >= sinks:
                    wanted(reference, b, {**inputs_of(model, b, 2, prompt), "x": finished[b]}, first)
        x = inputs_of(model, block, 0, prompt)["x"]
        for step in range(len(NOISE_LEVELS)):  # the steps of a block's own denoising see each other's keys nowhere
            inputs = {**inputs_of(model, block, step, prompt), "x": x}
            got = session.run(inputs)
            np.testing.assert_allclose(got, wanted(reference, block, inputs), atol=2e-4, err_msg=f"{block}, {step}")
            x = (x - 0.5 * got).astype(np.float32)
        clean = {**inputs_of(model, block, 2, prompt), "x": x}
        got = session.commit(clean)
        np.testing.assert_allclose(got, wanted(reference, block, clean), atol=2e-4, err_msg=f"{block}")
        finished[block] = x
    assert session.position == num_blocks
    assert {name: array.ctypes.data for name, array in session.buffers.items()} == addresses


def test_the_definition_is_dense_attention_causal_between_blocks_before_anything_is_evicted() -> None:
    """All blocks at once, one mask: nothing of the definition's code but the rotation."""
    model = random_model((1, 3, 2, 1)).double()
    reference, blocks = Reference(model), 4
    inputs = [{k: torch.from_numpy(v).double() for k, v in inputs_of(model, b, 2, "p").items()} for b in range(blocks)]
    with torch.no_grad():
        got = torch.cat([reference.run(b, **inputs[b]) for b in range(blocks)], dim=1)
        tokens = model.geometry.block_tokens
        block_of = torch.arange(blocks).repeat_interleave(tokens)
        mask = block_of[:, None] >= block_of

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k = (
                torch.cat([in_time(part, place) for place, part in enumerate(x.split(tokens, dim=2))], dim=2)
                for x in (q, k)
            )
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        whole = copy.copy(model)
        whole.angles = model.angles.repeat(blocks, 1)
        x = torch.cat([i["x"] for i in inputs], dim=1)
        want = whole.velocity(x, inputs[0]["time"], inputs[0]["prompt"], attend)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_far_positions_are_exact(tmp_path: Path) -> None:
    """Only the order of cached blocks matters: the same frames give the same picture at block 2^40."""
    model = random_model((1, 3, 1, 1))
    session = exported(model, tmp_path / "dit")
    outputs = []
    for start in (7, 7 + 3 * 2**40):  # the same slots of the ring
        session.reset()
        for block in (0, *range(start - 2, start + 1)):
            session.position = block
            got = session.commit(inputs_of(model, block if block == 0 else block - start + 20, 2, "p"))
        outputs.append(got.copy())
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-5)


def test_wrong_inputs_and_folders_are_reported_in_one_line(tmp_path: Path) -> None:
    model = random_model((1, 2, 1, 1))
    session = exported(model, tmp_path / "dit")
    good = inputs_of(model, 0, 0, "p")
    with pytest.raises(UsageError, match=r"input 'x': received float32 \[3\], expected float32 \[1, 1, 2, 3, 4\]"):
        session.run({**good, "x": np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match="input 'prompt': received nothing"):
        session.run({name: good[name] for name in ("x", "time")})
    with pytest.raises(UsageError, match="input 'mask': received an array"):
        session.run({**good, "mask": 1})
    with pytest.raises(UsageError, match="window_blocks: received 0, expected an integer >= 1"):
        FrameGeometry(1, 0, 6)
    (tmp_path / "dit" / SPEC_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match="no key"):
        FrameSession.load(tmp_path / "dit")
    with pytest.raises(BundleError, match="expected a folder that export_frames wrote"):
        FrameSession.load(tmp_path)
