"""gpt-oss's channels ("harmony"): what a model thinks, says and calls, in messages with headers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from sinkrt.text.said import Said, ToolCall
from sinkrt.text.tools.calls import Tool, json_object
from sinkrt.text.tools.formats import LarkWriter, ToolFormat, alternatives

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
HARMONY_MARKS = frozenset({START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS})
FUNCTIONS = "functions."
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*([a-z]+)")
_HEADER_STARTS = (CHANNEL, START, "assistant", "to=")


class Harmony(ToolFormat):
    """``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{..}<|call|>``: gpt-oss."""

    name = "harmony"
    many = False

    @property
    def marks(self) -> frozenset[str]:
        """See `ToolFormat`."""
        return HARMONY_MARKS

    def parse(self, body: str) -> list[ToolCall] | None:
        """See `ToolFormat`. body: a whole message or several, headers included."""
        splitter = HarmonySplitter()
        parts = [splitter.push(body), splitter.flush()]
        return [call for part in parts for call in part.calls] or None

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `ToolFormat`."""
        return f"{START}assistant".join(
            f"{CHANNEL}commentary to={FUNCTIONS}{call.name} {CONSTRAIN}json{MESSAGE}{call.arguments}{ENDS[1]}"
            for call in calls
        )

    def lark(self, tools: Sequence[Tool], write: LarkWriter, *, many: bool) -> str:  # noqa: ARG002 - one call
        """See `ToolFormat`. The call begins behind ``<|channel|>commentary``, and ends the answer."""
        each = []
        for tool in tools:
            recipient = write.text(f" to={FUNCTIONS}{tool.name} ")
            json_marks = f'{write.mark(CONSTRAIN)} "json" {write.mark(MESSAGE)}'
            each.append(f"{recipient} {json_marks} {write.json(tool.parameters)}")
        return "calls: one_call\n" + alternatives(each)


class HarmonySplitter:
    """Takes an answer apart at its channels: analysis is thought, commentary to a function is a call, else it is said.

    Text without headers, and calls whose arguments are no JSON object, are said.
    """

    def __init__(self) -> None:
        self._held = ""
        self._header: str | None = ""  # of the message whose body comes; None: there is none yet
        self._in_body = False
        self._body = ""  # of a call

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought, as far as is known."""
        return self._in_body and self._kind()[0] == "analysis"

    @property
    def is_undecided(self) -> bool:
        """Whether the header of a message is still incomplete."""
        return not self._in_body

    def push(self, piece: str) -> Said:
        """Take a piece of the answer."""
        self._held += piece
        said = Said()
        while True:
            part, goes_on = self._in_message() if self._in_body else self._in_header()
            said = said + part
            if not goes_on:
                return said

    def flush(self) -> Said:
        """What was held back, once the answer is over."""
        held, self._held = self._held, ""
        if not self._in_body:
            return Said(content="" if _is_header(held) else held)
        part = self._take(held)
        return part + self._close()

    def _in_header(self) -> tuple[Said, bool]:
        header, mark, rest = self._held.partition(MESSAGE)
        if not _is_header(self._held):
            said, self._held, self._in_body, self._header = Said(), self._held, True, f"{CHANNEL}final"
            return said, True
        if not mark:
            return Said(), False
        self._header, self._held, self._in_body = header, rest, True
        return Said(), True

    def _in_message(self) -> tuple[Said, bool]:
        found = [(at, end) for end in (*ENDS, START) if (at := self._held.find(end)) >= 0]
        if found:
            at, end = min(found)
            said = self._take(self._held[:at]) + self._close()
            self._held, self._in_body = self._held[at + (0 if end == START else len(end)) :], False
            return said, True
        size = max(_overlap(self._held, end) for end in (*ENDS, START))
        shown, self._held = self._held[: len(self._held) - size], self._held[len(self._held) - size :]
        return self._take(shown), False

    def _kind(self) -> tuple[str, str]:
        """Channel and recipient of the message."""
        header = self._header or ""
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        return channel[1] if channel else "final", recipient[1] if recipient else ""

    def _take(self, text: str) -> Said:
        channel, recipient = self._kind()
        if recipient.startswith(FUNCTIONS):
            self._body += text
            return Said()
        return Said(reasoning=text) if channel == "analysis" and not recipient else Said(content=text)

    def _close(self) -> Said:
        body, self._body = self._body, ""
        name = self._kind()[1].removeprefix(FUNCTIONS)
        if not body.strip() and not self._kind()[1].startswith(FUNCTIONS):
            return Said()
        if json_object(body or "{}") is None:
            return Said(content=body)
        return Said(calls=(ToolCall(name, body.strip() or json.dumps({})),))


def _is_header(text: str) -> bool:
    """Whether a text is a header's beginning, or may become one."""
    stripped = text.lstrip()
    return not stripped or any(
        stripped.startswith(start) or start.startswith(stripped[: len(start)]) for start in _HEADER_STARTS
    )


def _overlap(text: str, mark: str) -> int:
    """Number of characters at the end of `text` that begin `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
