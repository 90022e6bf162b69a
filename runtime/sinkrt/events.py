"""What a `Scheduler` reports: results of a run, and its load."""

from __future__ import annotations

import dataclasses

from sinkrt.logit_rules import TokenLogprob


@dataclasses.dataclass(frozen=True)
class Event:
    """Result of one run for one conversation.

    A request's first event is empty: the conversation has a stream. There is one for the first token of the answer
    too, even if it shows no text yet.

    text: what its answer grew by, whole characters. finish_reason: of `Answer`, or ``error`` or ``cancelled``; None
    while it goes on. error: the reason, in one line. prompt_tokens, answer_tokens: fed so far for this request.
    logprobs: of the tokens since the last event, if the request asks for them.
    """

    conversation: str
    text: str
    finish_reason: str | None
    error: str | None
    prompt_tokens: int
    answer_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Load:
    """Load of a scheduler, in conversations: in a stream with work, without one but with work, parked, all."""

    running: int
    waiting: int
    parked: int
    conversations: int
