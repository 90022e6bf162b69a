"""What all forms of an answer share: parts, usage, events, and the text of single tokens."""

from __future__ import annotations

import abc
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob
from sinkrt.text.said import ToolCall

from sinkexport.serve.errors import ApiError

DONE = b"data: [DONE]\n\n"

Bytes = Callable[[int], bytes]
"""Gives the bytes of a token."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Numbers of tokens. reused: tokens of the prompt that the stream had taken before. reasoning: thought, of answer.

    reasoning: None if the model has no way to think that is known.
    """

    prompt: int
    answer: int
    reused: int
    reasoning: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        details = {} if self.reasoning is None else {"completion_tokens_details": {"reasoning_tokens": self.reasoning}}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.reused},
            **details,
        }


@dataclasses.dataclass(frozen=True)
class Part:
    """What one of the answers grew by.

    thought: whether the model was thinking, so that the log probabilities are of that. facts: of a named conversation,
    at the end. calls: of tools, behind the text.
    """

    choice: int = 0
    text: str = ""
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    thought: bool = False
    facts: dict[str, Any] | None = None
    calls: tuple[ToolCall, ...] = ()

    @property
    def says(self) -> bool:
        """Whether there is anything but an end in it."""
        return bool(self.text or self.reasoning or self.logprobs or self.calls)


@dataclasses.dataclass
class Answered:
    """A whole answer, put together of its parts. said: log probabilities of what it says, without what was thought."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    said: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    facts: dict[str, Any] | None = None
    calls: list[ToolCall] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Answered:
        """Put the parts of one answer together."""
        return cls(
            "".join(part.text for part in parts),
            "".join(part.reasoning for part in parts),
            [entry for part in parts for entry in part.logprobs],
            [entry for part in parts if not part.thought for entry in part.logprobs],
            next((part.finish_reason for part in parts if part.finish_reason is not None), ""),
            next((part.facts for part in parts if part.facts is not None), None),
            [call for part in parts for call in part.calls],
        )


class Form(abc.ABC):
    """Builds the objects of one response.

    model: what clients call it. choices: answers that it has. logprobs: whether it reports them.
    token_bytes: gives the bytes of a token.
    """

    prefix: str
    """Begins the response's id."""

    def __init__(self, model: str, choices: int, *, logprobs: bool, token_bytes: Bytes) -> None:
        self._id = self.prefix + secrets.token_hex(12)
        self._model, self._choices, self._logprobs, self._bytes = model, choices, logprobs, token_bytes
        self._created = int(time.time())

    @abc.abstractmethod
    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The response to a request without `stream`."""

    @abc.abstractmethod
    def opening(self) -> bytes:
        """The first events of a stream."""

    @abc.abstractmethod
    def part(self, part: Part) -> bytes:
        """Events for a part of an answer, its end included."""

    @abc.abstractmethod
    def end(self, usage: Usage) -> bytes:
        """The last events, once all answers have ended."""

    def failed(self, error: ApiError) -> bytes:
        """The last events if an answer fails: it is too late for a status."""
        return event(error.body) + DONE


class ChoicesForm(Form):
    """`Form` of answers in a list of choices. include_usage: whether a stream reports its usage."""

    kind: str
    """Name of the object of a whole response."""
    chunk: str
    """Name of those in a stream."""

    def __init__(self, model: str, choices: int, *, logprobs: bool, token_bytes: Bytes, include_usage: bool) -> None:
        super().__init__(model, choices, logprobs=logprobs, token_bytes=token_bytes)
        self._include_usage = include_usage

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **more}

    def _chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        """An event with one choice."""
        if self._include_usage:
            more["usage"] = None
        return event(self._object(self.chunk, [choice], **more))

    def end(self, usage: Usage) -> bytes:
        """The last events, once all answers have ended."""
        return (event(self._object(self.chunk, [], usage=usage.body)) if self._include_usage else b"") + DONE


_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Characters that many clients take for the end of a line (str.splitlines does), and JSON leaves as they are."""


def event(body: dict[str, Any], name: str | None = None) -> bytes:
    """Encode a server-sent event, its data in one line for every reader."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + text.encode() + b"\n\n"


def call_id() -> str:
    """A new id of a call."""
    return "call_" + secrets.token_hex(12)


def given(facts: dict[str, Any] | None) -> dict[str, Any]:
    """What a response says about a named conversation, if it has one."""
    return {} if facts is None else {"conversation": facts}


def entries(logprobs: Sequence[TokenLogprob], token_bytes: Bytes) -> list[dict[str, Any]]:
    """Log probabilities as chats report them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    return [{**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in logprobs]
