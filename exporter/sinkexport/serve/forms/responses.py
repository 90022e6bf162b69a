"""The form of responses: items of an answer, and events that count."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.errors import ApiError
from sinkexport.serve.forms.base import Answered, Bytes, Form, Part, Usage, entries, event, given
from sinkexport.serve.requests import ResponsesRequest

_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


@dataclasses.dataclass
class _Item:
    """One item of the output, as it grows: what was thought, or the message."""

    is_message: bool
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))

    @property
    def name(self) -> str:
        """Its id on the wire."""
        return ("msg_" if self.is_message else "rs_") + self.id


class ResponsesForm(Form):
    """`Form` of responses, which have one answer.

    body: the request, which a response repeats in part. keep: called with the whole response, once there is one.
    """

    prefix = "resp_"

    def __init__(
        self, model: str, body: ResponsesRequest, *, token_bytes: Bytes, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(model, 1, logprobs=body.reported_logprobs is not None, token_bytes=token_bytes)
        self._body, self._keep = body, keep
        self._items: list[_Item] = []
        self._held: list[TokenLogprob] = []
        self._number = 0
        self._reason = ""
        self._facts: dict[str, Any] | None = None

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The response to a request without `stream`."""
        (answer,) = answers
        self._reason, self._facts = answer.finish_reason, answer.facts
        if answer.reasoning:
            self._items.append(_Item(False, answer.reasoning))
        if answer.text or not answer.reasoning:
            self._items.append(_Item(True, answer.text, answer.said))
        return self._kept(usage)

    def opening(self) -> bytes:
        """The first events of a stream."""
        response = self._response("in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def part(self, part: Part) -> bytes:
        """Events for a part of an answer, its end included."""
        events = b""
        if part.reasoning:
            events += self._delta(False, part.reasoning, ())
        if not part.thought:
            self._held += part.logprobs  # of a token that shows no text yet, for example
        if part.text or (part.finish_reason is not None and self._held):
            held, self._held = self._held, []
            events += self._delta(True, part.text, held)
        if part.finish_reason is not None:
            self._reason, self._facts = part.finish_reason, part.facts
            if not self._items:
                events += self._begin(True)
            events += self._close()
        return events

    def end(self, usage: Usage) -> bytes:
        """The last event, once the answer has ended."""
        return self._event(f"response.{self._final}", response=self._kept(usage))

    def failed(self, error: ApiError) -> bytes:
        """The last event if the answer fails: it is too late for a status."""
        body = {"code": _CODES.get(error.status, "server_error"), "message": error.message}
        return self._event("response.failed", response={**self._response("failed", None), "error": body})

    # --- items ---

    @property
    def _final(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _delta(self, is_message: bool, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        events = b""
        if not self._items or self._items[-1].is_message != is_message:
            events = (self._close() if self._items else b"") + self._begin(is_message)
        item = self._items[-1]
        item.text += text
        item.logprobs += logprobs
        kind = "output_text" if is_message else "reasoning_text"
        return events + self._event(
            f"response.{kind}.delta", **self._at(item), delta=text, **self._logs(item, logprobs)
        )

    def _begin(self, is_message: bool) -> bytes:
        item = _Item(is_message)
        self._items.append(item)
        where = self._at(item)
        shown = {**self._shown(item, "in_progress"), "content": []}
        events = self._event("response.output_item.added", output_index=where["output_index"], item=shown)
        if is_message:
            events += self._event("response.content_part.added", **where, part=self._content(item))
        return events

    def _close(self) -> bytes:
        item = self._items[-1]
        where = self._at(item)
        if item.is_message:
            events = self._event(
                "response.output_text.done", **where, text=item.text, **self._logs(item, item.logprobs)
            ) + self._event("response.content_part.done", **where, part=self._content(item))
        else:
            events = self._event("response.reasoning_text.done", **where, text=item.text)
        return events + self._event(
            "response.output_item.done", output_index=where["output_index"], item=self._shown(item, self._final)
        )

    def _at(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.name, "output_index": self._items.index(item), "content_index": 0}

    def _logs(self, item: _Item, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log probabilities as events report them: without the bytes, which only items have."""
        if not item.is_message:
            return {}
        found = entries(logprobs, self._bytes) if self._logprobs else []
        for entry in (*found, *(top for one in found for top in one["top_logprobs"])):
            del entry["bytes"]
        return {"logprobs": found}

    def _content(self, item: _Item) -> dict[str, Any]:
        if not item.is_message:
            return {"type": "reasoning_text", "text": item.text}
        logs = entries(item.logprobs, self._bytes) if self._logprobs else []
        return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": logs}

    def _shown(self, item: _Item, status: str) -> dict[str, Any]:
        kind = {"type": "message", "role": "assistant"} if item.is_message else {"type": "reasoning", "summary": []}
        return {"id": item.name, **kind, "status": status, "content": [self._content(item)]}

    # --- the response ---

    def _kept(self, usage: Usage) -> dict[str, Any]:
        response = self._response(self._final, usage)
        self._keep(response)
        return response

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        body, done = self._body, status in ("completed", "incomplete")
        last = len(self._items) - 1
        output = [self._shown(item, status if i == last else "completed") for i, item in enumerate(self._items)]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if done else None,
            "status": status,
            "model": self._model,
            "output": output if done else [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            **given(self._facts),
        }

    def _event(self, name: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **fields}, name)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.reused, "cache_write_tokens": 0},
        "output_tokens": usage.answer,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": usage.prompt + usage.answer,
    }
