"""The vocabulary of a GGUF file: tokens, their types, special ids, the ends of a turn, as llama.cpp reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.gguf_models.file import END_NAMES, GgufFile

KEY = "tokenizer.ggml."


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # the format spells it so
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
"""Names in chat templates -> names of the ids in a file."""

_BAR = "\uff5c"  # of DeepSeek's tokens
_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|ifm|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>"),
        *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "[e~[", f"<{_BAR}end▁of▁sentence{_BAR}>"),
    }
)
"""Tokens that end a turn by their text, whatever the file says."""


def _fill_in(word: str, hole: str, short: str) -> tuple[str, ...]:
    """The texts of a token for filling in, of several families."""
    first = (f"<|fim_{word}|>", f"<fim-{word}>", f"<fim_{word}>", f"<{_BAR}fim▁{hole}{_BAR}>")
    return (*first, f"<{short}>", f"▁<{short}>", f"<|code_{word}|>", f"<|{word}|>", f"<|plamo:fim_{word}|>")


_FILL_IN: Mapping[str, tuple[str, ...]] = {
    "fim_pre": _fill_in("prefix", "begin", "PRE"),
    "fim_suf": _fill_in("suffix", "hole", "SUF"),
    "fim_mid": _fill_in("middle", "end", "MID"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>", "<|plamo:file_separator|>"),
}
"""Tokens of code models for filling in; the last three end a turn."""
_OLD_NAMES = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
_HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens of a file.

    tokens: their texts by id. ids: the reverse. types: TokenType by id. scores: by id, empty without any.
    special: "bos", "eos", "unknown" .. -> id, those that the file names. ends: ids that end a turn, ascending.
    """

    tokens: Sequence[str]
    ids: Mapping[str, int]
    types: Sequence[int]
    scores: Sequence[float]
    special: Mapping[str, int]
    ends: tuple[int, ...]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Read it.

    Raises: UsageError for lists of different lengths, a token that comes twice, and ids outside the vocabulary.
    """
    texts = listed(file, "tokens", str)
    if not texts:
        raise refused("a GGUF file without tokenizer.ggml.tokens", "a list of tokens")
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    ids = {text: index for index, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(text for index, text in enumerate(tokens) if ids[text] != index)
        raise refused(f"the token {twice!r} for two ids", "one id for each token")
    types = list(listed(file, "token_type", int, len(tokens))) or [TokenType.NORMAL] * len(tokens)
    scores = listed(file, "scores", (int, float), len(tokens))
    if any(math.isnan(score) for score in scores):
        raise refused(f"a score in {KEY}scores that is no number", "numbers")
    special = _special_ids(file, len(tokens))
    more = listed(file, "eos_token_ids", int)  # Ollama's
    if any(not 0 <= index < len(tokens) for index in more):
        raise refused(f"{KEY}eos_token_ids = {list(more)[:8]}", f"ids of the vocabulary, below {len(tokens)}")
    return Vocabulary(
        tokens=tokens,
        ids=ids,
        types=types,
        scores=scores,
        special=special,
        ends=tuple(sorted({*_ends(ids, types, special), *more})),
    )


FOLDER = "export the model's folder, which has a tokenizer of its own"


def refused(received: str, expected: str, fix: str = "convert the model again with a current llama.cpp") -> UsageError:
    """Refusal of a vocabulary that cannot be built exactly."""
    return UsageError(problem("tokenizer", received=received, expected=expected, fix=fix))


def listed(file: GgufFile, name: str, kind: type | tuple[type, ...], size: int | None = None) -> Sequence[Any]:
    """A list in a file, its first `size` entries; empty: there is none.

    Raises: UsageError for another type and for a shorter list.
    """
    found = file.get(KEY + name)
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(item, kind) for item in found):
        raise refused(f"{KEY}{name} of another type", "a list")
    if size is not None and len(found) < size:
        raise refused(f"{len(found)} entries in {KEY}{name}", f"one for each of {size} tokens")
    return found if size is None else found[:size]


def _special_ids(file: GgufFile, size: int) -> dict[str, int]:
    out = {}
    for name in (*dict.fromkeys((*NAMED.values(), *END_NAMES)), *_FILL_IN, *_OLD_NAMES.values()):
        key = f"{KEY}{name}_token_id"
        index = file.get(key)
        if index is None:
            continue
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < size:
            raise refused(f"{key} = {index}", f"an id of the vocabulary, below {size}")
        out[name] = index
    return out


def _ends(ids: Mapping[str, int], types: list[int], special: Mapping[str, int]) -> tuple[int, ...]:
    """The ids that llama.cpp ends a generation at, but for ids that it assumes where a file names none.

    Tokens with certain texts are control tokens, whatever their type in the file: `types` is changed accordingly.
    """

    def control(texts: Iterable[str]) -> list[int]:
        found = [ids[text] for text in texts if text in ids]
        for index in found:
            types[index] = TokenType.CONTROL
        return found

    fill_in = {}
    for name, texts in _FILL_IN.items():
        given = special.get(name, special.get(_OLD_NAMES.get(name, "")))
        fill_in[name] = [given] if given is not None else control(sorted(texts, key=lambda text: ids.get(text, -1)))[:1]
    ends = {index for name in ("fim_pad", "fim_rep", "fim_sep") for index in fill_in[name]}
    ends.update(control(_ENDS))
    ends.update(special[name] for name in END_NAMES if name in special)
    for text in _HARMONY:
        if text in ids:
            types[ids[text]] = TokenType.USER_DEFINED

    def has(*texts: str) -> bool:
        return any(ids.get(text) in ends for text in texts)

    if has("<|end|>") and has("<|call|>", "<|calls|>") and has("<|return|>", "<|flush|>"):  # gpt-oss, solar-open
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if has("</s>") and has("<|tool_response>", "<|plamo:eos|>"):  # Gemma 4 has a plain token of that text
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
    return tuple(sorted(ends))
