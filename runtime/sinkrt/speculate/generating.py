"""Answers with guessed tokens: pieces, positions and picks are those of an answer without, in the same order.

A round: the model's pick for the next token is known. Tokens are guessed after it, one run gives the logits of all of
them, and each is compared with the model's own pick there. What is right is fed (`Session.commit`) just before the
piece of text that it completes is yielded: whoever stops listening finds the stream where it would be without.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer
from sinkrt.contract import Manifest
from sinkrt.contract.sampling import SamplingParams
from sinkrt.speculate.choice import Speculation
from sinkrt.speculate.draft_length import DraftLength


class VerifyingSession(Protocol):
    """Parts of a `Session` that generating with guesses needs."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def position(self) -> npt.NDArray[np.int64]: ...

    @property
    def logits(self) -> npt.NDArray[np.float32]: ...

    @property
    def num_verified(self) -> npt.NDArray[np.int64]: ...

    def recent_ids(self, stream: int = 0) -> npt.NDArray[np.int64]: ...

    def step(self, ids: npt.ArrayLike) -> Any: ...

    def verify(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]: ...

    def commit(self, counts: npt.ArrayLike) -> Any: ...


def pieces(
    session: VerifyingSession,
    answer: Answer,
    recent: npt.NDArray[np.int64],
    speculation: Speculation,
    sampling: SamplingParams,
) -> Iterator[str]:
    """Yield the pieces of an answer. recent: int64 [C], the session's own record of the last ids; -1: none."""
    return _Rounds(session, answer, recent, speculation, sampling).pieces()


class _Rounds:
    """The state of one answer."""

    def __init__(
        self,
        session: VerifyingSession,
        answer: Answer,
        recent: npt.NDArray[np.int64],
        speculation: Speculation,
        sampling: SamplingParams,
    ) -> None:
        self._sampling = sampling
        self._session, self._answer, self._recent = session, answer, recent
        self._drafter, self._tally = speculation.drafter, speculation.tally
        self._length = DraftLength(speculation.most, speculation.drafter.cost)
        self._known = -1  # position up to which the drafter knows the stream
        self._unseen: list[int] = []  # tokens fed since, which it does not know

    def pieces(self) -> Iterator[str]:
        answer, session = self._answer, self._session
        token: int | None = None
        while answer.finish_reason is None:
            position = int(session.position[0])
            if position != self._known:  # the first round, or somebody else has fed the stream
                self._drafter.start(session.recent_ids(), position, self._sampling)
                self._known, self._unseen, token = position, [], None
            if token is None:
                token = answer.pick(session.logits[0], self._recent, position)
            if token is None:
                break
            guess = self._guess(token, position)
            if guess:
                token = yield from self._round(token, guess, position)
            else:
                session.step([token])
                self._tally.steps += 1
                self._known = position + 1
                if piece := self._push(token):
                    yield piece
                token = None
        if rest := answer.flush():
            yield rest

    def _guess(self, token: int, position: int) -> list[int]:
        """Tokens that may follow `token`, which is the next one; none: a plain step is better."""
        room = self._session.manifest.stream.position_limit - position - 1
        count = min(self._length.next(), room)
        if (left := self._answer.tokens_left) is not None:
            count = min(count, left - 1)
        self._unseen.append(token)
        if count < 1:
            return []
        unseen, self._unseen = self._unseen, []
        return self._drafter.propose(unseen, count)

    def _round(self, token: int, guess: list[int], position: int) -> Generator[str, None, int | None]:
        """Verify a guess and feed what is right. Returns: the pick that comes next, if it is known."""
        session, answer = self._session, self._answer
        logits, recent = session.verify([token, *guess])[0], self._recent.copy()
        self._tally.rounds += 1
        accepted, waiting, pick = 0, 0, None
        while True:
            # `token` is the stream's next, at position + accepted.
            recent[(position + accepted) % recent.size] = token
            waiting += 1
            piece = self._push(token)
            if piece or answer.finish_reason is not None:
                session.commit([waiting])
                waiting = 0
                if piece:
                    self._known = position + accepted + 1
                    yield piece
                    if not self._is_undisturbed(position + accepted + 1, len(guess) - accepted):
                        return None
                if answer.finish_reason is not None:
                    break
            if accepted == len(guess):
                break
            pick = answer.pick(logits[accepted], recent, position + accepted + 1)
            if pick != guess[accepted]:
                break
            token, pick = pick, None
            accepted += 1
        if waiting:
            session.commit([waiting])
        self._known = position + accepted + 1
        self._tally.guessed += len(guess)
        self._tally.accepted += accepted
        self._length.update(len(guess), accepted)
        self._drafter.accepted(accepted)
        return pick

    def _push(self, token: int) -> str:
        self._tally.tokens += 1
        return self._answer.push(token)

    def _is_undisturbed(self, position: int, left: int) -> bool:
        """Whether nobody has used the session while it was handed a piece."""
        is_same = int(self._session.position[0]) == position and int(self._session.num_verified[0]) == left
        if not is_same:
            self._known = -1
        return is_same
