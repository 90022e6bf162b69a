"""The ring's arithmetic against lists, and fixed-point phase against unbounded integers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkrt.errors import UsageError
from sinkrt.ring import POSITION_LIMIT, TURN, Ring, phase, phase_frequency

from tests.golden import make_ring

GOLDEN = json.loads(make_ring.PATH.read_text(encoding="utf-8"))

rings = st.builds(Ring, st.integers(0, 70), st.integers(1, 70))
positions = st.integers(0, 2**40)


def test_golden_file_is_what_its_script_writes() -> None:
    assert make_ring.PATH.read_text(encoding="utf-8") == make_ring.render()


@pytest.mark.parametrize("group", GOLDEN["rings"], ids=lambda g: f"S{g['num_sink_tokens']}-W{g['window_size']}")
def test_golden_rings(group: dict[str, Any]) -> None:
    ring = Ring(group["num_sink_tokens"], group["window_size"])
    assert ring.capacity == group["num_sink_tokens"] + group["window_size"]
    for case in group["cases"]:
        t = case["t"]
        for name in ("slot", "is_sink", "num_sinks", "num_window_tokens", "shift"):
            assert getattr(ring, name)(t) == case[name], (name, t)
        if "cached_tokens" in case:
            assert list(ring.cached_tokens(t)) == case["cached_tokens"]
            assert [ring.in_cache_position(token, t) for token in case["cached_tokens"]] == list(
                range(len(case["cached_tokens"]))
            )
        for slot, token in enumerate(case.get("token_in_slot", ())):
            assert ring.token_in_slot(slot, t) == (None if token == -1 else token), (slot, t)


@pytest.mark.parametrize("group", GOLDEN["phases"], ids=lambda g: f"{g['inv_freq']:.3g}")
def test_golden_phases(group: dict[str, Any]) -> None:
    assert phase_frequency(group["inv_freq"]) == group["frequency"]
    for case in group["cases"]:
        assert phase(case["t"], group["frequency"]) == case["phase"], case["t"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 12), st.integers(1, 90))
def test_ring_written_step_by_step(num_sink_tokens: int, window_size: int, steps: int) -> None:
    """Write tokens where `slot` says, as a graph does (sinks' steps too), and compare the whole contents."""
    ring = Ring(num_sink_tokens, window_size)
    slots: list[int | None] = [None] * window_size
    for t in range(steps):
        slots[ring.slot(t)] = t
        valid = ring.num_window_tokens(t)
        kept = {token for token in slots[:valid] if token is not None}
        # What is not masked is exactly the last W tokens that are no sinks.
        assert kept == set(range(max(num_sink_tokens, t + 1 - window_size), t + 1))
        assert len(kept) == valid
        for slot in range(valid):
            assert ring.token_in_slot(slot, t) == slots[slot]
        for slot in range(valid, window_size):
            assert ring.token_in_slot(slot, t) is None
        assert ring.cached_tokens(t) == (*range(min(t + 1, num_sink_tokens)), *sorted(kept))


@given(rings, positions)
def test_cache_holds_sinks_and_last_window(ring: Ring, t: int) -> None:
    sinks, window = ring.num_sink_tokens, ring.window_size
    cached = ring.cached_tokens(t)
    assert len(cached) == ring.num_sinks(t) + ring.num_window_tokens(t) == min(t + 1, ring.capacity)
    assert cached[-1] == t
    assert list(cached) == sorted(set(cached))
    assert all(token < sinks or t - token < window for token in cached)


@given(rings, positions)
def test_slots_and_tokens_are_inverse(ring: Ring, t: int) -> None:
    window = [token for token in ring.cached_tokens(t) if not ring.is_sink(token)]
    for token in window:
        assert 0 <= ring.slot(token) < ring.num_window_tokens(t)
        assert ring.token_in_slot(ring.slot(token), t) == token
    found = [ring.token_in_slot(slot, t) for slot in range(ring.window_size)]
    assert sorted(token for token in found if token is not None) == window


@given(rings, positions)
def test_in_cache_position_is_what_the_shifted_query_sees(ring: Ring, t: int) -> None:
    """Window: distance by stream position. Sinks: the same, less `shift`. That is the in-cache distance."""
    cached = ring.cached_tokens(t)
    own = ring.in_cache_position(t, t)
    assert own == min(t, ring.capacity - 1)
    for j, token in enumerate(cached):
        assert ring.in_cache_position(token, t) == j
        assert own - j == t - token - (ring.shift(t) if ring.is_sink(token) else 0)


@given(rings, positions, st.integers(-100, 2**41))
def test_in_cache_position_refuses_what_is_not_cached(ring: Ring, t: int, token: int) -> None:
    if token in ring.cached_tokens(t):
        assert ring.in_cache_position(token, t) >= 0
    else:
        with pytest.raises(UsageError, match="in the cache"):
            ring.in_cache_position(token, t)


@given(rings, positions)
def test_shift_starts_with_the_first_eviction(ring: Ring, t: int) -> None:
    assert ring.shift(t) == max(0, t + 1 - ring.capacity)
    assert (ring.shift(t) > 0) == (len(ring.cached_tokens(t)) < t + 1)


def test_no_sinks_and_a_window_of_one() -> None:
    ring = Ring(0, 1)
    for t in (0, 1, 5, 2**40):
        assert (ring.slot(t), ring.cached_tokens(t), ring.shift(t), ring.num_sinks(t)) == (0, (t,), t, 0)
    only_newest = Ring(2, 1)
    assert only_newest.cached_tokens(1) == (0, 1)
    assert only_newest.cached_tokens(9) == (0, 1, 9)
    assert only_newest.token_in_slot(0, 1) is None


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Ring(-1, 4), "num_sink_tokens"),
        (lambda: Ring(4, 0), "window_size"),
        (lambda: Ring(4, 4).slot(-1), "position"),
        (lambda: Ring(4, 4).cached_tokens(-1), "position"),
        (lambda: Ring(4, 4).token_in_slot(4, 9), "slot"),
        (lambda: Ring(4, 4).token_in_slot(-1, 9), "slot"),
        (lambda: phase(POSITION_LIMIT, 1), "position"),
        (lambda: phase(-1, 1), "position"),
        (lambda: phase(1, TURN), "frequency"),
        (lambda: phase_frequency(float("nan")), "inv_freq"),
    ],
)
def test_bad_arguments_are_named(make: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: received .*, expected "):
        make()


@given(st.integers(0, POSITION_LIMIT - 1), st.integers(0, TURN - 1))
def test_phase_is_exact_and_stays_inside_int64(t: int, frequency: int) -> None:
    # NumPy's int64 scalars do the arithmetic of the graph; `over="raise"` makes any overflow an error.
    with np.errstate(over="raise"):
        found = phase(np.int64(t), np.int64(frequency))  # type: ignore[arg-type]
    assert isinstance(found, np.int64)
    assert int(found) == t * frequency % TURN


def test_int64_check_can_fail() -> None:
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        np.int64(POSITION_LIMIT) // 2**16 * np.int64(TURN - 1) * np.int64(2)


@given(positions, st.integers(0, 2**40), st.floats(1e-9, 1.0))
def test_phases_of_differences_are_differences_of_phases(a: int, b: int, inv_freq: float) -> None:
    """Relative angles are exact, which is what attention depends on."""
    frequency = phase_frequency(inv_freq)
    low, high = sorted((a, b))
    assert (phase(high, frequency) - phase(low, frequency)) % TURN == phase(high - low, frequency)


@given(st.floats(0.0, 6.28), st.integers(0, 4096))
def test_phase_is_the_angle(inv_freq: float, t: int) -> None:
    """Inside a cache of 4,096 tokens the rounding of f is worth at most t half units of 2^-32 turns."""
    angle = phase(t, phase_frequency(inv_freq)) * 2 * math.pi / TURN
    error = (angle - t * inv_freq + math.pi) % (2 * math.pi) - math.pi
    assert abs(error) <= math.pi * (t + 1) / TURN + 1e-10
