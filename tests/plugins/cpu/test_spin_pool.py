"""The pool of the CPU library: every task runs once, whoever sleeps; what it asks for ahead is what workers read."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.plugins.cpu.calls import LinearParams, SinkAttentionParams
from tests.plugins.cpu.library import library

WORKERS, PIECES = 16, 3


def faults(threads: int, callers: int, calls: int, tasks: int, pause_us: int = 0) -> int:
    """Tasks that did not run exactly once before their call returned."""
    count = library().sinkexport_cpu_pool_faults
    count.restype = ctypes.c_int64
    return count(threads, callers, *map(ctypes.c_int64, (calls, tasks, pause_us)))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tasks", [1, 2, 7, 100])
def test_every_task_runs_once(threads, tasks):
    assert faults(threads, callers=1, calls=2000, tasks=tasks) == 0


def test_more_tasks_than_a_call_counts():
    assert faults(threads=3, callers=1, calls=3, tasks=70_000) == 0


def test_helpers_that_sleep_are_not_waited_for():
    assert faults(threads=4, callers=1, calls=40, tasks=4, pause_us=2000) == 0  # they sleep after 1 ms


def test_callers_at_the_same_time():
    assert faults(threads=3, callers=4, calls=2000, tasks=5) == 0


def reads(name: str, params: ctypes.Structure, threads: int) -> list[list[tuple[int, int]]]:
    """(address, bytes) of each worker's pieces, where there are any."""
    starts, sizes = np.zeros((2, WORKERS, PIECES), np.int64)
    find = getattr(library(), f"sinkexport_cpu_{name}_reads")
    find(ctypes.byref(params), threads, *(array.ctypes.data_as(ctypes.c_void_p) for array in (starts, sizes)))
    pieces = [list(zip(*rows, strict=True)) for rows in zip(starts.tolist(), sizes.tolist(), strict=True)]
    return [[piece for piece in worker if piece[1]] for worker in pieces]


# weight type, block, outputs, gated, bytes of all weights, scales (float16), zero points
MATRICES = {
    "float32": (0, 0, 40, 0, 48 * 64 * 4, 0, 0),
    "int8": (2, 0, 576, 0, 576 * 64, 576 * 2, 0),
    "int4 gated": (3, 32, 100, 1, 224 * 32, 224 * 2 * 2, 224 * 2),
}


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("matrix", MATRICES)
def test_workers_read_a_whole_matrix(matrix, threads):
    weight_type, block, outputs, gated, *sizes = MATRICES[matrix]
    starts = [1 << 20, 2 << 20, 3 << 20]
    names = ("weight", "scale", "zero_point")
    pointers = {name: start for name, start, size in zip(names, starts, sizes, strict=True) if size}
    params = LinearParams(
        num_rows=1,
        num_inputs=64,
        num_outputs=outputs,
        weight_type=weight_type,
        block_size=block,
        scale_type=1,
        is_gated=gated,
        **pointers,
    )
    workers = [worker for worker in reads("linear", params, threads) if worker]
    assert len(workers) == min(threads, -(-outputs // 16))
    for piece, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        at = start
        for worker in workers if size else []:
            assert worker[piece][0] == at
            at += worker[piece][1]
        assert at == start + size


def test_nothing_is_known_of_experts_and_large_chunks():
    sizes = {"num_inputs": 64, "num_outputs": 64, "weight_type": 2, "weight": 1 << 20, "scale": 2 << 20}
    assert not any(reads("linear", LinearParams(num_rows=4, num_experts=8, num_x_rows=2, **sizes), 2))
    assert not any(reads("linear", LinearParams(num_rows=64, **sizes), 2))


def attention(position: list[int], window: int = 1020) -> tuple[SinkAttentionParams, list[object]]:
    """Three heads of 64, four sinks, a float16 window, and what must live as long."""
    positions = np.array(position, np.int64)
    params = SinkAttentionParams(
        batch=len(position),
        num_tokens=1,
        num_q_heads=9,
        num_kv_heads=3,
        head_dim=64,
        value_dim=64,
        num_sinks=4,
        window_size=window,
        window_type=1,
        window_k=1 << 30,
        window_v=2 << 30,
        position=positions.ctypes.data,
    )
    return params, [positions]


def test_two_workers_of_a_full_window_begin_at_their_halves():
    params, _alive = attention([5000])
    first, second = reads("sink_attention", params, 2)[:2]
    assert first == [(1 << 30, 1020 * 128), (2 << 30, 1020 * 128)]
    # Key 1536 of 3072 is in head 1: the 512th of its 1024, 4 sinks included.
    assert second == [(base + (1020 + 508) * 128, 512 * 128) for base in (1 << 30, 2 << 30)]


@pytest.mark.parametrize("position", [[0], [3], [4], [200], [0, 5000], [5000, 0, 7], [100, 1023, 1024]])
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_ranges_lie_within_the_window(position, threads):
    params, _alive = attention(position)
    for worker in reads("sink_attention", params, threads):
        for (start, size), base in zip(worker, (1 << 30, 2 << 30)[: len(worker)], strict=True):
            assert base <= start and start + size <= base + len(position) * 3 * 1020 * 128
