"""Slots and positions of a stream's tokens in the cache: the only module that knows the ring's arithmetic.

Pure integers and the standard library only, so that runtime/cpp/include/sinkrt/ring.h can be its literal twin.
Both replay ``tests/golden/ring.json``.

Position t is the 0-based index of the newest token. A cache of capacity C = S + W then holds the first S tokens of
the stream (the sinks) and the last W tokens of index >= S (StreamingLLM, arXiv:2309.17453). The newest is included.
Sinks and window are separate tensors; a window token u lies in slot ``(u - S) mod W`` of the ring.
"""

from __future__ import annotations

import dataclasses
import math

from sinkrt.errors import UsageError, problem

TURN = 2**32
"""Units of a full turn in fixed-point phase."""

POSITION_LIMIT = 2**47
"""First stream position whose phase would leave int64: below it hi = t / 2^16 < 2^31, so hi * f < 2^63."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Geometry of one stream's cache. All arguments and results are in tokens or slots.

    num_sink_tokens: S >= 0, first tokens of the stream, kept forever.
    window_size: W >= 1, most recent tokens kept.

    Raises: UsageError for an S or W out of range, and every method for a position t < 0.
    """

    num_sink_tokens: int
    window_size: int

    def __post_init__(self) -> None:
        if self.num_sink_tokens < 0:
            raise UsageError(
                problem("num_sink_tokens", received=self.num_sink_tokens, expected=">= 0", fix="keep 0 sinks or more")
            )
        if self.window_size < 1:
            raise UsageError(
                problem("window_size", received=self.window_size, expected=">= 1", fix="keep a window of 1 or more")
            )

    @property
    def capacity(self) -> int:
        """C = S + W."""
        return self.num_sink_tokens + self.window_size

    def is_sink(self, t: int) -> bool:
        """Whether token t is one of the sinks."""
        _check_position(t)
        return t < self.num_sink_tokens

    def slot(self, t: int) -> int:
        """Window slot that step t writes, in 0 .. W-1.

        A sink's step writes too (a graph has no branch): its slot is one that `num_window_tokens` masks and that
        is written again before it counts, because the modulo floors.
        """
        _check_position(t)
        return (t - self.num_sink_tokens) % self.window_size

    def num_sinks(self, t: int) -> int:
        """Sinks in the cache at position t: entries 0 .. n-1 of the sink tensors are valid."""
        _check_position(t)
        return min(t + 1, self.num_sink_tokens)

    def num_window_tokens(self, t: int) -> int:
        """Window tokens in the cache at position t: slots 0 .. n-1 are valid."""
        _check_position(t)
        return min(max(t - self.num_sink_tokens + 1, 0), self.window_size)

    def shift(self, t: int) -> int:
        """Tokens by which the query is turned back for the sinks, whose distance stops growing at t = C - 1."""
        _check_position(t)
        return max(0, t - (self.capacity - 1))

    def cached_tokens(self, t: int) -> tuple[int, ...]:
        """Stream indices of the cached tokens, oldest first: the j-th has in-cache position j."""
        window = range(t + 1 - self.num_window_tokens(t), t + 1)
        return (*range(self.num_sinks(t)), *window)

    def token_in_slot(self, slot: int, t: int) -> int | None:
        """Stream index of the token in a window slot after step t, or None while no token was kept there.

        Raises: UsageError if `slot` is not in 0 .. W-1.
        """
        _check_position(t)
        if not 0 <= slot < self.window_size:
            raise UsageError(
                problem("slot", received=slot, expected=f"0 .. {self.window_size - 1}", fix="pass a slot of the ring")
            )
        age = (self.slot(t) - slot) % self.window_size  # steps since the slot was written
        token = t - age
        return token if token >= self.num_sink_tokens else None

    def in_cache_position(self, token: int, t: int) -> int:
        """How many cached tokens are older than `token` at position t: the position that RoPE sees.

        Raises: UsageError if the token is not in the cache at t.
        """
        _check_position(t)
        oldest_in_window = t + 1 - self.num_window_tokens(t)
        if 0 <= token < self.num_sinks(t):
            return token
        if oldest_in_window <= token <= t:
            return self.num_sinks(t) + token - oldest_in_window
        raise UsageError(
            problem(
                "token",
                received=token,
                expected=f"one in the cache at position {t}",
                fix="ask for a sink or one of the window's tokens",
            )
        )


def phase_frequency(inv_freq: float) -> int:
    """Fixed-point frequency of a rotary pair: turns a token in units of 2^-32, in 0 .. 2^32-1.

    inv_freq: radians a token (RoFormer, arXiv:2104.09864).

    Raises: UsageError if it is not finite.
    """
    if not math.isfinite(inv_freq):
        raise UsageError(
            problem("inv_freq", received=inv_freq, expected="a finite number", fix="check the model's rotary settings")
        )
    return round(inv_freq / (2 * math.pi) * TURN) % TURN


def phase(t: int, frequency: int) -> int:
    """``(t * frequency) mod 2^32``: the exact angle of position t, in units of 2^-32 turns.

    t: stream position, below ``POSITION_LIMIT``. frequency: of `phase_frequency`, in 0 .. 2^32-1.
    t is split as hi * 2^16 + lo, as the graph does, so that no intermediate value leaves int64.

    Raises: UsageError if an argument is out of range.
    """
    if not 0 <= t < POSITION_LIMIT:
        raise UsageError(
            problem("position", received=t, expected=f"0 .. {POSITION_LIMIT - 1}", fix="reset the stream before that")
        )
    if not 0 <= frequency < TURN:
        raise UsageError(
            problem("frequency", received=frequency, expected=f"0 .. {TURN - 1}", fix="use phase_frequency()")
        )
    hi, lo = t // 2**16, t % 2**16
    return (hi * frequency % TURN * 2**16 + lo * frequency) % TURN


def _check_position(t: int) -> None:
    if t < 0:
        raise UsageError(
            problem("position", received=t, expected=">= 0", fix="positions count a stream's tokens from 0")
        )
