"""What a model thinks before it answers: the tags of its chat template, and an answer taken apart at them."""

from __future__ import annotations

import dataclasses
import enum

from sinkrt.text.said import Said

KNOWN_TAGS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
MAX_HELD_SPACE = 256
"""Characters of white space that are held back, in case the end tag follows."""


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a chat template marks what the model thinks. opened: whether the prompt has opened it already."""

    start: str
    end: str
    opened: bool = False


def thinking_in(literals: str, opening: str) -> Thinking | None:
    """The tags of a chat template, or None if it knows none.

    literals: all text that the template writes or looks for itself. opening: what it opens an answer with.
    """
    for start, end in KNOWN_TAGS:
        if end in literals:
            return Thinking(start, end, opening.rfind(start) > opening.rfind(end))
    return None


class _State(enum.Enum):
    BEGUN = enum.auto()  # nothing but white space has come
    OPENED = enum.auto()  # the same, inside the tags
    THINKING = enum.auto()
    CLOSED = enum.auto()  # nothing but white space since the end tag
    CONTENT = enum.auto()


class ThinkingSplitter:
    """Takes an answer apart, however it is cut into pieces.

    A model thinks once, first of all: a start tag further on is text. White space around the tags belongs to neither
    part. An answer that ends before the end tag was only thought.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._tags = thinking
        self._state = _State.OPENED if thinking.opened else _State.BEGUN
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought, as far as is known."""
        return self._state in (_State.OPENED, _State.THINKING)

    @property
    def is_undecided(self) -> bool:
        """Whether nothing has come yet, or what may become the start tag."""
        return self._state is _State.BEGUN

    def push(self, piece: str) -> Said:
        """Take a piece of the answer."""
        text, self._held = self._held + piece, ""
        reasoning = ""
        if self._state is _State.BEGUN:
            stripped = text.lstrip()
            if self._tags.start.startswith(stripped[: len(self._tags.start)]):
                if len(stripped) < len(self._tags.start):
                    self._held = text
                    return Said()
                text, self._state = stripped[len(self._tags.start) :], _State.OPENED
            else:
                self._state = _State.CONTENT
        if self._state is _State.OPENED:
            # A model may write the start tag although the prompt has it.
            text = text.lstrip().removeprefix(self._tags.start).lstrip()
            if text and not self._tags.start.startswith(text):
                self._state = _State.THINKING
            else:
                self._held = text
                return Said()
        if self._state is _State.THINKING:
            reasoning, found, text = text.partition(self._tags.end)
            if not found:
                return Said(self._all_but_end(reasoning))
            reasoning, self._state = reasoning.rstrip(), _State.CLOSED
        if self._state is _State.CLOSED:
            text = text.lstrip()
            if text:
                self._state = _State.CONTENT
        return Said(reasoning, text)

    def flush(self) -> Said:
        """What was held back, once the answer is over."""
        held, self._held = self._held, ""
        return Said(held.rstrip(), "") if self.is_thinking else Said("", held)

    def _all_but_end(self, text: str) -> str:
        """Hold back an end that may be the end tag's beginning, and the white space before that."""
        end = self._tags.end
        size = next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)
        shown = text[: len(text) - size]
        stripped = shown.rstrip()
        if len(shown) - len(stripped) <= MAX_HELD_SPACE:
            shown = stripped
        self._held = text[len(shown) :]
        return shown
