"""One answer under a grammar: which tokens may come next, found out while the model's step runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkrt.errors import UsageError, problem

MAX_GRAMMAR_TOKENS = 2**16
"""Longest answer under a grammar, tokens: a matcher remembers about 100 bytes of each, to take them back."""


class Matcher:
    """The state of one answer under a grammar.

    begin: makes llguidance's matcher, in the thread that will use it. vocab_size: of the model. ends: tokens that end
    an answer: they are allowed where the grammar may end. thread: runs one function after the other.

    `take` returns at once; masks come from the thread. So does everything that llguidance does, in the order of calls.
    """

    def __init__(self, begin: Callable[[], Any], vocab_size: int, ends: Collection[int], thread: Executor) -> None:
        self._vocab_size = vocab_size
        self._ends = np.array(sorted(end for end in ends if end < vocab_size), dtype=np.int64)
        self._thread = thread
        self._words = np.zeros(vocab_size // 32 + 1, dtype=np.int32)  # one bit a token, and that of the end
        self._native: Any = None
        self._num_tokens = 0
        self._future: Future[npt.NDArray[np.bool_] | None] = thread.submit(self._begin, begin)

    @property
    def num_tokens(self) -> int:
        """Tokens taken."""
        return self._num_tokens

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing can follow. Waits for the mask."""
        return self._result() is None

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next: bool [vocab]; None if the text is whole and nothing can follow.

        Waits for the thread. The array is valid until the next `take` or `rollback`.

        Raises: UsageError if the grammar needs more time or memory than it may.
        """
        return self._result()

    def take(self, token: int) -> None:
        """Go on behind a token that is allowed, and begin to find out what may follow it."""
        self._num_tokens += 1
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

    def _result(self) -> npt.NDArray[np.bool_] | None:
        return self._future.result()

    def _begin(self, begin: Callable[[], Any]) -> npt.NDArray[np.bool_] | None:
        self._native = begin()
        return self._mask()

    def _advance(self, before: Future[Any], tokens: list[int]) -> npt.NDArray[np.bool_] | None:
        before.result()  # an error stays one
        self._native.consume_tokens(tokens)
        return self._mask()

    def _retreat(self, before: Future[Any], count: int) -> npt.NDArray[np.bool_] | None:
        before.result()
        self._native.rollback(count)
        return self._mask()

    def _mask(self) -> npt.NDArray[np.bool_] | None:
        native = self._native
        self._check()
        native.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        allowed = bits[: self._vocab_size].view(np.bool_)
        may_end = bool(bits[self._vocab_size])
        allowed[self._ends] = False
        if allowed.any():
            allowed[self._ends] = may_end
            return allowed
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
