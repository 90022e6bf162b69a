"""The form of responses: items of an answer, and events that count."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.errors import ApiError
from sinkexport.serve.forms.base import Answered, Bytes, Form, Part, Usage, entries, event, given
from sinkexport.serve.forms.items import Item
from sinkexport.serve.requests import ResponsesRequest
from sinkexport.serve.requests.tools import FunctionTool

_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


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
        self._items: list[Item] = []
        self._held: list[TokenLogprob] = []
        self._number = 0
        self._reason = ""
        self._facts: dict[str, Any] | None = None

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The response to a request without `stream`."""
        (answer,) = answers
        self._reason, self._facts = answer.finish_reason, answer.facts
        if answer.reasoning:
            self._items.append(Item("reasoning", answer.reasoning))
        if answer.text or not (answer.reasoning or answer.calls):
            self._items.append(Item("message", answer.text, answer.said))
        self._items += [Item("function_call", call.arguments, function=call.name) for call in answer.calls]
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
            events += self._delta("reasoning", part.reasoning, ())
        if not part.thought:
            self._held += part.logprobs  # of a token that shows no text yet, for example
        called = bool(part.calls) or any(item.kind == "function_call" for item in self._items)
        if part.text or (part.finish_reason is not None and self._held and not called):
            held, self._held = self._held, []
            events += self._delta("message", part.text, held)
        for call in part.calls:
            events += self._close() + self._begin(Item("function_call", function=call.name))
            self._items[-1].text = call.arguments
            where = self._at(self._items[-1])
            events += self._event("response.function_call_arguments.delta", **where, delta=call.arguments)
        if part.finish_reason is not None:
            self._reason, self._facts = part.finish_reason, part.facts
            if not self._items:
                events += self._begin(Item("message"))
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

    def _delta(self, kind: str, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        events = b""
        if not self._items or self._items[-1].kind != kind:
            events = self._close() + self._begin(Item(kind))
        item = self._items[-1]
        item.text += text
        item.logprobs += logprobs
        name = "output_text" if kind == "message" else "reasoning_text"
        return events + self._event(
            f"response.{name}.delta", **self._at(item), delta=text, **self._logs(item, logprobs)
        )

    def _begin(self, item: Item) -> bytes:
        self._items.append(item)
        where = self._at(item)
        shown = self._shown(item, "in_progress")
        if "content" in shown:
            shown["content"] = []
        events = self._event("response.output_item.added", output_index=where["output_index"], item=shown)
        if item.kind == "message":
            events += self._event("response.content_part.added", **where, part=self._content(item))
        return events

    def _close(self) -> bytes:
        """Events at the end of the last item, if there is one."""
        if not self._items:
            return b""
        item = self._items[-1]
        where = self._at(item)
        if item.kind == "message":
            events = self._event(
                "response.output_text.done", **where, text=item.text, **self._logs(item, item.logprobs)
            ) + self._event("response.content_part.done", **where, part=self._content(item))
        elif item.kind == "reasoning":
            events = self._event("response.reasoning_text.done", **where, text=item.text)
        else:
            events = self._event("response.function_call_arguments.done", **where, arguments=item.text)
        return events + self._event(
            "response.output_item.done", output_index=where["output_index"], item=self._shown(item, self._final)
        )

    def _at(self, item: Item) -> dict[str, Any]:
        where = {"item_id": item.name, "output_index": self._items.index(item)}
        return where if item.kind == "function_call" else {**where, "content_index": 0}

    def _logs(self, item: Item, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log probabilities as events report them: without the bytes, which only items have."""
        if item.kind != "message":
            return {}
        found = entries(logprobs, self._bytes) if self._logprobs else []
        for entry in (*found, *(top for one in found for top in one["top_logprobs"])):
            del entry["bytes"]
        return {"logprobs": found}

    def _content(self, item: Item) -> dict[str, Any]:
        return item.content(self._bytes if self._logprobs else None)

    def _shown(self, item: Item, status: str) -> dict[str, Any]:
        return item.shown(status, self._bytes if self._logprobs else None)

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
            "text": {"format": _text_format(body)},
            "tool_choice": _choice(body),
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            **given(self._facts),
        }

    def _event(self, name: str, /, **fields: Any) -> bytes:
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


def _text_format(body: ResponsesRequest) -> dict[str, Any]:
    form = None if body.text is None else body.text.format
    if form is None or form.type != "json_schema":
        return {"type": "text" if form is None else form.type}
    schema = {"name": form.name or "response", "schema": form.schema_ or {}, "strict": form.strict}
    return {"type": form.type, **schema, **({} if form.description is None else {"description": form.description})}


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else {"type": "function", "name": choice.name}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    about = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "name": tool.name, "parameters": tool.parameters, "strict": bool(tool.strict), **about}
