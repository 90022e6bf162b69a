"""An answer taken apart into text and tool calls, however it is cut into pieces."""

from __future__ import annotations

import re

from sinkrt.text.said import Said
from sinkrt.text.tools.formats import Llama, ToolFormat

MAX_HELD_SPACE = 256
"""Characters of white space that are held back, in case a call follows."""
_MAY_BE_CALL = re.compile(r'\{\s*(?:$|"(?:$|[a-z]+(?:$|"\s*(?:$|:))))')
"""Matches an object with a first name of letters, or what may become one."""


class ToolSplitter:
    """Takes an answer apart into text and calls.

    White space before, between and behind calls is dropped. What begins like a call and is none, or is cut short,
    stays text. From the mark of a call on, text is held back until the call is whole.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._format = form
        self._held = ""
        self._in_call = False
        self._space = ""  # before the call, in case it is none
        self._after_call = False
        self._is_text = False  # of an answer that is a call as a whole or not at all

    def push(self, piece: str) -> Said:
        """Take a piece of the answer."""
        self._held += piece
        if isinstance(self._format, Llama):
            return self._whole_answer()
        said = Said()
        while True:
            if not self._in_call:
                before, mark, rest = self._held.partition(self._format.start)
                if not mark:
                    return said + Said(content=self._all_but_start())
                text = before.rstrip()
                said += Said(content=self._shown(text))
                self._in_call, self._space, self._held = True, before[len(text) :], rest
            mark = self._format.end or self._format.start
            at = self._held.find(mark)
            while at >= 0 and self._format.ends_inside(self._held[:at]):
                at = self._held.find(mark, at + 1)
            if at < 0:
                return said
            said += self._call(self._held[:at], self._format.end)
            self._in_call = not self._format.end  # its next start mark is this one's end
            self._held = self._held[at + len(mark) :]

    def flush(self) -> Said:
        """What was held back, once the answer is over."""
        held, self._held = self._held, ""
        if isinstance(self._format, Llama):
            found = self._format.parse(held) if held.strip() else None
            return Said(content=held) if found is None else Said(calls=tuple(found))
        return self._call(held, "") if self._in_call else Said(content=self._shown(held))

    def _call(self, body: str, mark: str) -> Said:
        """The calls between marks, or the text that they are."""
        found = self._format.parse(body)
        if found is None:
            return Said(content=self._shown(self._space + self._format.start + body + mark))
        self._after_call, self._space = True, ""
        return Said(calls=tuple(found))

    def _shown(self, text: str) -> str:
        """Text without the white space behind a call."""
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return text

    def _all_but_start(self) -> str:
        """Hold back an end that may be the start mark's beginning, and the white space before that."""
        start, text = self._format.start, self._held
        size = next((n for n in range(min(len(text), len(start) - 1), 0, -1) if text.endswith(start[:n])), 0)
        shown = text[: len(text) - size]
        stripped = shown.rstrip()
        if len(shown) - len(stripped) <= MAX_HELD_SPACE:
            shown = stripped
        self._held = text[len(shown) :]
        return self._shown(shown)

    def _whole_answer(self) -> Said:
        """Hold an answer back while it may be a call as a whole."""
        text, tag = self._held.lstrip(), Llama.tag
        if not self._is_text and not tag.startswith(text):  # else it is undecided
            text = text.removeprefix(tag).lstrip()
            self._is_text = bool(text) and _MAY_BE_CALL.match(text) is None
        if not self._is_text:
            return Said()
        held, self._held = self._held, ""
        return Said(content=held)
