"""What requests look like: OpenAI's chat completions and completions, and the fields that only this server has.

What a model cannot do here (tools, several choices, log probabilities) is refused where a request asks for it: an
answer that silently lacks something is worse than none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from sinkrt.answer import MAX_STOP_CHARACTERS, MAX_STOPS, AnswerParams
from sinkrt.sampler import SEED_LIMIT, SamplingParams

NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
"""Names of conversations: they are part of a URL."""

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat. `name` and `refusal` are taken and not used, as no template has a place for them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """include_usage: send the numbers of tokens in a last chunk. include_obfuscation: taken and not used."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(_Strict):
    """What both kinds of requests share.

    top_k, repetition_penalty, ignore_eos, conversation and allow_special are not OpenAI's; allow_special: let names of
    special tokens in texts become those tokens, None for the server's choice. `user`, `metadata` and the like change
    nothing of an answer and are taken and not used.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=SEED_LIMIT)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: int = Field(default=0, ge=0, lt=2**31)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    ignore_eos: bool = False
    conversation: str | None = Field(default=None, pattern=NAME_PATTERN)
    allow_special: bool | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def max_answer_tokens(self) -> int | None:
        """What the request says of the answer's length."""
        return self.max_tokens

    @property
    def sampling(self) -> SamplingParams:
        """OpenAI's defaults where the request is silent: temperature 1."""
        return SamplingParams(
            1.0 if self.temperature is None else self.temperature,
            self.top_k,
            1.0 if self.top_p is None else self.top_p,
            self.repetition_penalty,
            None if self.seed is None else self.seed % SEED_LIMIT,
        )

    def answer_params(self, max_tokens: int) -> AnswerParams:
        """max_tokens: of the server, for requests that do not say."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return AnswerParams(self.max_answer_tokens or max_tokens, stop, self.ignore_eos)


class ChatRequest(Request):
    """POST /v1/chat/completions. chat_template_kwargs: variables of the chat template, such as enable_thinking."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def max_answer_tokens(self) -> int | None:
        """The newer name goes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """POST /v1/completions. prompt: a text, or token ids, or a list of one of either."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not isinstance(value[0], int):
            if len(value) > 1:
                raise ValueError("one prompt a request")
            return value[0]
        return value
