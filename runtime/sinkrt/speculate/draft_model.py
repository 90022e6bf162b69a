"""Drafts of a smaller model: another bundle, which follows the stream and runs ahead of it.

It picks as the model does: with the same options, and the same random draw for the same position. So a smaller model
that would say the same most of the time is right most of the time, sampling included.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sinkrt.contract import Manifest
from sinkrt.contract.sampling import SamplingParams
from sinkrt.errors import UsageError, problem
from sinkrt.sampler import Sampler
from sinkrt.speculate.sessions import BundleSession, DraftSession
from sinkrt.speculate.vocabulary import VocabularyMap, map_vocabularies


class DraftModel:
    """Implements `Drafter`. draft: a session of one stream, its own. ids: between its vocabulary and the model's.

    most: tokens of a guess. cost: of one of its steps, in steps of the model.

    What it takes back after a rejected guess is restored in its ring, so that it never forgets more than it should.
    """

    def __init__(self, draft: DraftSession, ids: VocabularyMap, most: int, cost: float = 0.0) -> None:
        if draft.batch != 1:
            raise UsageError(
                problem(
                    "draft bundle", received=f"{draft.batch} streams", expected="batch 1", fix="export with --batch 1"
                )
            )
        self._draft, self._ids, self._cost = draft, ids, cost
        self._rewinder = draft.rewinder(most)
        self._sampling, self._sampler = SamplingParams(), Sampler(SamplingParams(), draft.manifest.model.vocab_size)
        self._fed: collections.deque[int] = collections.deque(maxlen=draft.capacity)  # the model's ids
        self._pending: list[int] = []  # the stream's, not fed yet
        self._guess: list[int] = []
        self._position = self._marked = 0  # of the stream, and of this session where the guess began

    @classmethod
    def of(cls, session: BundleSession, draft: DraftSession) -> DraftModel:
        """Make one for `session`; `draft` is its own from then on, and closed if it does not fit.

        Raises: UsageError if its tokenizer is another; BundleError if a tokenizer is unreadable.
        """
        try:
            cost = _step_bytes(draft.manifest) / _step_bytes(session.manifest)
            return cls(draft, map_vocabularies(session, draft), session.num_drafts, cost)
        except BaseException:
            draft.close()
            raise

    @property
    def cost(self) -> float:
        return self._cost

    def start(self, ids: npt.NDArray[np.int64], position: int, sampling: SamplingParams) -> None:
        if sampling != self._sampling:
            self._sampling = sampling
            self._sampler = Sampler(sampling, self._draft.manifest.model.vocab_size)
        self._reject()
        self._position = position
        wanted = ids[-self._draft.capacity :].tolist()
        if [*self._fed, *self._pending][-len(wanted) :] == wanted:  # the stream that it follows already
            return
        self._draft.reset()
        self._fed.clear()
        self._pending = wanted

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        self._reject()
        self._position += len(ids)
        self._pending += ids
        own = [one for one in self._ids.to_draft[self._pending].tolist() if one >= 0]
        self._fed.extend(self._pending)
        self._pending = []
        if own:
            self._draft.prefill(own)
        elif not self._draft.position[0]:
            return []
        self._marked = int(self._draft.position[0])
        self._rewinder.mark()
        for i in range(count):
            pick = self._pick(i)
            if (token := int(self._ids.to_model[pick])) < 0:
                break
            self._guess.append(token)
            if i < count - 1:
                self._draft.step([pick])
        return list(self._guess)

    def accepted(self, count: int) -> None:
        guess, self._guess = self._guess[:count], []
        fed = int(self._draft.position[0]) - self._marked
        if (kept := min(count, fed)) < fed:
            self._rewinder.back_to(self._marked + kept)
        self._position += count
        self._fed.extend(guess[:kept])
        self._pending = guess[kept:]

    def close(self) -> None:
        self._draft.close()

    def _reject(self) -> None:
        """Take a guess back that nobody has said anything about."""
        if self._guess:
            self.accepted(0)

    def _pick(self, ahead: int) -> int:
        logits = self._draft.logits[0]
        if self._sampling.temperature == 0 and self._sampling.repetition_penalty == 1:
            return int(logits.argmax())
        return self._sampler.sample(logits, self._draft.recent_ids(), self._position + ahead)


def _step_bytes(manifest: Manifest) -> int:
    """Bytes that a step reads, which is what it takes its time for."""
    weights = manifest.graphs["decode"].weight_bytes
    return (manifest.weights_bytes if weights is None else weights) + manifest.state_bytes
