"""The form of chat completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob
from sinkrt.text.said import ToolCall

from sinkexport.serve.forms.base import Answered, ChoicesForm, Part, Usage, call_id, entries, given


class ChatForm(ChoicesForm):
    """`Form` of chat completions."""

    prefix = "chatcmpl-"
    kind, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._called = [0] * self._choices  # calls of each answer so far

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The response to a request without `stream`."""
        choices = [
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": answer.text if answer.text or not answer.calls else None,
                    "refusal": None,
                    **({"reasoning_content": answer.reasoning} if answer.reasoning else {}),
                    **({"tool_calls": [_call(call) for call in answer.calls]} if answer.calls else {}),
                },
                "finish_reason": answer.finish_reason,
                "logprobs": self._reported(answer.logprobs),
            }
            for i, answer in enumerate(answers)
        ]
        return self._object(self.kind, choices, usage=usage.body, **given(answers[0].facts))

    def opening(self) -> bytes:
        """The first events of a stream: each answer begins with a role."""
        return b"".join(self._delta(i, {"role": "assistant", "content": ""}) for i in range(self._choices))

    def part(self, part: Part) -> bytes:
        """Events for a part of an answer, its end included."""
        events = b""
        if part.text or part.reasoning or part.logprobs:
            said: dict[str, Any] = {"reasoning_content": part.reasoning} if part.reasoning else {}
            if part.text or not said:
                said["content"] = part.text
            events += self._delta(part.choice, said, None, part.logprobs)
        for call in part.calls:
            index = self._called[part.choice]
            self._called[part.choice] += 1
            opening = _call(dataclasses.replace(call, arguments=""))
            events += self._delta(part.choice, {"tool_calls": [{"index": index, **opening}]})
            rest = {"index": index, "function": {"arguments": call.arguments}}
            events += self._delta(part.choice, {"tool_calls": [rest]})
        if part.finish_reason is not None:
            events += self._delta(part.choice, {}, part.finish_reason, **given(part.facts))
        return events

    def _delta(
        self,
        choice: int,
        said: dict[str, Any],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
        **more: Any,
    ) -> bytes:
        reported = self._reported(logprobs) if logprobs else None
        return self._chunk({"index": choice, "delta": said, "finish_reason": reason, "logprobs": reported}, **more)

    def _reported(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": entries(logprobs, self._bytes), "refusal": None} if self._logprobs else None


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
