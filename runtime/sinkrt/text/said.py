"""Parts of an answer: what was thought, what was said, and the tools that were called."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call. arguments: the text of a JSON object, as the model wrote it where that is JSON."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Said:
    """A part of an answer: what was thought, what was said after that, and the tools that were called then."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: Said) -> Said:
        return Said(self.reasoning + other.reasoning, self.content + other.content, self.calls + other.calls)
