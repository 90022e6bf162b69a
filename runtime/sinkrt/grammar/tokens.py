"""A tokenizer's tokens as bytes, for the package that matches grammars."""

from __future__ import annotations

from collections.abc import Sequence

from sinkrt.errors import UsageError, problem
from sinkrt.text import Tokenizer

_PROBES = ('{"name": "value", "n": [1, -2.5e3, true, null]}\n', "caf\u00e9 \u4e2d\u6587 \U0001f600 a  b\tc")


class TokenTable:
    """The bytes of each token, in the form that llguidance reads (its ``TokenizerWrapper``).

    The last token is one that no model has. It stands for the end of a text: so a grammar says that a text may end
    whatever the model's own tokens for that are.

    vocab_size: of the model; ids that the tokenizer does not have are never allowed.

    Raises: UsageError if the tokens are not the pieces that texts are made of.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        special = [token for token in range(vocab_size) if tokenizer.special_text(token)]
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)] + [b"<end of text>"]
        self.special_token_ids = [*special, vocab_size]
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self._special = frozenset(special)
        by_bytes: dict[bytes, int] = {}
        for token in range(vocab_size):
            if self.tokens[token] and token not in self._special:
                by_bytes.setdefault(self.tokens[token], token)
        self._by_bytes = by_bytes
        self._longest = max(map(len, by_bytes), default=0)
        self._check()

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that follows another: as the tokenizer gives them if they are the text, else the longest ones.

        A tokenizer may put a space before a text, or write some characters in another way. What a grammar forces must
        be that text itself.
        """
        raw = text.encode() if isinstance(text, str) else bytes(text)
        try:
            ids = self._tokenizer.prompt_ids(raw.decode(), begun=True)
        except UnicodeDecodeError:
            return self._longest_ones(raw)
        return ids if self._bytes(ids) == raw else self._longest_ones(raw)

    def _longest_ones(self, raw: bytes) -> list[int]:
        """Ids of the longest tokens from the left; bytes that no token begins with end them."""
        ids, at = [], 0
        while at < len(raw):
            size = next((n for n in range(self._longest, 0, -1) if raw[at : at + n] in self._by_bytes), 0)
            if not size:
                break
            ids.append(self._by_bytes[raw[at : at + size]])
            at += len(raw[at : at + size])
        return ids

    def _bytes(self, ids: Sequence[int]) -> bytes | None:
        if any(token in self._special for token in ids):
            return None
        return b"".join(self.tokens[token] for token in ids)

    def _check(self) -> None:
        """Make sure that the text of some ids is their bytes put together."""
        before = self._tokenizer.encode_next("a")
        for probe in _PROBES:
            ids = self._tokenizer.prompt_ids(probe, begun=True)
            decoder = self._tokenizer.streaming_decoder(before)
            text = "".join(map(decoder.push, ids)) + decoder.flush()
            raw = self._bytes(ids)
            if raw is None or raw.decode("utf-8", "replace") != text:
                raise UsageError(
                    problem(
                        "grammar",
                        received="a tokenizer whose texts are not its tokens put together",
                        expected="one of the byte-level, SentencePiece or byte-fallback kind",
                        fix="leave the grammar out",
                    )
                )
