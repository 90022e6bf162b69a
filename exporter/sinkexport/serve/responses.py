"""Responses: one JSON object, or server-sent events."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class Usage:
    """Numbers of tokens. reused: tokens of the prompt that the stream had taken before."""

    prompt: int
    answer: int
    reused: int

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


class Form:
    """Builds the objects of one response.

    chat: chat completions, else completions. include_usage: whether a stream reports its usage.
    """

    def __init__(self, model: str, *, chat: bool, include_usage: bool) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._model = model
        self._created = int(time.time())

    def whole(self, text: str, reason: str, usage: Usage, conversation: dict[str, Any] | None) -> dict[str, Any]:
        """The response to a request without `stream`."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": reason, "logprobs": None}
        return self._object("", [choice], usage=usage.body, **_given(conversation))

    def opening(self) -> bytes | None:
        """The first event of a stream, if there is one: chats begin with a role."""
        return self._event({"role": "assistant", "content": ""}, None) if self._chat else None

    def part(self, text: str) -> bytes:
        """An event with some text."""
        return self._event({"content": text} if self._chat else text, None)

    def end(self, reason: str, usage: Usage, conversation: dict[str, Any] | None) -> bytes:
        """The last events."""
        last = self._event({} if self._chat else "", reason, **_given(conversation))
        if self._include_usage:
            last += event(self._object(".chunk", [], usage=usage.body))
        return last + DONE

    def _event(self, said: dict[str, str] | str, reason: str | None, **more: Any) -> bytes:
        choice = {"index": 0, "delta" if self._chat else "text": said, "finish_reason": reason, "logprobs": None}
        if self._include_usage:
            more["usage"] = None
        return event(self._object(".chunk", [choice], **more))

    def _object(self, suffix: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }


_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Characters that many clients take for the end of a line (str.splitlines does), and JSON leaves as they are."""


def event(body: dict[str, Any]) -> bytes:
    """Encode a server-sent event, one line for every reader."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


def _given(conversation: dict[str, Any] | None) -> dict[str, Any]:
    return {} if conversation is None else {"conversation": conversation}
