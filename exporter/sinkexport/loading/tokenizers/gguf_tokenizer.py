"""Tokenizers from the metadata of GGUF files: the ids that llama.cpp gives, or a refusal.

Built as a tokenizer.json: byte-level BPE ("gpt2") with the splits of ``tokenizer.ggml.pre``, SentencePiece's BPE
("llama") with merges derived from scores, and BPE over plain characters ("gemma4"). Others are refused.

Known differences from llama.cpp, all of them where the model's own tokenizer is on our side or nothing is lost:
characters that came with Unicode 16 are letters, digits or signs here and unassigned there; the ``rstrip`` of Phi-3's
special tokens takes all white space here and that of ASCII there; of special tokens that overlap in a text the leftmost
goes first here and the longest there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sinkexport.loading.gguf_models.file import GgufFile
from sinkexport.loading.tokenizers.gguf_merges import listed_merges, scored_merges
from sinkexport.loading.tokenizers.gguf_pre import Pre, pre_of
from sinkexport.loading.tokenizers.gguf_vocab import (
    FOLDER,
    KEY,
    NAMED,
    TokenType,
    Vocabulary,
    listed,
    read_vocabulary,
    refused,
)

if TYPE_CHECKING:
    import tokenizers

Json = dict[str, Any]

_OTHER_MODELS = {
    "bert": "WordPiece",
    "t5": "Unigram",
    "rwkv": "RWKV's",
    "plamo2": "PLaMo's",
    "whitespace": "words",
    "hybriddna": "DNA's",
}
_WITHOUT_EFFECT = frozenset(
    {
        "tokenizer.huggingface.json",  # llama.cpp reads the keys beside it
        "tokenizer.rwkv.world",
        "tokenizer.chat_templates",  # lists the names of tokenizer.chat_template.NAME
        *(
            KEY + name
            for name in (
                *("model", "pre", "tokens", "token_type", "scores", "merges"),
                *("add_bos_token", "add_eos_token", "add_space_prefix", "eos_token_ids"),
                "token_type_count",  # of BERT's segments
                "add_sep_token",  # between two texts
                "remove_extra_whitespaces",  # of Unigram vocabularies
                "precompiled_charsmap",
                *("normalizer.lowercase", "normalizer.strip_accents"),  # of BERT's
                "suppress_tokens",  # of sampling
            )
        ),
    }
)
"""Keys that are used elsewhere in this module, and those that change nothing for the vocabularies built here."""


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer and what else a file says of its text.

    tokenizer: `encode(text)` gives llama.cpp's ids with BOS and EOS as the file says, without them with
    ``add_special_tokens=False``; with `encode_special_tokens` set, control tokens in a text are read as text.
    special_tokens: "bos_token" .. -> text, those that the file names. chat_template: the default one.
    chat_templates: those with a name. end_ids: what ends a turn: eos, eot, eom, and the tokens that llama.cpp knows by
    their text. model: ``tokenizer.ggml.model``; pre: ``tokenizer.ggml.pre``.
    """

    tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | None
    chat_templates: Mapping[str, str]
    bos_id: int | None
    end_ids: tuple[int, ...]
    model: str
    pre: str | None
    num_tokens: int


def gguf_tokenizer(file: GgufFile) -> GgufTokenizer | None:
    """Build the tokenizer of a file; None: the file has no vocabulary.

    Raises: UsageError for a vocabulary that cannot be built exactly.
    """
    model = file.get(KEY + "model")
    if (model is None and file.get(KEY + "tokens") is None) or model in ("no_vocab", "none"):
        return None
    pre_name = file.get(KEY + "pre")
    _refuse_other_keys(file)
    vocabulary, parts, bos = _parts(file, str(model), pre_name)
    wanted = {"before": _flag(file, "add_bos_token", bos), "after": _flag(file, "add_eos_token", False)}
    before = [_named_id(vocabulary, "bos", model)] if wanted["before"] else []
    after = [_named_id(vocabulary, "eos", model)] if wanted["after"] else []
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, vocabulary),
        **parts,
        "post_processor": _template(vocabulary, before, after),
    }
    special, prefix = vocabulary.special, "tokenizer.chat_template."
    return GgufTokenizer(
        tokenizer=_tokenizer(document),
        special_tokens={name: vocabulary.tokens[special[key]] for name, key in NAMED.items() if key in special},
        chat_template=file.get("tokenizer.chat_template"),
        chat_templates={key[len(prefix) :]: text for key, text in file.metadata.items() if key.startswith(prefix)},
        bos_id=before[0] if before else special.get("bos"),
        end_ids=vocabulary.ends,
        model=str(model),
        pre=None if pre_name is None else str(pre_name)[:60],
        num_tokens=len(vocabulary.tokens),
    )


def _tokenizer(document: Json) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    except Exception as error:  # the library raises nothing narrower; UnicodeEncodeError for half a character
        raise refused(f"a vocabulary that makes no tokenizer ({str(error)[:80]!r})", "a vocabulary", FOLDER) from error


def _parts(file: GgufFile, model: str, pre_name: str | None) -> tuple[Vocabulary, Json, bool]:
    """The vocabulary, what is between normalizer and decoder, and whether BOS is added if the file does not say."""
    if model == "llama":
        if file.get(KEY + "precompiled_charsmap"):
            raise refused("a SentencePiece vocabulary with a table of characters", "none", FOLDER)
        vocabulary = read_vocabulary(file)
        return vocabulary, _sentencepiece(vocabulary, _flag(file, "add_space_prefix", True)), True
    if model not in ("gpt2", "gemma4"):
        kind = f"{_OTHER_MODELS[model]} ('{model}')" if model in _OTHER_MODELS else repr(str(model)[:60])
        known = "BPE ('gpt2', 'gemma4') or SentencePiece's BPE ('llama')"
        raise refused(f"a GGUF vocabulary of the kind {kind}", known, FOLDER)
    pre = pre_of("gemma4" if model == "gemma4" else pre_name)
    vocabulary = read_vocabulary(file)
    lines = listed(file, "merges", str)
    if not lines:
        raise refused("a BPE vocabulary without tokenizer.ggml.merges", "a list of merges")
    merges = listed_merges(lines, vocabulary.ids)
    build = _raw_bpe if pre.raw else _byte_level
    if pre.always_bos and file.get(KEY + "add_bos_token") is False:
        raise refused("add_bos_token = false for Gemma 4's kind of vocabulary", "true: llama.cpp adds BOS all the same")
    return vocabulary, build(vocabulary, merges, pre), pre.add_bos or pre.always_bos


def _byte_level(vocabulary: Vocabulary, merges: list[tuple[str, str]], pre: Pre) -> Json:
    """BPE over GPT-2's signs for the 256 bytes.

    A byte without a token is left out of the ids. llama.cpp does so after merging, `tokenizers` before it: characters
    with such a byte are split off beforehand, so that what is on both sides of one never merges.
    """
    signs = byte_signs()
    missing = [chr(byte) for byte in range(0x80) if signs[byte] not in vocabulary.ids]
    far = [f"{chr(first)}-{chr(last)}" for lead, first, last in _PLANES if signs[lead] not in vocabulary.ids]
    if any(signs[byte] not in vocabulary.ids for byte in (*range(0x80, 0xC0), *range(0xC2, 0xF1))):
        raise refused("a byte-level vocabulary that lacks bytes of common characters", "a token for each", FOLDER)
    splits = [_split(pattern) for pattern in pre.splits]
    if missing or far:
        listed = "".join("\\" + sign if sign in "[]^-\\&" else sign for sign in missing)
        splits.append(_split(f"[{listed}{''.join(far)}]"))
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, last]},
        "decoder": {**last, "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, byte_fallback=False, ignore_merges=pre.ignore_merges),
    }


def _raw_bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], pre: Pre) -> Json:
    """BPE over characters, with ``▁`` for a space and tokens for the bytes of what is no token."""
    _refuse_missing_bytes(vocabulary)
    if pre.whole_lines:
        _refuse_unmerged_lines(vocabulary, merges)
    return {
        "normalizer": _replace(" ", "▁"),
        "pre_tokenizer": _split(pre.splits[0]),
        "decoder": {"type": "Sequence", "decoders": [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _bpe(vocabulary, merges, byte_fallback=True, ignore_merges=pre.ignore_merges),
    }


def _sentencepiece(vocabulary: Vocabulary, space_prefix: bool) -> Json:
    """SentencePiece's BPE. With `space_prefix` a space comes before each stretch of text between special tokens, also
    where one stands there already.
    """
    _refuse_missing_bytes(vocabulary)
    prepend: list[Json] = [{"type": "Prepend", "prepend": "▁"}] if space_prefix else []
    strip: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_prefix else []
    decoders = [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _replace(" ", "▁")]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, scored_merges(vocabulary), byte_fallback=True, ignore_merges=False),
    }


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], *, byte_fallback: bool, ignore_merges: bool) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(old: str, new: str) -> Json:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _template(vocabulary: Vocabulary, before: list[int], after: list[int]) -> Json | None:
    """Post-processor that adds BOS and EOS; None: neither is added."""
    if not before and not after:
        return None

    def token(index: int) -> Json:
        return {"SpecialToken": {"id": vocabulary.tokens[index], "type_id": 0}}

    def text(name: str) -> Json:
        return {"Sequence": {"id": name, "type_id": 0}}

    start, end = [token(index) for index in before], [token(index) for index in after]
    names = {index: vocabulary.tokens[index] for index in (*before, *after)}
    facts = {name: {"id": name, "ids": [index], "tokens": [name]} for index, name in names.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*start, text("A"), *end],
        "pair": [*start, text("A"), text("B"), *end],
        "special_tokens": facts,
    }


def _added_tokens(file: GgufFile, vocabulary: Vocabulary) -> list[Json]:
    """Tokens that are matched before anything else: control tokens and the like, and user-defined ones."""
    strip_right = _stripping(file, vocabulary)
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": text == _MASKS.get(str(file.get(KEY + "pre"))),
            "rstrip": index in strip_right,
            "normalized": False,
            "special": vocabulary.types[index] != TokenType.USER_DEFINED,
        }
        for index, text in enumerate(vocabulary.tokens)
        if vocabulary.types[index] in kinds
    ]


_MASKS = {"jina-v2-de": "<mask>", "jina-v2-es": "<mask>", "jina-v2-code": "<mask>"}
"""Names of `pre` -> a token that takes the white space before it along."""


def _stripping(file: GgufFile, vocabulary: Vocabulary) -> set[int]:
    """Tokens that take the white space after them along: those of Phi-3, which llama.cpp knows by the model's name."""
    name = str(file.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return set()
    keep = {"<unk>", "<s>", "<|endoftext|>"}
    return {index for index, text in enumerate(vocabulary.tokens) if text not in keep}


def _named_id(vocabulary: Vocabulary, name: str, model: object) -> int:
    """The id of BOS or EOS where one is added to a text."""
    if name in vocabulary.special:
        return vocabulary.special[name]
    usual = {"bos": 1, "eos": 2}[name]  # what llama.cpp assumes for SentencePiece, if the vocabulary bears it out
    if model == "llama" and usual < len(vocabulary.types) and vocabulary.types[usual] == TokenType.CONTROL:
        return usual
    raise refused(f"a vocabulary that adds {name.upper()} to a text without {KEY}{name}_token_id", "its id")


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.get(KEY + name)
    if value is not None and not isinstance(value, bool):
        raise refused(f"{KEY}{name} = {str(value)[:40]!r}", "true or false")
    return default if value is None else value


def byte_signs() -> list[str]:
    """GPT-2's printable sign for each of the 256 bytes."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(0x100)]


_PLANES = (
    (0xF1, 0x40000, 0x7FFFF),
    (0xF2, 0x80000, 0xBFFFF),
    (0xF3, 0xC0000, 0xFFFFF),
    (0xF4, 0x100000, 0x10FFFF),
)
"""First bytes of UTF-8 that have no assigned letters, and their first and last characters."""


def _refuse_missing_bytes(vocabulary: Vocabulary) -> None:
    missing = next((byte for byte in range(0x100) if f"<0x{byte:02X}>" not in vocabulary.ids), None)
    if missing is not None:
        raise refused(
            f"a vocabulary without the token <0x{missing:02X}>",
            "a token for each byte, for characters that are no tokens",
            FOLDER,
        )


def _refuse_unmerged_lines(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> None:
    """Runs of line feeds are taken whole; merging gives the same if each can be made by merges."""
    made = {first + second for first, second in merges}
    for text in vocabulary.tokens:
        if len(text) > 1 and not text.strip("\n") and text not in made:
            raise refused(f"a token of {len(text)} line feeds without a merge", "merges for all of them", FOLDER)


def _refuse_other_keys(file: GgufFile) -> None:
    for key in file.metadata:
        known = key in _WITHOUT_EFFECT or key.startswith("tokenizer.chat_template") or key.endswith("_token_id")
        if key.startswith("tokenizer.") and not known:
            raise refused(f"the key {key[:60]!r}", "keys of vocabularies that are known", FOLDER)
