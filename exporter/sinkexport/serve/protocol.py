"""What goes over the wire: OpenAI's requests, checked, and its responses and errors.

A field that would change the answer and is not supported is refused, never ignored.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from sinkrt.answer import AnswerParams
from sinkrt.sampler import SamplingParams

MAX_NAME = 200
FINISH_REASONS = {"stop": "stop", "length": "length"}


class ApiError(Exception):
    """An error in OpenAI's form. code: one word for programs; param: the field at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    """Unknown fields are refused; numbers are not made of texts."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message: text only."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message. ``developer`` is what OpenAI calls ``system`` today."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool = False


class _Generation(_Strict):
    """What both endpoints take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    # Beyond OpenAI's:
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False
    conversation: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    # Taken at the value that changes nothing, and no other:
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logit_bias: None = None
    # Taken and of no effect:
    user: str | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return 0 if value == 0 and not isinstance(value, bool) else value

    def sampling(self) -> SamplingParams:
        """How to sample."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return SamplingParams(temperature, self.top_k, top_p, self.repetition_penalty, self.seed)

    def wanted_tokens(self) -> int | None:
        """Tokens that the caller wants at most."""
        return self.max_tokens

    def params(self, limit: int) -> AnswerParams:
        """How long to go on, at most `limit` tokens."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return AnswerParams(min(self.wanted_tokens() or limit, limit), stops, self.ignore_eos)


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions. prompt: one text, or one list of token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def single_prompt(self) -> str | list[int]:
        """The prompt.

        Raises: ApiError unless it is exactly one.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) != 1:
                raise ApiError(400, f"prompt: received {len(prompt)} prompts, expected one; send a request for each",
                               param="prompt")  # fmt: skip
            prompt = prompt[0]
        single: str | list[int] = prompt
        return single


@dataclasses.dataclass
class Reply:
    """Builds the responses to one request.

    kind: ``chat`` or ``text``. conversation: what to tell of a named conversation, if it is one.
    """

    kind: Literal["chat", "text"]
    model: str
    conversation: dict[str, Any] | None = None
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._frame("chat.completion" if self.kind == "chat" else "text_completion", [choice], usage=usage)

    def piece(self, text: str | None, reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A part of a streamed response."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.kind == "chat":
            role = {"role": "assistant"} if first else {}
            choice["delta"] = role if text is None else {**role, "content": text}
        else:
            choice["text"] = text or ""
        return self._frame(self._piece_object, [choice])

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The part of a streamed response that tells the usage."""
        return self._frame(self._piece_object, [], usage=usage)

    @property
    def _piece_object(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        frame = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model,
                 "choices": choices, **more}  # fmt: skip
        return frame if self.conversation is None else {**frame, "conversation": self.conversation}


def usage(prompt_tokens: int, answer_tokens: int, reused_tokens: int) -> dict[str, Any]:
    """OpenAI's count of tokens; `reused_tokens` of the prompt were in the cache already."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": reused_tokens},
    }
