"""POST /v1/completions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from sinkrt.logit_rules import MAX_TOP_LOGPROBS

from sinkexport.serve.errors import shown
from sinkexport.serve.requests.base import ChoicesRequest, Nested, StreamOptions
from sinkexport.serve.requests.formats import FormFields, ResponseFormat, StructuredOutputs

PROMPT = "one text, or one list of token ids that are integers from 0 on"


class CompletionRequest(ChoicesRequest, FormFields):
    """POST /v1/completions. prompt: a text or token ids; a list of one of either is taken for that one."""

    nested: ClassVar[Nested] = {
        "stream_options": StreamOptions,
        "response_format": ResponseFormat,
        "structured_outputs": StructuredOutputs,
    }

    prompt: str | list[int] = Field(description=PROMPT)
    echo: Literal[False] | None = Field(None, description="false: an echo of the prompt is not implemented here")
    best_of: int | None = Field(None, ge=1, description="the same as n: choosing among more is not implemented here")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description=f"an integer from 0 to {MAX_TOP_LOGPROBS}, or null"
    )
    suffix: Literal[""] | None = Field(None, description="an empty text: insertion is not implemented here")

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (str, list)):
            if len(value) > 1:
                raise ValueError(f"received {len(value)} prompts, expected {PROMPT}")
            value = value[0]
        if isinstance(value, str):
            return value
        return checked_ids(value, PROMPT)

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: received {self.best_of}, expected n, which is {self.n}")
        return self

    @property
    def max_answer_tokens(self) -> int | None:
        """Longest answer, tokens."""
        return self.max_tokens

    @property
    def reported_logprobs(self) -> int | None:
        """Likeliest tokens that are reported beside each one of the answer; None: no log probabilities."""
        return self.logprobs


def checked_ids(value: Any, expected: str) -> list[int]:
    """Check that a value is a list of token ids.

    Raises: ValueError.
    """
    if not isinstance(value, list):
        raise ValueError(f"received {shown(value)}, expected {expected}")
    for token in value:
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"received {shown(token)} among the ids, expected {expected}")
    return value
