"""Cut a text into windows: contexts that are measured one by one."""

from __future__ import annotations

import dataclasses

from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Contexts of T tokens each. beginning: how many of these tokens the tokenizer puts before every text."""

    ids: tuple[tuple[int, ...], ...]
    beginning: int = 0


def text_windows(tokenizer: SourceTokenizer, text: str, num_windows: int, window_tokens: int) -> TextWindows:
    """Cut consecutive pieces of a text. Each follows what the tokenizer puts before a text, as a stream begins.

    Only as much of the text is encoded as is needed.

    Raises: UsageError if the text is too short.
    """
    before = tokenizer.beginning
    piece = window_tokens - len(before)
    needed = num_windows * piece
    chars, ids = 4 * needed, []
    while True:
        ids = tokenizer.encode(text[:chars], special=False)
        if len(ids) > needed or chars >= len(text):  # the last token may be half a word
            break
        chars *= 2
    if piece < 1 or len(ids) < needed:
        raise UsageError(
            problem(
                "text",
                received=f"{len(ids):,} tokens",
                fix="use a longer text, or fewer or shorter windows",
                expected=f"{num_windows} windows of {window_tokens:,} tokens",
            )
        )
    starts = range(0, needed, max(piece, 1))
    return TextWindows(tuple((*before, *ids[start : start + piece]) for start in starts), len(before))
