"""States of a session: one piece of memory, zero, aligned, of the process alone."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from sinkrt import Session
from sinkrt.backends.state_memory import HUGE_PAGE_BYTES, states_in_one_piece
from sinkrt.contract import TensorSpec

from tests.mappings import flags_at
from tests.runtime.toy import Toy, build_toy

SPECS = [
    TensorSpec("a", (2, 3, 5), "float32"),
    TensorSpec("b", (1,), "int8"),
    TensorSpec("c", (64,), "int8"),
    TensorSpec("d", (3, 700_001), "float16"),
]


def test_one_after_the_other_and_aligned() -> None:
    states = states_in_one_piece(SPECS)
    ends = 0
    for state, spec in zip(states, SPECS, strict=True):
        assert (state.shape, str(state.dtype)) == (spec.shape, spec.dtype)
        assert state.ctypes.data % 64 == 0 and state.flags.writeable and not state.any()
        assert 0 <= state.ctypes.data - (ends or state.ctypes.data) < 64
        ends = state.ctypes.data + state.nbytes
        state[...] = 1  # all of it is there, and no neighbour's
    assert [float(state.astype(np.float64).sum()) for state in states] == [30, 1, 64, 2_100_003]


def test_whole_huge_pages_are_asked_for() -> None:
    """The rest lies in small pages: no more memory is taken than asked for."""
    (state,) = states_in_one_piece([TensorSpec("a", (2 * HUGE_PAGE_BYTES + 5000,), "int8")])
    assert state.ctypes.data % HUGE_PAGE_BYTES == 0
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags_at(state.ctypes.data) and "hg" in flags_at(state.ctypes.data + 2 * HUGE_PAGE_BYTES - 1)
        assert "hg" not in flags_at(state.ctypes.data + 2 * HUGE_PAGE_BYTES)


def test_no_states_and_too_many() -> None:
    assert states_in_one_piece([]) == []
    with pytest.raises(MemoryError):  # more than there are addresses, whatever the system promises
        states_in_one_piece([TensorSpec("a", (2**46,), "int8")] * 4)


def test_memory_is_freed_with_the_last_state() -> None:
    states = states_in_one_piece([TensorSpec("a", (16 * HUGE_PAGE_BYTES,), "int8"), TensorSpec("b", (1,), "int8")])
    address = states[0].ctypes.data
    del states[0]
    assert flags_at(address)  # the other is in the same piece
    del states[0]
    assert not flags_at(address)


def test_states_of_a_session_lie_together(tmp_path: Path) -> None:
    with Session.load(build_toy(tmp_path / "b", Toy(batch=2, chunk_size=4)), threads=1) as session:
        states = [state for name, state in session.buffers.items() if name.endswith(".0")]
        assert len(states) == 4
        starts = sorted((state.ctypes.data, state.nbytes) for state in states)
        for (start, size), (following, _) in itertools.pairwise(starts):
            assert following - start == -(-size // 64) * 64


def test_a_child_process_writes_to_memory_of_its_own(session: Session) -> None:
    session.prefill([1, 2, 3])
    state = session.buffers["window_k.0"]
    before = state.copy()
    child = os.fork()
    if child == 0:
        state[...] = 7
        os._exit(0 if (state == 7).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(state, before)
