"""POST /tokenize and /detokenize, in the form of vLLM; llama.cpp's names are taken too."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from sinkexport.serve.requests.base import ChatPrompt, Fields, Nested
from sinkexport.serve.requests.chat import Message
from sinkexport.serve.requests.completion import checked_ids
from sinkexport.serve.requests.tools import TOOLS, ChatTool, Offered

IDS = "a list of token ids"


class TokenizeRequest(Fields):
    """POST /tokenize: a text as `prompt` (vLLM) or `content` (llama.cpp), or `messages`.

    add_special_tokens: put before a text what the model starts its texts with; by default for a `prompt`.
    return_token_strs: give the text of each token too.
    """

    nested: ClassVar[Nested] = {"messages": Message, "tools": ChatTool}

    model: str | None = Field(None, description="the name of this server's model")
    prompt: str | None = Field(None, description="a text")
    content: str | None = Field(None, description="a text")
    messages: list[Message] | None = Field(
        None, min_length=1, fail_fast=True, description="a list of messages, one at least"
    )
    tools: list[ChatTool] | None = Field(None, fail_fast=True, description=TOOLS)
    add_special_tokens: bool | None = Field(None, description="true or false")
    return_token_strs: bool = Field(False, description="true or false")
    allow_special: bool | None = Field(None, description="true or false")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            received = " and ".join(given) or "nothing"
            raise ValueError(f"prompt: received {received}, expected one of prompt, content and messages")
        return self

    @property
    def chat(self) -> ChatPrompt | None:
        """The chat as the template takes it; None for a text."""
        if self.messages is None:
            return None
        messages = [message.plain for message in self.messages]
        offered = Offered.of([tool.function for tool in self.tools or ()], None, None, None)
        return ChatPrompt(messages, self.chat_template_kwargs or {}, None, self.allow_special, None, offered=offered)

    @property
    def special(self) -> bool:
        """Whether to add what the model starts its texts with."""
        return self.content is None if self.add_special_tokens is None else self.add_special_tokens


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = Field(None, description="the name of this server's model")
    tokens: list[int] = Field(description=IDS)

    @field_validator("tokens", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        return checked_ids(value, IDS)
