"""Answers as text: feed a prompt, then pick, feed and decode token by token.

Twin of `Session::generate` in runtime/cpp/src/session/session.cpp.
"""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer, AnswerParams
from sinkrt.errors import UsageError, problem
from sinkrt.sampler import SamplingParams
from sinkrt.speculate.choice import Speculation
from sinkrt.speculate.generating import VerifyingSession, pieces
from sinkrt.text import Tokenizer

Prompt = str | Sequence[int] | npt.NDArray[np.integer] | None


class TextSession(VerifyingSession, Protocol):
    """Parts of a `Session` that generating needs."""

    @property
    def batch(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def prefill(self, ids: npt.ArrayLike) -> Any: ...


def generate(
    session: TextSession,
    prompt: Prompt,
    sampling: SamplingParams,
    params: AnswerParams,
    recent: npt.NDArray[np.int64],
    *,
    allow_special: bool,
    speculation: Speculation | None = None,
) -> Iterator[str]:
    """Feed the prompt now, and the answer token by token as its pieces are asked for.

    recent: int64 [C], the session's own record of the last ids, for the repetition penalty; -1: none.
    speculation: what guesses tokens; None: nothing.
    The other arguments, results and errors are those of `Session.generate`, which calls this.
    """
    # Fed here, not at the first next(): a generator's body runs late, and so would its errors.
    _feed_prompt(session, prompt, allow_special=allow_special)
    model = session.manifest.model
    if speculation is not None and sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=secrets.randbits(63))  # a draft model draws the same numbers
    answer = Answer(session.tokenizer, model.eos_token_ids, model.vocab_size, sampling, params)
    answer.follow(session.recent_ids().tolist(), goes_on=prompt is None)
    if speculation is not None:
        return pieces(session, answer, recent, speculation, sampling)
    return _pieces(session, answer, recent)


def check_batch(batch: int) -> None:
    """Make sure that there is one stream.

    Raises: UsageError.
    """
    if batch != 1:
        raise UsageError(
            problem(
                "generate",
                received=f"a bundle of {batch} streams",
                expected="batch 1",
                fix="use a Scheduler, or export with --batch 1",
            )
        )


def _feed_prompt(session: TextSession, prompt: Prompt, *, allow_special: bool) -> None:
    tokenizer, begun = session.tokenizer, bool(session.position[0])
    if prompt is None:
        if not begun:
            raise UsageError(
                problem(
                    "prompt",
                    received="none",
                    expected="some text: the stream is empty",
                    fix="give a prompt, or load a state",
                )
            )
    elif isinstance(prompt, str):
        if not allow_special and (name := tokenizer.special_in(prompt)) is not None:
            warnings.warn(
                f"'{name}' in the prompt is taken as ordinary text; allow_special=True makes it a token",
                stacklevel=4,  # whoever calls Session.generate
            )
        session.prefill(tokenizer.prompt_ids(prompt, begun=begun, allow_special=allow_special))
    else:
        session.prefill(prompt)


def _pieces(session: TextSession, answer: Answer, recent: npt.NDArray[np.int64]) -> Iterator[str]:
    while answer.finish_reason is None:
        token = answer.pick(session.logits[0], recent, int(session.position[0]))
        if token is None:
            break
        session.step([token])
        if piece := answer.push(token):
            yield piece
    if rest := answer.flush():
        yield rest
