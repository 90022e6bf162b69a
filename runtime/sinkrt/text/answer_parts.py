"""An answer taken apart into what was thought, what was said and the tools that were called."""

from __future__ import annotations

import dataclasses

from sinkrt.text.said import Said
from sinkrt.text.thinking import Thinking, ThinkingSplitter
from sinkrt.text.tools import HARMONY_MARKS, HarmonySplitter, Tool, ToolFormat, ToolSplitter
from sinkrt.text.tools.text_formats import Tags, typed


@dataclasses.dataclass(frozen=True)
class AnswerParts:
    """How an answer is taken apart.

    thinking: the tags of what is thought; None: there are none. calls: the format of tool calls; None: none are
    looked for. tools: those that may be called. has_channels: whether the model writes gpt-oss's channels.
    """

    thinking: Thinking | None = None
    calls: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    has_channels: bool = False

    @property
    def thinks(self) -> bool:
        """Whether thinking is taken out."""
        return self.thinking is not None or self.has_channels

    @property
    def shown(self) -> frozenset[str]:
        """Texts that may be special tokens, and that the answer has to show."""
        tags = frozenset() if self.thinking is None else frozenset((self.thinking.start, self.thinking.end))
        marks = frozenset() if self.calls is None else self.calls.marks
        return tags | marks | (HARMONY_MARKS if self.has_channels else frozenset())

    def splitter(self) -> AnswerSplitter:
        """Takes one answer apart."""
        return AnswerSplitter(self)


class AnswerSplitter:
    """Takes an answer apart, however it is cut into pieces. What it holds back comes with a later piece, or `flush`."""

    def __init__(self, parts: AnswerParts) -> None:
        self._thinking: ThinkingSplitter | HarmonySplitter | None = None
        if parts.has_channels:
            self._thinking = HarmonySplitter()
        elif parts.thinking is not None:
            self._thinking = ThinkingSplitter(parts.thinking)
        self._calls = None if parts.calls is None or parts.has_channels else ToolSplitter(parts.calls)
        self._typed = parts.tools if isinstance(parts.calls, Tags) else ()

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought, as far as is known."""
        return self._thinking is not None and self._thinking.is_thinking

    @property
    def is_undecided(self) -> bool:
        """Whether nothing has come yet, or what may become the beginning of thinking."""
        return self._thinking is not None and self._thinking.is_undecided

    def push(self, piece: str) -> Said:
        """Take a piece of the answer."""
        return self._without_calls(Said(content=piece) if self._thinking is None else self._thinking.push(piece))

    def flush(self) -> Said:
        """What was held back, once the answer is over."""
        said = self._without_calls(Said() if self._thinking is None else self._thinking.flush())
        return said if self._calls is None else said + self._with_types(self._calls.flush())

    def _without_calls(self, said: Said) -> Said:
        if self._calls is None or not said.content:
            return said
        return Said(said.reasoning) + self._with_types(self._calls.push(said.content))

    def _with_types(self, said: Said) -> Said:
        if not self._typed:
            return said
        return dataclasses.replace(said, calls=tuple(typed(call, self._typed) for call in said.calls))
