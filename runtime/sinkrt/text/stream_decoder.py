"""Ids to text as they come. Twin of runtime/cpp/src/text/stream_decoder.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 8
"""Tokens that a streaming decoder holds back: a character has at most 4 bytes, so more are no character."""


class StreamingDecoder:
    """Turn ids into text as they come, never splitting a character that spans several tokens.

    Like tokenizers' DecodeStream, with two differences that endless streams need: memory is constant even if a
    model repeats special tokens or broken bytes forever, and no sequence of ids raises.

    after: ids that the stream has taken before. The last MAX_PENDING that have a text count: their text is not given
    again, but the space of a word that follows them is. Decoders leave that out at the beginning of a text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # The ids of the last piece: whether a space comes next depends on them.
        self._context = [int(token) for token in after if self._has_text(token)][-MAX_PENDING:]
        self._pending: list[int] = []  # ids after it that are no whole character yet

    def push(self, token: int) -> str:
        """The text that `token` completes: empty while a character is still incomplete, and for special tokens."""
        if not self._has_text(token):
            return ""
        self._pending.append(token)
        piece = self._piece()
        if piece.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING:
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def flush(self) -> str:
        """The rest when the ids end inside a character, with U+FFFD for what is missing."""
        piece = self._piece() if self._pending else ""
        self._context, self._pending = [], []
        return piece

    def _has_text(self, token: int) -> bool:
        return token not in self._special and self._tokenizer.id_to_token(int(token)) is not None

    def _piece(self) -> str:
        before = str(self._tokenizer.decode(self._context))
        whole = str(self._tokenizer.decode(self._context + self._pending))
        # Bytes can spoil a character before them in the eyes of some decoders; it has been shown already, as it was.
        return whole[len(before) :] if whole.startswith(before) else str(self._tokenizer.decode(self._pending))
