"""The form of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.forms.base import Answered, ChoicesForm, Part, Usage, given


class CompletionForm(ChoicesForm):
    """`Form` of completions."""

    prefix = "cmpl-"
    kind = chunk = "text_completion"

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The response to a request without `stream`."""
        choices = [
            {
                "index": i,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "logprobs": self._reported(answer.logprobs),
            }
            for i, answer in enumerate(answers)
        ]
        return self._object(self.kind, choices, usage=usage.body, **given(answers[0].facts))

    def opening(self) -> bytes:
        """The first events of a stream: there are none."""
        return b""

    def part(self, part: Part) -> bytes:
        """Events for a part of an answer, its end included."""
        events = self._piece(part.choice, part.text, None, part.logprobs) if part.says else b""
        if part.finish_reason is not None:
            events += self._piece(part.choice, "", part.finish_reason, **given(part.facts))
        return events

    def _piece(
        self, choice: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprob] = (), **more: Any
    ) -> bytes:
        reported = self._reported(logprobs) if logprobs else None
        return self._chunk({"index": choice, "text": text, "finish_reason": reason, "logprobs": reported}, **more)

    def _reported(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Log probabilities as completions report them: the chosen token is always among the likeliest."""
        if not self._logprobs:
            return None
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in (*one.top, (one.token, one.logprob))}
                for one in logprobs
            ],
            "text_offset": [one.offset for one in logprobs],
        }

    def _name(self, token: int) -> str:
        """The text of a token. What is no text by itself is written as OpenAI does: two tokens never share a name."""
        raw = self._bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
