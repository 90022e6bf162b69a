"""Formats of tool calls with JSON in them: Hermes and Qwen, Llama 3, Mistral."""

from __future__ import annotations

import abc
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sinkrt.text.said import ToolCall
from sinkrt.text.tools.calls import Tool, call_of, json_object, json_prefix

_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*"')
"""A quotation mark that is not escaped."""


@dataclasses.dataclass(frozen=True)
class LarkWriter:
    """Writes expressions of Lark: for a mark, which may be a special token, a text, and the JSON texts of a schema."""

    mark: Callable[[str], str]
    text: Callable[[str], str]
    json: Callable[[Mapping[str, Any]], str]


class ToolFormat(abc.ABC):
    """How a model writes its calls.

    start: begins calls; "": an answer that begins with an object is a call. end: ends them; "": the answer's end does.
    many: whether one answer may hold several. marks: texts that may be special tokens.
    """

    name: str
    start = ""
    end = ""
    many = True

    @property
    def marks(self) -> frozenset[str]:
        """Texts that the parser looks for, and that may be special tokens."""
        return frozenset({self.start, self.end} - {""})

    def ends_inside(self, body: str) -> bool:  # noqa: ARG002 - for formats with texts in quotes
        """Whether an end mark behind this text is inside a value of the call, and no end."""
        return False

    @abc.abstractmethod
    def parse(self, body: str) -> list[ToolCall] | None:
        """The calls in a text between the marks, or None if it is something else."""

    @abc.abstractmethod
    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them, marks included."""

    @abc.abstractmethod
    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """Rules of Lark: ``calls`` is what follows the first start mark. many: whether there may be several calls."""


class Hermes(ToolFormat):
    """``<tool_call>{"name": .., "arguments": {..}}</tool_call>``, one object for each call: Hermes, Qwen, SmolLM3."""

    name = "hermes"
    start, end = "<tool_call>", "</tool_call>"

    def ends_inside(self, body: str) -> bool:
        """See `ToolFormat`: a mark may be a part of a text."""
        return len(_QUOTE.findall(body)) % 2 == 1

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`."""
        call = call_of(json_object(body), body, "arguments")
        return None if call is None else [call]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""
        return "\n".join(f"{self.start}\n{_object(call, 'arguments')}\n{self.end}" for call in calls)

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """See `ToolFormat`."""
        start, end = write.mark(self.start), write.mark(self.end)
        more = f' ("\\n" {start} "\\n" one_call "\\n" {end})*' if many else ""
        return f'calls: "\\n" one_call "\\n" {end}{more}\n{_one_of(tools, "arguments", write)}'


class Llama(ToolFormat):
    """``{"name": .., "parameters": {..}}`` as the whole answer, perhaps after ``<|python_tag|>``: Llama 3."""

    name = "llama"
    many = False
    tag = "<|python_tag|>"

    @property
    def marks(self) -> frozenset[str]:
        """See `ToolFormat`."""
        return frozenset({self.tag})

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`."""
        calls, at = [], 0
        text = body.strip().removeprefix(self.tag).strip()
        while at < len(text):
            found = json_prefix(text, at)
            if found is None:
                return None
            value, end = found
            name = "arguments" if isinstance(value, dict) and "parameters" not in value else "parameters"
            call = call_of(value, text[at:end], name)
            if call is None or name not in value:
                return None
            calls.append(call)
            at = end + len(text[end:]) - len(text[end:].lstrip("; \n"))
        return calls or None

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""
        return "; ".join(_object(call, "parameters") for call in calls)

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """See `ToolFormat`."""
        more = ' ("; " one_call)*' if many else ""
        return f"calls: one_call{more}\n{_one_of(tools, 'parameters', write)}"


class MistralList(ToolFormat):
    """``[TOOL_CALLS] [{"name": .., "arguments": {..}}, ..]``: Mistral's older models."""

    name = "mistral"
    start = "[TOOL_CALLS]"

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`."""
        text = body.strip()
        found = json_prefix(text)
        if found is None or not isinstance(found[0], list) or not found[0] or text[found[1] :].strip():
            return None
        calls, at = [], 1
        for value in found[0]:
            at += len(text[at:]) - len(text[at:].lstrip(", \n"))
            end = (json_prefix(text, at) or (None, len(text)))[1]
            call = call_of(value, text[at:end], "arguments")
            if call is None:
                return None
            calls.append(call)
            at = end
        return calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""
        return f"{self.start} [{', '.join(_object(call, 'arguments') for call in calls)}]"

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """See `ToolFormat`."""
        more = ' (", " one_call)*' if many else ""
        return f'calls: " "? "[" one_call{more} "]"\n{_one_of(tools, "arguments", write)}'


class MistralNamed(ToolFormat):
    """``[TOOL_CALLS]NAME[ARGS]{..}``, perhaps with ``[CALL_ID]ID`` between: Mistral's newer models."""

    name = "mistral-named"
    start, args, call_id = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
    _head = re.compile(r"\s*([A-Za-z0-9_.-]+)(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?\s*")

    @property
    def marks(self) -> frozenset[str]:
        """See `ToolFormat`."""
        return frozenset({self.start, self.args, self.call_id})

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`."""
        head = self._head.match(body)
        if head is None:
            return None
        arguments = body[head.end() :].strip()
        return None if json_object(arguments) is None else [ToolCall(head[1], arguments)]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""
        return "".join(f"{self.start}{call.name}{self.args}{call.arguments}" for call in calls)

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """See `ToolFormat`."""
        args = write.mark(self.args)
        each = [f"{write.text(tool.name)} {args} {write.json(tool.parameters)}" for tool in tools]
        more = f" ({write.mark(self.start)} one_call)*" if many else ""
        return f"calls: one_call{more}\n{alternatives(each)}"


def alternatives(each: Sequence[str]) -> str:
    """Rule ``one_call`` of expressions for each tool."""
    names = " | ".join(f"call_{i}" for i in range(len(each)))
    return "\n".join([f"one_call: {names}", *(f"call_{i}: {text}" for i, text in enumerate(each)), ""])


def _one_of(tools: Sequence[Tool], arguments: str, write: LarkWriter) -> str:
    heads = [f'{{"name": {json.dumps(tool.name)}, "{arguments}": ' for tool in tools]
    end = write.text("}")
    return alternatives(
        [f"{write.text(head)} {write.json(tool.parameters)} {end}" for head, tool in zip(heads, tools, strict=True)]
    )


def _object(call: ToolCall, arguments: str) -> str:
    return f'{{"name": {json.dumps(call.name)}, "{arguments}": {call.arguments}}}'
