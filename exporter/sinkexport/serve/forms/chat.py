"""The form of chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.forms.base import Answered, ChoicesForm, Part, Usage, entries, given


class ChatForm(ChoicesForm):
    """`Form` of chat completions."""

    prefix = "chatcmpl-"
    kind, chunk = "chat.completion", "chat.completion.chunk"

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
        return self._object(self.kind, choices, usage=usage.body, **given(answers[0].facts))

    def opening(self) -> bytes:
        """The first events of a stream: each answer begins with a role."""
        return b"".join(self._delta(i, {"role": "assistant", "content": ""}) for i in range(self._choices))

    def part(self, part: Part) -> bytes:
        """Events for a part of an answer, its end included."""
        events = b""
        if part.says:
            said = {"reasoning_content": part.reasoning} if part.reasoning else {}
            if part.text or not said:
                said["content"] = part.text
            events += self._delta(part.choice, said, None, part.logprobs)
        if part.finish_reason is not None:
            events += self._delta(part.choice, {}, part.finish_reason, **given(part.facts))
        return events

    def _delta(
        self,
        choice: int,
        said: dict[str, str],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
        **more: Any,
    ) -> bytes:
        reported = self._reported(logprobs) if logprobs else None
        return self._chunk({"index": choice, "delta": said, "finish_reason": reason, "logprobs": reported}, **more)

    def _reported(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": entries(logprobs, self._bytes), "refusal": None} if self._logprobs else None
