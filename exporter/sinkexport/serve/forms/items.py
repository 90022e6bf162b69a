"""Items of a response's output, as they grow: what was thought, what was said, and calls of functions."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.forms.base import Bytes, call_id, entries

PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


@dataclasses.dataclass
class Item:
    """One item. kind: its type. text: what is said, thought, or given to the function. function: its name."""

    kind: str
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    function: str = ""
    call_id: str = dataclasses.field(default_factory=call_id)
    number: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))

    @property
    def name(self) -> str:
        """Its id on the wire."""
        return PREFIXES[self.kind] + self.number

    def content(self, token_bytes: Bytes | None) -> dict[str, Any]:
        """Its one part. token_bytes: gives the bytes of a token, if log probabilities are reported."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        logs = entries(self.logprobs, token_bytes) if token_bytes else []
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logs}

    def shown(self, status: str, token_bytes: Bytes | None) -> dict[str, Any]:
        """The item as the output holds it."""
        if self.kind == "function_call":
            call = {"call_id": self.call_id, "name": self.function, "arguments": self.text}
            return {"id": self.name, "type": self.kind, **call, "status": status}
        about: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        content = [self.content(token_bytes)]
        return {"id": self.name, "type": self.kind, **about, "status": status, "content": content}
