"""vocab.json and merges.txt as a tokenizer.json: converted, then compared with byte-level BPE written out.

The reference is GPT-2's own algorithm (Radford et al. 2019, encoder.py): split by a pattern, then merge the pair that
comes first in merges.txt until none is left. It shares no code with 'tokenizers'.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import tokenizers
from sinkrt.errors import UsageError, problem
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sinkexport.loading.tokenizers.source_tokenizer import one_line
from sinkexport.loading.tokenizers.tokenizer_corpus import TEXTS, compare
from sinkexport.loading.tokenizers.tokenizer_files import TokenizerFiles

END = "<|endoftext|>"
"""Special token of all `CLASSES`, even if tokenizer_config.json does not name it."""
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Splitting:
    """Splitting of text by a class of transformers: pattern, and whether text is normalised (NFC) before."""

    pattern: str
    is_nfc: bool = False


CLASSES: Mapping[str, Splitting] = {
    "GPT2Tokenizer": Splitting(GPT2),
    "CodeGenTokenizer": Splitting(GPT2),
    "Qwen2Tokenizer": Splitting(QWEN2, is_nfc=True),
}
MODEL_TYPES: Mapping[str, str] = {
    "gptj": "GPT2Tokenizer",
    "codegen": "CodeGenTokenizer",
    "phi": "CodeGenTokenizer",
    "starcoder2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
"""The class where tokenizer_config.json names none."""


def from_bpe_files(files: TokenizerFiles) -> bytes:
    """tokenizer.json of vocab.json and merges.txt.

    Raises: UsageError for broken files, classes that split otherwise, and if the conversion gives other ids.
    """
    splitting = _splitting(files)
    vocabulary, merges = _vocabulary(files), _merges(files)
    has_prefix = bool(files.config.get("add_prefix_space"))
    try:
        library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises plain Exception
        raise _broken(MERGES_FILE, one_line(error)) from error
    if splitting.is_nfc:
        library.normalizer = normalizers.NFC()
    if splitting.pattern == GPT2:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    else:
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(splitting.pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    library.decoder = decoders.ByteLevel()
    reference = Reference(vocabulary, merges, splitting, has_prefix)
    sampled = [reference.text(piece) for piece in list(vocabulary)[:: max(1, len(vocabulary) // 400)]]
    compare(
        lambda text: library.encode(text, add_special_tokens=False).ids,
        reference.encode,
        [*TEXTS, *sampled, " ".join(sampled[::7])],
        VOCABULARY_FILE,
        "byte-level BPE",
    )
    library.add_special_tokens([text for text in (END,) if text in vocabulary])
    return library.to_str(pretty=True).encode()


class Reference:
    """Byte-level BPE, slowly."""

    def __init__(
        self, vocabulary: Mapping[str, int], merges: list[tuple[str, str]], splitting: Splitting, has_prefix: bool
    ) -> None:
        import regex

        self._vocabulary, self._ranks = vocabulary, {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        self._splitting, self._has_prefix = splitting, has_prefix
        self._pattern: Any = regex.compile(splitting.pattern)
        # Printable bytes stand for themselves, the others are characters from U+0100 on, in order.
        kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in kept]
        self._letters = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        """Token ids. A byte that the vocabulary lacks is left out, as the library does."""
        if self._splitting.is_nfc:
            import unicodedata

            text = unicodedata.normalize("NFC", text)
        if self._has_prefix and text and not text.startswith(" "):
            text = " " + text
        ids = []
        for word in self._pattern.findall(text):
            for part in self._merged([self._letters[byte] for byte in word.encode()]):
                if part in self._vocabulary:
                    ids.append(self._vocabulary[part])
        return ids

    def text(self, piece: str) -> str:
        """Text of a piece of the vocabulary; bytes that are no text become U+FFFD."""
        numbers = {letter: byte for byte, letter in self._letters.items()}
        return bytes(numbers[letter] for letter in piece if letter in numbers).decode("utf-8", "replace")

    def _merged(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return parts


def _splitting(files: TokenizerFiles) -> Splitting:
    family = (files.json_object("config.json") or {}).get("model_type")
    name = files.tokenizer_class or (MODEL_TYPES.get(family, "") if isinstance(family, str) else "")
    if name not in CLASSES:
        raise UsageError(
            problem(
                VOCABULARY_FILE,
                received=f"a tokenizer of class {name or 'unknown'} without tokenizer.json",
                expected=f"tokenizer.json, or one of {', '.join(CLASSES)}",
                fix="add the model's tokenizer.json to the folder",
            )
        )
    return CLASSES[name]


def _vocabulary(files: TokenizerFiles) -> dict[str, int]:
    found = files.json_object(VOCABULARY_FILE) or {}
    for text, number in found.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise _broken(VOCABULARY_FILE, f"id {number!r} of {text!r}")
    return found


def _merges(files: TokenizerFiles) -> list[tuple[str, str]]:
    """Lines of two pieces, after a line that begins with '#version'; others may begin with '#' too."""
    lines = (files.text(MERGES_FILE) or "").split("\n")
    found = []
    for number, line in enumerate(lines):
        if not line.strip() or (number == 0 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise _broken(MERGES_FILE, f"line {number + 1}, {line[:40]!r}")
        found.append((pair[0], pair[1]))
    return found


def _broken(name: str, received: str) -> UsageError:
    return UsageError(
        problem(
            name,
            received=received,
            expected="files of byte-level BPE",
            fix="get the file again from where the model came from",
        )
    )
