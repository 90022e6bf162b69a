"""Answers compared with the types of OpenAI's own package: strictly, and without fields that it does not know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
from openai.types import Completion
from pydantic import BaseModel, TypeAdapter

OURS = {"conversation", "reasoning_content", "position", "new"}
"""Fields that this server adds."""


def strict(kind: Any, data: Any) -> Any:
    """Check data against a type of the package; returns the object."""
    found = TypeAdapter(kind).validate_python(data, strict=True)
    unknown = set(extras(found)) - OURS
    assert not unknown, f"{kind}: {unknown}"
    return found


def completion_chunk(data: dict[str, Any]) -> Completion:
    """Check an event of a streamed completion: the package has no type of its own for it, and so none for null ends."""
    choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in data["choices"]]
    strict(Completion, {**data, "choices": choices})
    return Completion.construct(**data)


def extras(value: Any) -> Iterator[str]:
    """Names of fields that the types do not know."""
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        value = dict(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from extras(item)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Data of the events of a stream; the name of an event, if it has one, is the type in its data."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = None if fields["data"] == "[DONE]" else json.loads(fields["data"])
        if data is not None:
            assert fields.get("event", data.get("type")) == data.get("type")
            found.append(data)
    return found
