"""Fields that all requests for text share, and what they become."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from sinkrt.answer import MAX_STOP_CHARACTERS, MAX_STOPS, AnswerParams
from sinkrt.grammar import Grammar
from sinkrt.logit_rules import MAX_ANSWER_PENALTY, MAX_BIAS, LogitParams
from sinkrt.sampler import MAX_PENALTY, MAX_TOP_K, MIN_PENALTY, SEED_LIMIT, SamplingParams

from sinkexport.serve.errors import shown

if TYPE_CHECKING:
    from sinkexport.serve.requests.tools import Offered

NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
"""Names of conversations: they are part of a URL."""

STOP = f"a text of 1 .. {MAX_STOP_CHARACTERS} characters, or a list of at most {MAX_STOPS} such texts"
PENALTY = f"a number from {-MAX_ANSWER_PENALTY:g} to {MAX_ANSWER_PENALTY:g}"
BIAS = f"an object of numbers from {-MAX_BIAS:g} to {MAX_BIAS:g} by token id"
CONVERSATION = "a name of 1 .. 64 letters, digits, '.', '_' and '-'"
ALSO_UNUSED = frozenset({"prediction", "verbosity", "function_call"})
_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # one spelling for each


Nested = Mapping[str, Any]
"""Types of objects, kinds of `Fields`, by the name of the field that holds them."""


class Fields(BaseModel):
    """An object of a request. nested: the type of the objects that a field holds, alone or in a list."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    nested: ClassVar[Nested] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value

    @classmethod
    def unknown(cls, value: Mapping[str, Any]) -> list[str]:
        """Names of the fields of a valid object that are ignored, since they are unknown."""
        names = [name for name, item in value.items() if item is not None and name not in cls.model_fields]
        for name, kind in cls.nested.items():
            inner = value.get(name)
            for item in inner if isinstance(inner, list) else [inner]:
                names += [f"{name}.{other}" for other in kind.unknown(item)] if isinstance(item, dict) else []
        return sorted(set(names))


class StreamOptions(Fields):
    """include_usage: send the numbers of tokens in a last chunk. include_obfuscation: accepted and not used."""

    include_usage: bool = Field(False, description="true or false")
    include_obfuscation: bool = Field(False, description="true or false")


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A chat as the chat template takes it.

    messages: each with ``role`` and ``content``, and OpenAI's calls of tools. args: variables of the template.
    effort: its ``reasoning_effort``. allow_special: see `Request`. conversation: the name, or None. split: whether
    thinking is taken out of the answer. offered: tools. grammar: what the text of the answer must match; None: any.
    """

    messages: list[dict[str, Any]]
    args: Mapping[str, Any]
    effort: str | None
    allow_special: bool | None
    conversation: str | None
    split: bool = True
    offered: Offered | None = None
    grammar: Grammar | None = None


class Request(Fields):
    """Fields that all kinds of requests share.

    top_k, repetition_penalty, ignore_eos, conversation and allow_special are not OpenAI's. allow_special: let names of
    special tokens in texts become those tokens; None for the server's choice. Fields such as `user` and `metadata`
    change nothing of an answer: they are accepted and not used.
    """

    nested: ClassVar[Nested] = {"stream_options": StreamOptions}

    model: str | None = Field(None, description="the name of this server's model")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='an object such as {"include_usage": true}')
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and at most 1")
    seed: int | None = Field(None, ge=-(2**63), lt=SEED_LIMIT, description="an integer from -2^63 to 2^64 - 1")
    stop: str | list[str] | None = Field(None, description=STOP)
    frequency_penalty: float = Field(0.0, ge=-MAX_ANSWER_PENALTY, le=MAX_ANSWER_PENALTY, description=PENALTY)
    presence_penalty: float = Field(0.0, ge=-MAX_ANSWER_PENALTY, le=MAX_ANSWER_PENALTY, description=PENALTY)
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] = Field(
        default_factory=dict, description=BIAS
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
    conversation: str | None = Field(None, pattern=NAME_PATTERN, description=CONVERSATION)
    allow_special: bool | None = Field(None, description="true or false")

    @field_validator("stop", mode="before")
    @classmethod
    def _short_stops(cls, value: Any) -> Any:
        stops = value if isinstance(value, list) else [value]
        if len(stops) > MAX_STOPS:
            raise ValueError(f"received {len(stops)} texts, expected {STOP}")
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
                received = f"a text of {len(stop)} characters" if isinstance(stop, str) else shown(stop)
                raise ValueError(f"received {received}, expected {STOP}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name in value if not _ID.fullmatch(name)), None)
        if wrong is not None:
            raise ValueError(f"received {shown(wrong)}, expected {BIAS}")
        return value

    @property
    def unused(self) -> list[str]:
        """Fields that were given and that change nothing."""
        return sorted(self.model_fields_set & UNUSED)

    @property
    def include_usage(self) -> bool:
        """Whether a stream reports its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def max_answer_tokens(self) -> int | None:
        """Longest answer that the request asks for, tokens; None: it does not say."""
        raise NotImplementedError

    @property
    def reported_logprobs(self) -> int | None:
        """Likeliest tokens that are reported beside each one of the answer; None: no log probabilities."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """Answers that the request asks for."""
        return 1

    @property
    def samplings(self) -> tuple[SamplingParams, ...]:
        """Sampling parameters of each answer, with OpenAI's defaults where the request is silent: temperature 1.

        A seed is that of the first one; the others count on from it, as in vLLM.
        """
        return tuple(
            SamplingParams(
                1.0 if self.temperature is None else self.temperature,
                self.top_k,
                1.0 if self.top_p is None else self.top_p,
                self.repetition_penalty,
                None if self.seed is None else (self.seed + choice) % SEED_LIMIT,
            )
            for choice in range(self.choices)
        )

    def answer_params(self, max_tokens: int) -> AnswerParams:
        """When the answer ends. max_tokens: the server's limit, for requests that do not say."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        logits = LogitParams(
            self.presence_penalty,
            self.frequency_penalty,
            {int(token): bias for token, bias in self.logit_bias.items()},
            self.reported_logprobs,
        )
        return AnswerParams(self.max_answer_tokens or max_tokens, stop, self.ignore_eos, logits=logits)


UNUSED = ALSO_UNUSED | {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "modalities",
    "truncation",
}
"""Fields that are accepted with values that change nothing of an answer."""


class ChoicesRequest(Request):
    """Fields of requests that may ask for several answers."""

    max_tokens: int | None = Field(None, ge=1, description="an integer >= 1")
    n: int = Field(1, ge=1, le=128, description="an integer from 1 to the number of streams of this server")

    @property
    def choices(self) -> int:
        """Answers that the request asks for."""
        return self.n
