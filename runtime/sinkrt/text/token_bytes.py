"""Bytes of single tokens: a token may be a part of a character only, which no decoded text shows."""

from __future__ import annotations

import json
import re

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Gives the bytes of a token, as it stands inside a text.

    Byte-level vocabularies write each byte as a character, and vocabularies with byte fallback write ``<0xE2>``. Any
    other token is decoded behind another one, since decoders leave out the space at the beginning of a text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._by_character = _byte_characters() if '"ByteLevel"' in decoder else {}
        self._has_fallback = '"ByteFallback"' in decoder
        ids = tokenizer.encode("a", add_special_tokens=False).ids
        self._before = ids[-1:]
        self._before_text = str(tokenizer.decode(self._before))

    def __call__(self, token: int) -> bytes:
        """The bytes of a token, the name of a special one; none for an id that the tokenizer does not have."""
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._by_character:
            return b"".join(self._by_character.get(character) or character.encode() for character in name)
        if self._has_fallback and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        text = str(self._tokenizer.decode([*self._before, token]))
        return text.removeprefix(self._before_text).encode()


def _byte_characters() -> dict[str, bytes]:
    """The byte of each character of a byte-level vocabulary.

    Source: ``bytes_to_unicode`` of GPT-2's encoder.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    characters = {chr(byte): bytes([byte]) for byte in own}
    return characters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
