"""Messages of a chat: their text, whole or in parts, and the form that a template wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Message = Mapping[str, Any]
Wants = Literal["text", "parts"]


def message_text(message: Message) -> str:
    """The text of a message, its parts put together; "" if it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def joined(message: Message) -> dict[str, Any]:
    """A message whose text parts are one text; with parts of other kinds between them, one text each."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts: list[Any] = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        if is_text and parts and parts[-1].get("type") == "text":
            parts[-1] = {**parts[-1], "text": parts[-1]["text"] + str(part.get("text", ""))}
        else:
            parts.append({**part, "type": "text", "text": str(part.get("text", ""))} if is_text else part)
    only_text = len(parts) == 1 and parts[0].get("type") == "text"
    return {**message, "content": parts[0]["text"] if only_text else parts or ""}


def shaped(message: Message, wants: Wants) -> dict[str, Any]:
    """A message as the template wants it. Fields that are None are left out, as in transformers."""
    shaped = {key: value for key, value in message.items() if value is not None}
    content = joined(message).get("content")
    if isinstance(content, str):
        shaped["content"] = [{"type": "text", "text": content}] if wants == "parts" else content
    return shaped
