"""Tools that a request offers, which of them the answer has to call, and calls of earlier answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from sinkrt.text.tools import Tool

from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.requests.base import Fields, Nested

MAX_TOOLS = 128
TOOL_NAME = r"^[A-Za-z0-9_-]{1,64}$"
NAME = "a name of 1 .. 64 letters, digits, '_' and '-'"
TOOLS = f"a list of at most {MAX_TOOLS} functions with different names"
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
CHOICE = '"none", "auto", "required", or the name of one function'


class Function(Fields):
    """A function. parameters: JSON schema of its arguments; without it, it has none."""

    name: str = Field(pattern=TOOL_NAME, description=NAME)
    description: str | None = Field(None, description="a text")
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object")
    strict: bool | None = Field(None, description="true or false")

    @property
    def openai(self) -> dict[str, Any]:
        """The function as chat templates take it."""
        about = {"description": self.description or ""}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": self._schema}}

    @property
    def tool(self) -> Tool:
        """The function as calls of it are checked."""
        return Tool(self.name, self._schema, bool(self.strict))

    @field_validator("parameters")
    @classmethod
    def _is_of_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is not None and parameters.get("type", "object") != "object":
            raise ValueError("expected a schema of the type object: arguments have names")
        return parameters

    @property
    def _schema(self) -> dict[str, Any]:
        """The schema; one that names no type is of an object, which the arguments of a call always are."""
        return NO_ARGUMENTS if self.parameters is None else {"type": "object", **self.parameters}


class ChatTool(Fields):
    """A tool of a chat: a function."""

    nested: ClassVar[Nested] = {"function": Function}

    type: Literal["function"] = Field(description='"function": other tools are not implemented here')
    function: Function = Field(description="an object with a name")


class NamedFunction(Fields):
    """The name of a function."""

    name: str = Field(pattern=TOOL_NAME, description=NAME)


class ChatChoice(Fields):
    """The one function that an answer has to call."""

    nested: ClassVar[Nested] = {"function": NamedFunction}

    type: Literal["function"] = Field(description='"function": other choices are not implemented here')
    function: NamedFunction = Field(description="an object with a name")


class CalledFunction(Fields):
    """A call of an earlier answer. arguments: the JSON text of an object."""

    name: str = Field(pattern=TOOL_NAME, description=NAME)
    arguments: str = Field("{}", description="the text of a JSON object")

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str) -> str:
        try:
            read = json.loads(value or "{}")
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"received {shown(value)}, expected the text of a JSON object")
        return value or "{}"


class FunctionType(Fields):
    """The type of a tool; first of its fields, so that other tools are refused by their type."""

    type: Literal["function"] = Field(description='"function": other tools are not implemented here')


class FunctionTool(Function, FunctionType):
    """A tool of responses: a function without an object of its own."""


class FunctionChoice(NamedFunction):
    """The one function that a response has to call."""

    type: Literal["function"] = Field(description='"function": other choices are not implemented here')


class ToolCallField(Fields):
    """A call of an earlier answer, as OpenAI's clients give it back."""

    nested: ClassVar[Nested] = {"function": CalledFunction}

    id: str = Field(description="the call's id")
    type: Literal["function"] = Field("function", description='"function": other tools are not implemented here')
    function: CalledFunction = Field(description="an object with a name and arguments")


@dataclasses.dataclass(frozen=True)
class Offered:
    """Tools as an answer may use them.

    functions: those that the model is shown. choice: ``auto``, ``required``, or the name of one of them. parallel:
    whether an answer may hold several calls.
    """

    functions: tuple[Function, ...] = ()
    choice: str = "auto"
    parallel: bool = True

    @classmethod
    def of(cls, functions: Sequence[Function], choice: str | None, named: str | None, parallel: bool | None) -> Offered:
        """Tools that a request offers; none if it chooses none. choice: its word; named: the function that it names.

        Raises: ApiError 400.
        """
        names = [function.name for function in functions]
        if len(names) > MAX_TOOLS or len(set(names)) < len(names):
            received = f"{len(names)} functions" if len(names) > MAX_TOOLS else "two functions of one name"
            raise ApiError(400, f"tools: received {received}, expected {TOOLS}", param="tools")
        if choice == "none":
            return cls()
        if named is not None and named not in names:
            raise ApiError(
                400, f"tool_choice: received {shown(named)}, expected one of the tools' names", param="tool_choice"
            )
        if choice == "required" and not names:
            raise ApiError(400, "tool_choice: received 'required', expected with tools", param="tool_choice")
        return cls(tuple(functions), named or choice or "auto", parallel is not False)

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        """The tools as the chat template takes them."""
        return [function.openai for function in self.functions]

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        every = tuple(function.tool for function in self.functions)
        return every if self.choice in ("auto", "required") else tuple(t for t in every if t.name == self.choice)

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return bool(self.functions) and self.choice != "auto"

    @property
    def many(self) -> bool:
        """Whether an answer may hold several calls: one that has to call a named function calls it once."""
        return self.parallel and self.choice in ("auto", "required")

    @property
    def is_bound(self) -> bool:
        """Whether calls have to be made to fit: the model by itself does not always."""
        return self.must_call or any(t.strict for t in self.tools) or (bool(self.functions) and not self.parallel)
