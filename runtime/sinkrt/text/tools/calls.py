"""Tools that a model may call, and its calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sinkrt.text.said import ToolCall

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function. parameters: JSON schema of its arguments. strict: whether calls must match it."""

    name: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: ANY_OBJECT)
    strict: bool = False


def values_of(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call, read; {} for those that are no JSON object."""
    return json_object(call.arguments) or {}


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_prefix(text: str, at: int = 0) -> tuple[Any, int] | None:
    """The JSON value at a place of a text, and where it ends; None if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    return value, end


def call_of(value: Any, text: str, arguments: str) -> ToolCall | None:
    """The call that a JSON object describes, or None. text: which it was read from. arguments: its name of them."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = value.get(arguments, {})
    if isinstance(given, str):  # some models write them as a text
        return ToolCall(value["name"], given) if json_object(given) is not None else None
    return ToolCall(value["name"], _source_of(text, arguments, given)) if isinstance(given, dict) else None


def _source_of(text: str, arguments: str, given: dict[str, Any]) -> str:
    """The arguments as they stand in the text; written anew where that is not clear."""
    at = text.find(f'"{arguments}"')
    start = text.find("{", at + 1) if at >= 0 else -1
    found = json_prefix(text, start) if start >= 0 else None
    if found is not None and found[0] == given:
        return text[start : found[1]]
    return json.dumps(given, ensure_ascii=False)
