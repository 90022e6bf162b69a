"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from sinkrt.logit_rules import MAX_TOP_LOGPROBS

from sinkexport.serve.requests.base import ChatPrompt, ChoicesRequest, Fields, Nested, StreamOptions
from sinkexport.serve.requests.formats import FormFields, ResponseFormat, StructuredOutputs
from sinkexport.serve.requests.tools import CHOICE, TOOLS, ChatChoice, ChatTool, Offered, ToolCallField


class TextPart(Fields):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"] = Field(description='"text": pictures, sound and files are not implemented here')
    text: str = Field(description="a text")


class Message(Fields):
    """One message of a chat, also as OpenAI's clients give it back.

    `name` and `annotations` are accepted and not used, as no template has a place for them. reasoning_content, or
    reasoning: what an assistant thought, for templates that show it. tool_calls: what an assistant called;
    tool_call_id: of a tool, which call its content answers.
    """

    nested: ClassVar[Nested] = {"content": TextPart, "tool_calls": ToolCallField}

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="system, developer, user, assistant or tool: functions are not implemented here"
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description='a text, or a list of parts {"type": "text", "text": ...}'
    )
    reasoning_content: str | None = Field(None, description="a text")
    reasoning: str | None = Field(None, description="a text")
    name: str | None = Field(None, description="a text")
    refusal: None = Field(None, description="null: refusals are not implemented here")
    annotations: list[Any] | None = Field(None, description="a list")
    audio: None = Field(None, description="null: sound is not implemented here")
    function_call: None = Field(None, description="null: functions are not implemented here")
    tool_calls: Annotated[list[ToolCallField], Field(fail_fast=True)] | None = Field(
        None, description='a list of calls {"id": .., "type": "function", "function": ..}'
    )
    tool_call_id: str | None = Field(None, description="the id of a call")

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, value: Any) -> Any:
        """OpenAI lets an assistant's message be without content."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @model_validator(mode="after")
    def _who_calls(self) -> Message:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: expected with the role tool, and with no other")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: expected with the role assistant only")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        thought = self.reasoning_content or self.reasoning
        more: dict[str, Any] = {"reasoning_content": thought} if thought and role == "assistant" else {}
        if self.tool_calls:
            more["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            more["tool_call_id"] = self.tool_call_id
        return {"role": role, "content": text, **more}


class ChatRequest(ChoicesRequest, FormFields):
    """POST /v1/chat/completions.

    chat_template_kwargs: variables of the chat template, such as enable_thinking. reasoning_format: ``none`` leaves
    what the model thinks in the content, tags included.
    """

    nested: ClassVar[Nested] = {
        "messages": Message,
        "stream_options": StreamOptions,
        "tools": ChatTool,
        "response_format": ResponseFormat,
        "structured_outputs": StructuredOutputs,
    }

    messages: list[Message] = Field(min_length=1, fail_fast=True, description="a list of messages, one at least")
    max_completion_tokens: int | None = Field(None, ge=1, description="an integer >= 1")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS, description=f"an integer from 0 to {MAX_TOP_LOGPROBS}")
    tools: Annotated[list[ChatTool], Field(fail_fast=True)] | None = Field(None, description=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChatChoice | None = Field(None, description=CHOICE)
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    function_call: Literal["none", "auto"] | None = Field(
        None, description='"none" or "auto": functions are not implemented here'
    )
    functions: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="an empty list: functions are not implemented here"
    )
    modalities: list[Literal["text"]] | None = Field(
        None, description='["text"]: answers in sound are not implemented here'
    )
    prediction: dict[str, Any] | None = Field(None, description="an object")
    verbosity: Literal["medium"] | None = Field(None, description='"medium": others are not implemented here')
    reasoning_effort: str | None = Field(None, description="a text that the chat template knows")
    reasoning_format: Literal["auto", "none"] = Field("auto", description='"auto" or "none"')
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: received {self.top_logprobs}, expected with logprobs true")
        return self

    @model_validator(mode="after")
    def _results_follow_calls(self) -> ChatRequest:
        called: set[str] = set()
        for message in self.messages:
            called |= {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise ValueError(
                    "messages: received a message of the role tool, expected after the call that it answers"
                )
        return self

    @property
    def offered(self) -> Offered:
        """Tools that the answer may call.

        Raises: ApiError 400.
        """
        functions, choice = [tool.function for tool in self.tools or ()], self.tool_choice
        if isinstance(choice, ChatChoice):
            return Offered.of(functions, None, choice.function.name, self.parallel_tool_calls)
        return Offered.of(functions, choice, None, self.parallel_tool_calls)

    @property
    def max_answer_tokens(self) -> int | None:
        """Longest answer, tokens; the newer name goes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def reported_logprobs(self) -> int | None:
        """Likeliest tokens that are reported beside each one of the answer; None: no log probabilities."""
        return self.top_logprobs if self.logprobs else None

    @property
    def chat(self) -> ChatPrompt:
        """The chat as the template takes it."""
        return ChatPrompt(
            [message.plain for message in self.messages],
            self.chat_template_kwargs or {},
            self.reasoning_effort,
            self.allow_special,
            self.conversation,
            self.reasoning_format == "auto",
            self.offered,
            self.grammar,
        )
