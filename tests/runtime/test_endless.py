"""The promise: endless decoding in constant memory, in buffers that never move and are written in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil
import pytest
from sinkrt import Session

from tests.runtime.faults import load_faulty
from tests.runtime.toy import VOCAB_SIZE, Toy

KIB = 2**10


def addresses(session: Session) -> dict[str, int]:
    return {name: buffer.ctypes.data for name, buffer in session.buffers.items()}


def test_buffers_are_aligned_and_never_move(session: Session, tmp_path: Path) -> None:
    before = addresses(session)
    assert all(address % 64 == 0 for address in before.values())
    logits = session.prefill([1] * 50)
    for token in range(3000):
        assert session.step([token % VOCAB_SIZE]) is logits
    session.save_state(tmp_path / "state")
    session.load_state(tmp_path / "state")
    session.reset()
    assert session.step([1]) is logits
    assert addresses(session) == before


def test_a_state_is_written_in_place_in_one_slot(session: Session) -> None:
    """What NumPy sees changes with a step, and in the token's own slot only: ONNX Runtime works on these buffers."""
    toy = Toy()
    buffers = session.buffers
    for t in range(3 * toy.capacity):
        before = {name: buffer.copy() for name, buffer in buffers.items()}
        session.step([(7 * t + 1) % VOCAB_SIZE])
        for name in ("sink_k.0", "sink_v.0", "window_k.0", "window_v.0"):
            changed = np.flatnonzero((buffers[name] != before[name]).any(axis=(0, 1, 3)))
            slot = (t - toy.num_sink_tokens) % toy.window_size
            want = ([t] if t < toy.num_sink_tokens else []) if name.startswith("sink") else [slot]
            assert changed.tolist() == want, (t, name)


def test_values_bound_are_the_arrays(toy_bundle: Path) -> None:
    """ONNX Runtime's own view of every output is the session's array, state outputs included."""
    session, backend = load_faulty(toy_bundle)
    session.step([1])
    outputs: list[ort.OrtValue] = backend.real.step.binding.get_outputs()
    own = {session.buffers["logits"].ctypes.data, *(b.ctypes.data for b in session.buffers.values())}
    assert len(outputs) == 5
    for value in outputs:
        assert value.data_ptr() in own


def grown_bytes(session: Session, steps: int) -> int:
    process = psutil.Process()
    before = process.memory_info().rss
    for token in range(steps):
        session.step([token % VOCAB_SIZE])
    return process.memory_info().rss - before


def test_memory_stays_flat_over_twenty_thousand_steps(session: Session) -> None:
    grown_bytes(session, 2000)  # the allocator and caches settle
    before = addresses(session)
    # 64 bytes a step would show as 1,250 KiB.
    assert grown_bytes(session, 20_000) <= 512 * KIB
    assert addresses(session) == before
    assert session.position[0] == 22_000


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_memory_stays_flat_while_generating(session: Session, temperature: float) -> None:
    process = psutil.Process()
    pieces = session.generate("a", ignore_eos=True, temperature=temperature, top_p=0.9, repetition_penalty=1.2, seed=1)
    for _ in range(1000):
        next(pieces)
    before = process.memory_info().rss
    for _ in range(8000):
        next(pieces)
    assert process.memory_info().rss - before <= 512 * KIB
