"""One answer under a grammar: which tokens may come next, found out while the model's step runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from sinkrt.allowed import Allowed
from sinkrt.errors import UsageError, problem

MAX_GRAMMAR_TOKENS = 2**16
"""Longest answer under a grammar, tokens: a matcher remembers about 100 bytes of each, to take them back."""


class Matcher:
    """The state of one answer under a grammar.

    begin: makes llguidance's matcher, in the thread that will use it. vocab_size: of the model. ends: tokens that end
    an answer: they are allowed where the grammar may end. thread: runs one function after the other. count: is called
    for each token taken.

    `take` returns at once; masks come from the thread. So does everything that llguidance does, in the order of calls.
    """

    def __init__(
        self,
        begin: Callable[[], Any],
        vocab_size: int,
        ends: Collection[int],
        thread: Executor,
        count: Callable[[], None] = lambda: None,
    ) -> None:
        self._vocab_size = vocab_size
        bits: dict[int, int] = {}  # of the ends, by the byte that holds them
        for end in ends:
            if end < vocab_size:
                bits[end // 8] = bits.get(end // 8, 0) | 1 << end % 8
        self._end_bytes = np.array(list(bits), dtype=np.int64)
        self._end_bits = np.array(list(bits.values()), dtype=np.uint8)
        self._other_bits = ~self._end_bits
        self._thread, self._count = thread, count
        self._num_words = vocab_size // 32 + 1  # one bit a token, and that of the end
        self._native: Any = None
        self._last: tuple[np.ndarray, Allowed] | None = None
        self._num_tokens = 0
        self._future: Future[Allowed | None] = thread.submit(self._begin, begin)

    @property
    def num_tokens(self) -> int:
        """Tokens taken."""
        return self._num_tokens

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing can follow. Waits for the mask."""
        return self._result() is None

    def allowed(self) -> Allowed | None:
        """Which tokens may come next; None if the text is whole and nothing can follow. Waits for the thread.

        Raises: UsageError if the grammar needs more time or memory than it may.
        """
        return self._result()

    def take(self, token: int) -> None:
        """Go on behind a token that is allowed, and begin to find out what may follow it."""
        self._num_tokens += 1
        self._count()
        self._future = self._thread.submit(self._advance, self._future, [token])

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens, as if they had never come."""
        if not 0 <= count <= self._num_tokens:
            raise ValueError(f"{count} of {self._num_tokens} tokens cannot be taken back")
        if count:
            self._num_tokens -= count
            self._future = self._thread.submit(self._retreat, self._future, count)

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of some drafted tokens may follow each other from here. Nothing is taken. Waits for the thread."""
        self._result()
        return int(self._native.validate_tokens([int(token) for token in tokens]))

    # --- the thread ---

    def _result(self) -> Allowed | None:
        return self._future.result()

    def _begin(self, begin: Callable[[], Any]) -> Allowed | None:
        self._native = begin()
        return self._mask()

    def _advance(self, before: Future[Any], tokens: list[int]) -> Allowed | None:
        before.result()  # an error stays one
        self._native.consume_tokens(tokens)
        return self._mask()

    def _retreat(self, before: Future[Any], count: int) -> Allowed | None:
        before.result()
        self._native.rollback(count)
        return self._mask()

    def _mask(self) -> Allowed | None:
        self._check()
        words = np.zeros(self._num_words, dtype=np.uint32)
        self._native.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        packed = words.view(np.uint8)
        end_byte, end_bit = divmod(self._vocab_size, 8)
        may_end = bool(packed[end_byte] >> end_bit & 1)
        packed[end_byte] &= (1 << end_bit) - 1  # the bits behind the vocabulary
        packed[self._end_bytes] &= self._other_bits
        if words.any():
            if may_end:
                packed[self._end_bytes] |= self._end_bits
            last = self._last  # inside a text, the next token mostly has the same choice
            if last is None or not np.array_equal(last[0], packed):
                last = self._last = packed, Allowed(packed, self._vocab_size)
            return last[1]
        if may_end:
            return None
        raise _failure("one that no token of the model goes on with")

    def _check(self) -> None:
        if self._native.is_error():
            raise _failure(reason_of(self._native.get_error()))


def reason_of(error: str) -> str:
    """The reason in an error of the package, in one line, without its state."""
    text = error.replace("<non-verbose/>", "").split("<state>")[0].split("<backtrace>")[0]
    return " ".join(text.split())[:300]


def _failure(reason: str) -> UsageError:
    return UsageError(problem("grammar", received=reason, expected="one that can be followed", fix="make it simpler"))
