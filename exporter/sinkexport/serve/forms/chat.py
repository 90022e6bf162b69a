"""The form of chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.forms.base import DONE, Answered, Bytes, Form, Part, Usage, entries, event, given


class ChatForm(Form):
    """`Form` of chat completions. include_usage: whether a stream reports its usage."""

    prefix = "chatcmpl-"

    def __init__(self, model: str, choices: int, *, logprobs: bool, token_bytes: Bytes, include_usage: bool) -> None:
        super().__init__(model, choices, logprobs=logprobs, token_bytes=token_bytes)
        self._include_usage = include_usage

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The response to a request without `stream`."""
        choices = [
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": answer.text,
                    "refusal": None,
                    **({"reasoning_content": answer.reasoning} if answer.reasoning else {}),
                },
                "finish_reason": answer.finish_reason,
                "logprobs": self._reported(answer.logprobs),
            }
            for i, answer in enumerate(answers)
        ]
        return self._object("", choices, usage=usage.body, **given(answers[0].facts))

    def opening(self) -> bytes:
        """The first events of a stream: each answer begins with a role."""
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self._choices))

    def part(self, part: Part) -> bytes:
        """Events for a part of an answer, its end included."""
        events = b""
        if part.says:
            said = {"reasoning_content": part.reasoning} if part.reasoning else {}
            if part.text or not said:
                said["content"] = part.text
            events += self._chunk(part.choice, said, None, part.logprobs)
        if part.finish_reason is not None:
            events += self._chunk(part.choice, {}, part.finish_reason, **given(part.facts))
        return events

    def end(self, usage: Usage) -> bytes:
        """The last events, once all answers have ended."""
        return (event(self._object(".chunk", [], usage=usage.body)) if self._include_usage else b"") + DONE

    def _chunk(
        self,
        choice: int,
        said: dict[str, str],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
        **more: Any,
    ) -> bytes:
        reported = self._reported(logprobs) if logprobs else None
        body = {"index": choice, "delta": said, "finish_reason": reason, "logprobs": reported}
        if self._include_usage:
            more["usage"] = None
        return event(self._object(".chunk", [body], **more))

    def _reported(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": entries(logprobs, self._bytes), "refusal": None} if self._logprobs else None

    def _object(self, suffix: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": f"chat.completion{suffix}",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }
