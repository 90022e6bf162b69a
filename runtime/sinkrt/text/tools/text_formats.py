"""Formats of tool calls in other syntaxes than JSON: Python's (LFM2), and tags (Qwen3-Coder)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sinkrt.errors import UsageError, problem
from sinkrt.text.said import ToolCall
from sinkrt.text.tools.calls import Tool, values_of
from sinkrt.text.tools.formats import LarkWriter, ToolFormat, alternatives

MAX_SOURCE = 2**16
"""Longest text that is read as Python."""
_CONSTANTS = {"true": True, "false": False, "null": None}


class Pythonic(ToolFormat):
    """``<|tool_call_start|>[name(key="value"), ..]<|tool_call_end|>``: LFM2."""

    name = "pythonic"
    start, end = "<|tool_call_start|>", "<|tool_call_end|>"

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`."""
        if len(body) > MAX_SOURCE:
            return None
        try:
            tree = ast.parse(body.strip(), mode="eval").body
            calls = [self._call(node) for node in (tree.elts if isinstance(tree, ast.List) else [tree])]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        return calls or None

    @staticmethod
    def _call(node: ast.expr) -> ToolCall:
        if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
            raise ValueError("no call by keywords")
        arguments = {str(word.arg): _literal(word.value) for word in node.keywords}
        return ToolCall(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False))

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""
        arguments = [", ".join(f"{key}={value!r}" for key, value in values_of(call).items()) for call in calls]
        each = ", ".join(f"{call.name}({given})" for call, given in zip(calls, arguments, strict=True))
        return f"{self.start}[{each}]{self.end}"

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """See `ToolFormat`. Values are JSON, which Python reads but for true, false and null; the parser does those."""
        each = []
        for tool in tools:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", tool.name):
                raise _unwritable(f"the tool '{tool.name}'", "a name that Python can read")
            keys = [
                (write.text(f"{key}="), write.json(schema), must)
                for key, schema, must in arguments_of(tool, named=True)
            ]
            opening, closing = write.text(f"{tool.name}("), write.text(")")
            each.append(f"{opening} ({_in_order(keys)}) {closing}")
        more = ' (", " one_call)*' if many else ""
        return f'calls: "[" one_call{more} "]" {write.mark(self.end)}\n{alternatives(each)}'


class Tags(ToolFormat):
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``: Qwen3-Coder.

    A value is text: JSON where the schema asks for anything but a text, which `typed` finds out.
    """

    name = "tags"
    start, end = "<tool_call>", "</tool_call>"
    _call = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
    _parameter = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`."""
        found = self._call.fullmatch(body)
        if found is None or self._parameter.sub("", found[2]).strip():
            return None
        values = dict(self._parameter.findall(found[2]))
        return [ToolCall(found[1].strip(), json.dumps(values, ensure_ascii=False))]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""

        def parameters(call: ToolCall) -> str:
            return "".join(
                f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
                for key, value in values_of(call).items()
            )

        return "\n".join(
            f"{self.start}\n<function={call.name}>\n{parameters(call)}</function>\n{self.end}" for call in calls
        )

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:
        """See `ToolFormat`."""
        each = []
        for tool in tools:
            text = write.text(f"<function={tool.name}>\n")
            for key, schema, must in arguments_of(tool):
                if _is_plain_text(schema):
                    inner = 'tag_text "\\n</parameter>\\n"'
                elif any(name in schema for name in ("enum", "const")) and _texts(schema):
                    choices = " | ".join(write.text(choice) for choice in _texts(schema))
                    inner = f'({choices}) "\\n</parameter>\\n"'
                elif _may_be_text(schema):
                    raise _unwritable(
                        f"the argument '{key}' of '{tool.name}'", "a plain text, a choice of texts, or none"
                    )
                else:
                    inner = f'{write.json(schema)} "\\n</parameter>\\n"'
                head = write.text(f"<parameter={key}>\n")
                text += f" ({head} {inner})" + ("" if must else "?")
            each.append(f'{text} "</function>\\n"')
        start, end = write.mark(self.start), write.mark(self.end)
        more = f' ("\\n" {start} "\\n" one_call {end})*' if many else ""
        texts = "tag_text: /[^<\\n]*(\\n[^<\\n]+)*/\n" if any("tag_text" in text for text in each) else ""
        return f'calls: "\\n" one_call {end}{more}\n{texts}{alternatives(each)}'


def typed(call: ToolCall, tools: Sequence[Tool]) -> ToolCall:
    """A call of `Tags` with values that are JSON where the tool's schema wants no text."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    properties = tool.parameters.get("properties") if tool is not None else None
    if not isinstance(properties, Mapping):
        return call
    values = values_of(call)
    for key, value in values.items():
        if isinstance(value, str) and key in properties and not _may_be_text(properties[key]):
            try:
                values[key] = json.loads(value)
            except (ValueError, RecursionError):
                values[key] = value
    return ToolCall(call.name, json.dumps(values, ensure_ascii=False))


def arguments_of(tool: Tool, *, named: bool = False) -> list[tuple[str, dict[str, Any], bool]]:
    """Name, schema and whether it is required, of each argument. named: names must be those of Python.

    Raises: UsageError for a schema that is not that of an object with properties.
    """
    schema = tool.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    others = set(schema) - {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    others -= {"title", "description", "$schema", "strict", "default", "examples", "$comment"}
    if (
        not isinstance(properties, Mapping)
        or not isinstance(required, list)
        or others
        or set(required) - set(properties)
    ):
        raise _unwritable(f"the parameters of '{tool.name}'", "an object with properties, and nothing besides")
    wrong = [key for key in properties if named and not key.isidentifier()]
    if wrong:
        raise _unwritable(f"the argument '{wrong[0]}' of '{tool.name}'", "a name that Python can read")
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return [
        (key, {**(value if isinstance(value, Mapping) else {}), **shared}, key in required)
        for key, value in properties.items()
    ]


def _in_order(keys: Sequence[tuple[str, str, bool]]) -> str:
    """Expression of arguments in order, with commas between those that are there."""
    if not keys:
        return '""'
    expression = ""
    for i in range(len(keys) - 1, -1, -1):  # of those from i on, without a comma before the first
        key, value, must = keys[i]
        rest = "".join(f' (", " {k} {v}){"" if m else "?"}' for k, v, m in keys[i + 1 :])
        here = f"{key} {value}{rest}"
        expression = here if must else (f"{here} | {expression}" if expression else f'{here} | ""')
    return expression


def _is_plain_text(schema: Mapping[str, Any]) -> bool:
    asked = set(schema) - {"title", "description", "default", "examples", "$defs", "definitions", "$comment"}
    return schema.get("type") == "string" and asked == {"type"}


def _texts(schema: Mapping[str, Any]) -> list[str]:
    choices = schema.get("enum", [schema.get("const")])
    return choices if isinstance(choices, list) and all(isinstance(c, str) and "<" not in c for c in choices) else []


def _may_be_text(schema: Any) -> bool:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    return "string" in kinds if isinstance(kinds, list) else kinds in ("string", None)


def _literal(node: ast.expr) -> Any:
    """The value of a literal. Raises: ValueError."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) for key in node.keys if key is not None]
        if len(keys) != len(node.keys) or not all(isinstance(key, str) for key in keys):
            raise ValueError("no JSON object")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    value = ast.literal_eval(node)
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise ValueError("no JSON value")
    return value


def _unwritable(received: str, expected: str) -> UsageError:
    return UsageError(
        problem(
            "tools",
            received=f"{received}, which this model's format of calls cannot be made to follow",
            expected=expected,
            fix="leave tool_choice and strict out, or change the schema",
        )
    )
