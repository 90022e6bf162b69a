"""Requests: OpenAI's chat completions and completions, and the fields that only this server has.

A request that asks for what this server cannot do (tools, several choices, log probabilities) is refused: an answer
that silently lacks something is worse than none. A field that changes nothing of an answer is accepted. A null means
that the field is absent. Descriptions of fields say what is expected, for error messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from sinkrt.answer import MAX_STOP_CHARACTERS, MAX_STOPS, AnswerParams
from sinkrt.sampler import MAX_PENALTY, MAX_TOP_K, MIN_PENALTY, SEED_LIMIT, SamplingParams

from sinkexport.serve.errors import shown

NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
"""Names of conversations: they are part of a URL."""

NOT_IMPLEMENTED = {
    "audio": "answers in sound",
    "functions": "functions",
    "moderation": "moderated answers",
    "reasoning_effort": "levels of reasoning",
    "web_search_options": "web searches",
}
"""OpenAI's fields that would change the answer, and what they ask for."""

_STOP = f"a text of 1 .. {MAX_STOP_CHARACTERS} characters, or a list of at most {MAX_STOPS} such texts"
_PROMPT = "one text, or one list of token ids that are integers from 0 on"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


class TextPart(_Strict):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"] = Field(description='"text": pictures, sound and files are not implemented here')
    text: str = Field(description="a text")


class Message(_Strict):
    """One message of a chat, also as OpenAI's clients give it back.

    `name` and `annotations` are accepted and not used, as no template has a place for them.
    """

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant: tools and functions are not implemented here"
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description='a text, or a list of parts {"type": "text", "text": ...}'
    )
    name: str | None = Field(None, description="a text")
    refusal: None = Field(None, description="null: refusals are not implemented here")
    annotations: list[Any] | None = Field(None, description="a list")
    audio: None = Field(None, description="null: sound is not implemented here")
    function_call: None = Field(None, description="null: functions are not implemented here")
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="null or an empty list: tools are not implemented here"
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, value: Any) -> Any:
        """OpenAI lets an assistant's message be without content."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @property
    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """include_usage: send the numbers of tokens in a last chunk. include_obfuscation: accepted and not used."""

    include_usage: bool = Field(False, description="true or false")
    include_obfuscation: bool = Field(False, description="true or false")


NESTED: dict[str, type[BaseModel]] = {"messages": Message, "content": TextPart, "stream_options": StreamOptions}
"""The type of the objects that a field holds, alone or in a list."""


class Request(_Strict):
    """Fields that both kinds of requests share.

    top_k, repetition_penalty, ignore_eos, conversation and allow_special are not OpenAI's. allow_special: let names of
    special tokens in texts become those tokens; None for the server's choice. Fields such as `user` and `metadata`
    change nothing of an answer: they are accepted and not used.
    """

    model: str | None = Field(None, description="the name of this server's model")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='an object such as {"include_usage": true}')
    max_tokens: int | None = Field(None, ge=1, description="an integer >= 1")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and at most 1")
    seed: int | None = Field(None, ge=-(2**63), lt=SEED_LIMIT, description="an integer from -2^63 to 2^64 - 1")
    stop: str | list[str] | None = Field(None, description=_STOP)
    n: Literal[1] | None = Field(None, description="1: several choices are not implemented here")
    frequency_penalty: float | None = Field(
        None, ge=0, le=0, description="0: frequency penalties are not implemented here; repetition_penalty is"
    )
    presence_penalty: float | None = Field(
        None, ge=0, le=0, description="0: presence penalties are not implemented here; repetition_penalty is"
    )
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        None, description="an empty object: a logit bias is not implemented here"
    )
    user: str | None = Field(None, description="a text")
    metadata: dict[str, Any] | None = Field(None, description="an object")
    store: bool | None = Field(None, description="true or false")
    service_tier: str | None = Field(None, description="a text")
    safety_identifier: str | None = Field(None, description="a text")
    prompt_cache_key: str | None = Field(None, description="a text")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="an object")
    prompt_cache_retention: str | None = Field(None, description="a text")

    top_k: int = Field(0, ge=0, le=MAX_TOP_K, description=f"an integer from 0 (all tokens) to {MAX_TOP_K}")
    repetition_penalty: float = Field(
        1.0, ge=MIN_PENALTY, le=MAX_PENALTY, description=f"a number from {MIN_PENALTY} to {MAX_PENALTY} (1: none)"
    )
    ignore_eos: bool = Field(False, description="true or false")
    conversation: str | None = Field(
        None, pattern=NAME_PATTERN, description="a name of 1 .. 64 letters, digits, '.', '_' and '-'"
    )
    allow_special: bool | None = Field(None, description="true or false")

    @field_validator("stop", mode="before")
    @classmethod
    def _short_stops(cls, value: Any) -> Any:
        stops = value if isinstance(value, list) else [value]
        if len(stops) > MAX_STOPS:
            raise ValueError(f"received {len(stops)} texts, expected {_STOP}")
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
                received = f"a text of {len(stop)} characters" if isinstance(stop, str) else shown(stop)
                raise ValueError(f"received {received}, expected {_STOP}")
        return value

    @property
    def unused(self) -> list[str]:
        """Fields that were given and that change nothing."""
        return sorted(self.model_fields_set & UNUSED)

    @property
    def max_answer_tokens(self) -> int | None:
        """Longest answer that the request asks for, tokens; None: it does not say."""
        return self.max_tokens

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters, with OpenAI's defaults where the request is silent: temperature 1."""
        return SamplingParams(
            1.0 if self.temperature is None else self.temperature,
            self.top_k,
            1.0 if self.top_p is None else self.top_p,
            self.repetition_penalty,
            None if self.seed is None else self.seed % SEED_LIMIT,
        )

    def answer_params(self, max_tokens: int) -> AnswerParams:
        """When the answer ends. max_tokens: the server's limit, for requests that do not say."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return AnswerParams(self.max_answer_tokens or max_tokens, stop, self.ignore_eos)


UNUSED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
        "verbosity",
        "n",
        "logprobs",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "tools",
        "tool_choice",
        "function_call",
        "modalities",
    }
)
"""Fields that are accepted with values that change nothing of an answer."""


class ChatRequest(Request):
    """POST /v1/chat/completions. chat_template_kwargs: variables of the chat template, such as enable_thinking."""

    messages: list[Message] = Field(min_length=1, fail_fast=True, description="a list of messages, one at least")
    max_completion_tokens: int | None = Field(None, ge=1, description="an integer >= 1")
    logprobs: Literal[False] | None = Field(None, description="false: log probabilities are not implemented here")
    top_logprobs: Literal[0] | None = Field(None, description="0: log probabilities are not implemented here")
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="an empty list: tools are not implemented here"
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description='"none" or "auto": tools are not implemented here'
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    function_call: Literal["none", "auto"] | None = Field(
        None, description='"none" or "auto": functions are not implemented here'
    )
    functions: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="an empty list: functions are not implemented here"
    )
    response_format: dict[Literal["type"], Literal["text"]] | None = Field(
        None, description='{"type": "text"}: other formats are not implemented here'
    )
    modalities: list[Literal["text"]] | None = Field(
        None, description='["text"]: answers in sound are not implemented here'
    )
    prediction: dict[str, Any] | None = Field(None, description="an object")
    verbosity: Literal["medium"] | None = Field(None, description='"medium": others are not implemented here')
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")

    @property
    def max_answer_tokens(self) -> int | None:
        """Longest answer, tokens; the newer name goes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """POST /v1/completions. prompt: a text or token ids; a list of one of either is taken for that one."""

    prompt: str | list[int] = Field(description=_PROMPT)
    echo: Literal[False] | None = Field(None, description="false: an echo of the prompt is not implemented here")
    best_of: Literal[1] | None = Field(None, description="1: several choices are not implemented here")
    logprobs: None = Field(None, description="null: log probabilities are not implemented here")
    suffix: Literal[""] | None = Field(None, description="an empty text: insertion is not implemented here")

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (str, list)):
            if len(value) > 1:
                raise ValueError(f"received {len(value)} prompts, expected {_PROMPT}")
            value = value[0]
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError(f"received {shown(value)}, expected {_PROMPT}")
        for token in value:
            if type(token) is not int or not 0 <= token < 2**31:
                raise ValueError(f"received {shown(token)} among the ids, expected {_PROMPT}")
        return value
