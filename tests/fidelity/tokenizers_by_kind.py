"""Small tokenizers of the kinds that real models have, made here: no files."""

from __future__ import annotations

import functools

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Special tokens of all of them; the first begins every text."""
NAMED = "<think>"
"""An added token of all of them that is not special."""
WORDS = [
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
    "▁ab",
    "<",
    "|",
    ">",
    "/",
    "s",
    "i",
    "m",
    "_",
    "e",
    "n",
    "d",
    "t",
    "r",
    "k",
    "h",
    "x",
    "1",
    "2",
    "▁<",
    "<|",
    "|>",
]


def with_control(tokenizer: tokenizers.Tokenizer, *, normalized: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer with the added tokens, and with a beginning of every text.

    normalized: whether special tokens are looked for after normalisation, as in older Llama 2 folders.
    """
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=normalized) for name in CONTROL])
    tokenizer.add_tokens([AddedToken(NAMED, special=False, normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", special_tokens=[("<s>", bos)])
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2, Llama 3 and Qwen: bytes, a pattern that cuts words, and merges across a control token's letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "<"), ("<", "|"), ("Ġ<", "|"), ("|", ">"), ("a", "b"), ("i", "m"), ("im", "_"), ("Ġ", "a")]
    words = [*letters, *("".join(merge) for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return with_control(tokenizer)


def sentence_piece(*, normalized: bool = False) -> tokenizers.Tokenizer:
    """Llama 2: ``</s>`` is in the vocabulary, with merges that make it. Not normalized: a space before texts."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "</", "</s", "</s>", "<s", "<s>"]
    merges = [
        ("▁", "a"),
        ("a", "b"),
        ("▁a", "b"),
        ("▁", "<"),
        ("<", "|"),
        ("|", ">"),
        ("<", "/"),
        ("</", "s"),
        ("</s", ">"),
        ("<", "s"),
        ("<s", ">"),
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prepended = [] if normalized else [normalizers.Prepend("▁")]
    tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_control(tokenizer, normalized=normalized)


def unigram() -> tokenizers.Tokenizer:
    """T5 and XGLM: pieces with scores, a space before the first word of a text only."""
    words = ["<unk>", *WORDS, "</s>"]
    tokenizer = tokenizers.Tokenizer(
        models.Unigram([(word, -float(1 + len(words) / (1 + i))) for i, word in enumerate(words)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return with_control(tokenizer)


KINDS = {
    "byte level": byte_level,
    "sentence piece": sentence_piece,
    "sentence piece, normalized": functools.partial(sentence_piece, normalized=True),
    "unigram": unigram,
}


def spaced_words(size: int) -> tokenizers.Tokenizer:
    """``size`` ids: a word for the unknown, <s> (special), then words with their space: any id shows it."""
    words = {"▁unk": 0, "▁": 2, **{f"▁w{i}": i for i in range(3, size)}}
    tokenizer = tokenizers.Tokenizer(models.WordLevel({**words, "<s>": 1}, unk_token="▁unk"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer
