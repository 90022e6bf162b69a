"""POST /v1/responses: OpenAI's newer form of a chat, for text and calls of functions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from sinkrt.grammar import Grammar
from sinkrt.logit_rules import MAX_TOP_LOGPROBS

from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.requests.base import CONVERSATION, ChatPrompt, Fields, Nested, Request, StreamOptions
from sinkexport.serve.requests.formats import NamedSchema, format_grammar
from sinkexport.serve.requests.tools import CHOICE, TOOLS, CalledFunction, FunctionChoice, FunctionTool, Offered
from sinkexport.serve.response_store import ResponseStore

LOGPROBS = "message.output_text.logprobs"
"""The entry of `include` that asks for log probabilities."""


class ContentPart(Fields):
    """A part of an item; pictures, sound and files are refused."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"] = Field(
        description='"input_text" or "output_text": pictures, sound and files are not implemented here'
    )
    text: str = Field(description="a text")


class InputItem(Fields):
    """A message, also as an answer gave it; what the assistant thought before its next one; a call of a function, or
    what came of it; or the id of any of them.
    """

    nested: ClassVar[Nested] = {"content": ContentPart, "summary": ContentPart, "output": ContentPart}

    type: Literal["message", "reasoning", "function_call", "function_call_output", "item_reference"] = Field(
        "message",
        description='"message", "reasoning", "function_call", "function_call_output" or "item_reference": '
        "other tools are not implemented here",
    )
    role: Literal["system", "developer", "user", "assistant"] | None = Field(
        None, description="system, developer, user or assistant"
    )
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] = Field(
        "", description='a text, or a list of parts {"type": "input_text", "text": ...}'
    )
    summary: Annotated[list[ContentPart], Field(fail_fast=True)] | None = Field(None, description="a list of parts")
    call_id: str | None = Field(None, description="a text")
    name: str | None = Field(None, description="a function's name")
    arguments: str | None = Field(None, description="the text of a JSON object")
    output: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = Field(
        None, description='a text, or a list of parts {"type": "input_text", "text": ...}'
    )
    id: str | None = Field(None, description="a text")
    status: str | None = Field(None, description="a text")
    phase: str | None = Field(None, description="a text")
    encrypted_content: str | None = Field(None, description="a text")

    @model_validator(mode="after")
    def _who_says_what(self) -> InputItem:
        if self.type == "message" and (self.role is None or "content" not in self.model_fields_set):
            raise ValueError("a message: expected with a role and a content")
        if self.type == "item_reference" and self.id is None:
            raise ValueError("an item_reference: expected with an id")
        if self.type == "function_call":
            if self.call_id is None or self.name is None:
                raise ValueError("a function_call: expected with a call_id, a name and arguments")
            CalledFunction(name=self.name, arguments=self.arguments or "{}")
        if self.type == "function_call_output" and (self.call_id is None or self.output is None):
            raise ValueError("a function_call_output: expected with a call_id and an output")
        return self

    @property
    def plain(self) -> str:
        """The text of all parts; the summary of a reasoning that has no other."""
        if isinstance(self.content, str) and self.content:
            return self.content
        return "".join(part.text for part in self.content or self.summary or () if isinstance(part, ContentPart))


class TextFormat(NamedSchema):
    """The form of the answer: a schema has no object of its own."""

    type: Literal["text", "json_object", "json_schema"] = Field(description='"text", "json_object" or "json_schema"')

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("schema: expected with the type json_schema")
        return self


class TextOptions(Fields):
    """How the text of the answer looks."""

    nested: ClassVar[Nested] = {"format": TextFormat}

    format: TextFormat | None = Field(
        None, description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "schema": ..}'
    )
    verbosity: Literal["medium"] | None = Field(None, description='"medium": others are not implemented here')


class ReasoningOptions(Fields):
    """How the model thinks. summary: accepted and not used, as answers hold what was thought itself."""

    effort: str | None = Field(None, description="a text that the chat template knows")
    summary: str | None = Field(None, description="a text")
    generate_summary: str | None = Field(None, description="a text")


class ResponsesRequest(Request):
    """POST /v1/responses. conversation: the name of a conversation, or an object with it as ``id``."""

    nested: ClassVar[Nested] = {
        "input": InputItem,
        "text": TextOptions,
        "reasoning": ReasoningOptions,
        "stream_options": StreamOptions,
        "tools": FunctionTool,
    }

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)] = Field(
        description="a text, or a list of items, one at least"
    )
    instructions: str | None = Field(None, description="a text")
    max_output_tokens: int | None = Field(None, ge=1, description="an integer >= 1")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description=f"an integer from 0 to {MAX_TOP_LOGPROBS}"
    )
    include: list[str] = Field(default_factory=list, description="a list of texts")
    text: TextOptions | None = Field(None, description="an object")
    reasoning: ReasoningOptions | None = Field(None, description="an object")
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = Field(None, description=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(None, description=CHOICE)
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    max_tool_calls: int | None = Field(None, description="an integer")
    truncation: str | None = Field(None, description="a text")
    background: Literal[False] | None = Field(None, description="false: answers in the background are not implemented")
    previous_response_id: str | None = Field(None, description="the id of a response")
    prompt: None = Field(None, description="null: stored prompts are not implemented here")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")

    @field_validator("conversation", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = value.get("id")
            if not isinstance(value, str):
                raise ValueError(f"received {shown(value)}, expected {CONVERSATION}")
        return value

    @model_validator(mode="after")
    def _one_past(self) -> ResponsesRequest:
        if self.previous_response_id is not None and self.conversation is not None:
            raise ValueError("previous_response_id and conversation: received both, expected one of them")
        return self

    @property
    def max_answer_tokens(self) -> int | None:
        """Longest answer, tokens."""
        return self.max_output_tokens

    @property
    def reported_logprobs(self) -> int | None:
        """Likeliest tokens that are reported beside each one of the answer; None: no log probabilities."""
        return self.top_logprobs or 0 if LOGPROBS in self.include else None

    def messages(self, store: ResponseStore, owner: str) -> list[dict[str, Any]]:
        """The chat as the template takes it, with what was before, and without the instructions.

        Raises: ApiError 404 for ids that the store does not have.
        """
        messages: list[dict[str, Any]] = []
        items: list[InputItem] = []
        if self.previous_response_id is not None:
            stored = store.get(owner, self.previous_response_id)
            messages += stored.messages
            items += [InputItem.model_validate(item) for item in stored.response["output"]]
        if not isinstance(self.input, str):
            for item in self.input:
                reference = item.id if item.type == "item_reference" else None
                items.append(item if reference is None else InputItem.model_validate(store.item(owner, reference)))
        messages += _messages(items)
        called = {call["id"] for message in messages for call in message.get("tool_calls") or ()}
        if any(message["role"] == "tool" and message["tool_call_id"] not in called for message in messages):
            raise ApiError(
                400, "input: received a function_call_output, expected with its function_call before it", param="input"
            )
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        return messages

    def chat(self, messages: list[dict[str, Any]]) -> ChatPrompt:
        """The chat with its instructions and the variables of the template. messages: of `messages`."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        effort = None if self.reasoning is None else self.reasoning.effort
        args = self.chat_template_kwargs or {}
        return ChatPrompt(
            [*system, *messages],
            args,
            effort,
            self.allow_special,
            self.conversation,
            offered=self.offered,
            grammar=self.grammar,
        )

    @property
    def grammar(self) -> Grammar | None:
        """What the text of the answer must match; None for any text.

        Raises: UsageError.
        """
        form = None if self.text is None else self.text.format
        return None if form is None else format_grammar(form.type, form)

    @property
    def offered(self) -> Offered:
        """Tools that the answer may call.

        Raises: ApiError 400.
        """
        functions, choice = list(self.tools or ()), self.tool_choice
        if isinstance(choice, FunctionChoice):
            return Offered.of(functions, None, choice.name, self.parallel_tool_calls)
        return Offered.of(functions, choice, None, self.parallel_tool_calls)


def _messages(items: list[InputItem]) -> list[dict[str, Any]]:
    """Items as messages: what was thought and called belongs to the message of the assistant."""
    messages: list[dict[str, Any]] = []
    thought: dict[str, str] = {}
    for item in items:
        if item.type == "reasoning":
            thought = {"reasoning_content": item.plain} if item.plain else {}
            continue
        if item.type == "function_call":
            function = {"name": item.name, "arguments": item.arguments or "{}"}
            call = {"id": item.call_id, "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant" or thought:
                messages.append({"role": "assistant", "content": "", **thought})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            output = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output or ())
            messages.append({"role": "tool", "content": output, "tool_call_id": item.call_id})
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": item.plain, **(thought if role == "assistant" else {})})
        thought = {}
    return messages
