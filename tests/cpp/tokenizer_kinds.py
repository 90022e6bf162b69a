"""Small tokenizers of every kind that the C++ runtime reads: two models trained once, and any parts around them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tests.cpp.charsmap import charsmap
from tests.cpp.probe import CppTokenizer, Probe

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = (
    "the cat sat on the mat and the dog ate the hat ",
    "Съешь ещё этих мягких булок 日本語 日本語のテキスト हिन्दी हिन्दी ",
    "In 1984, 42% of 3.14159 were 1,000,000; see §12-34!? (really) ... ",
    "naïve cafés cost ½ of Füße — “quoted” ‘text’ e\u0301 a\u0308 ",
    "def f(x):\n\treturn x  +  1\n\n\n    # comment\r\n",
) * 3
SPECIAL = ["<unk>", "<s>", "</s>"]


def _text() -> list[str]:
    """Texts as SentencePiece sees them: spaces are marks."""
    return [text.replace(" ", "▁") for text in CORPUS]


@functools.cache
def _bpe() -> str:
    """A BPE model of 500 tokens and all bytes, as JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(
        _text(), trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    return json.dumps(json.loads(tokenizer.to_str())["model"])


@functools.cache
def _byte_bpe() -> str:
    """A byte-level BPE model of 400 tokens, as JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    return json.dumps(json.loads(tokenizer.to_str())["model"])


@functools.cache
def _unigram() -> str:
    """A Unigram model of 300 tokens and all bytes, as JSON; some scores are equal and some odd sums tie."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    extra = [
        ["xx", -3.5],
        ["xxx", -5.25],
        ["xxxx", -7],
        ["x", -1.75],
        ["zz", -0.30000000000000004],
        ["z", -0.1],
        ["zzz", -0.30000000000000004441],
        ["q", -11.123456789012345678901234],
        ["qq", -22.246913578024691357802468],
        *([byte, -20.0] for byte in BYTES),
    ]
    taken = {text for text, _ in extra}
    model["vocab"] = [pair for pair in model["vocab"] if pair[0] not in taken] + extra
    return json.dumps(model)


def model(kind: str, **options: Any) -> dict[str, Any]:
    """One of the models, ``bpe``, ``byte-bpe`` or ``unigram``, with options of its JSON changed."""
    text = {"bpe": _bpe, "byte-bpe": _byte_bpe, "unigram": _unigram}[kind]()
    return {**json.loads(text), **options}


def without(model: dict[str, Any], drop: Sequence[str]) -> dict[str, Any]:
    """A BPE model without some tokens of one character, and without the merges that need them."""
    left = {text: i for text, i in model["vocab"].items() if text not in drop}
    merges = [pair for pair in model["merges"] if all(part in left for part in (*pair, "".join(pair)))]
    return {**model, "vocab": left, "merges": merges}


def added(content: str, number: int, **flags: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
        **flags,
    }


def whole(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json. Without a list of added tokens it has its special ones."""
    special = [added(text, i, special=True) for i, text in enumerate(SPECIAL)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
        **parts,
    }


def metaspace(scheme: str = "always", *, split: bool = True) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def byte_level(*, use_regex: bool = True, prefix_space: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": use_regex}


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern: str, behavior: str, *, kind: str = "Regex", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(key: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """parts under ``normalizers``, ``pretokenizers``, ``processors`` or ``decoders``."""
    return {"type": "Sequence", key: list(parts)}


def bytewise(**parts: Any) -> dict[str, Any]:
    """A tokenizer whose ids are the bytes of what its parts make of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = {"type": "BPE", "vocab": {character: i for i, character in enumerate(alphabet)}, "merges": []}
    last = byte_level(use_regex=False)
    before = parts.pop("pre_tokenizer", None)
    splitter = last if before is None else sequence("pretokenizers", before, last)
    return whole(made, added_tokens=[], decoder=byte_level(), pre_tokenizer=splitter, **parts)


def load(probe: Probe, path: Path, raw: dict[str, Any]) -> tuple[CppTokenizer, tokenizers.Tokenizer]:
    """A tokenizer.json, written to `path`, in C++ and Python.

    Raises: ProbeError if C++ refuses it.
    """
    path.write_text(json.dumps(raw), encoding="utf-8")
    return probe.tokenizer(path), tokenizers.Tokenizer.from_file(str(path))


LLAMA_DECODER = sequence(
    "decoders",
    replace("▁", " "),
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)
BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
NORMALIZERS: list[dict[str, Any]] = [
    *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")),
    *(
        {"type": "Strip", "strip_left": left, "strip_right": right}
        for left, right in ((True, True), (True, False), (False, True))
    ),
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Prepend", "prepend": "ab"},
    replace(" ", "▁"),
    replace("a", ""),
    {"type": "Precompiled", "precompiled_charsmap": charsmap({"a": "bb", "é": "", " ": "  ", "m": "", "ﬁ": "fi"})},
    replace("ab", "x"),
    replace(" {2,}", "▁", "Regex"),
    replace("\\s+", " ", "Regex"),
    replace("``", '"'),
]
PRE_TOKENIZERS: list[dict[str, Any]] = [
    *(metaspace(scheme, split=cut) for scheme in ("always", "first", "never") for cut in (True, False)),
    *({"type": "Punctuation", "behavior": behavior} for behavior in BEHAVIORS),
    *(split(r"\d+|[,.]", behavior, invert=invert) for behavior in BEHAVIORS for invert in (False, True)),
    *(split(" ", behavior, kind="String", invert=invert) for behavior in BEHAVIORS for invert in (False, True)),
    {"type": "Digits", "individual_digits": True},
    {"type": "Digits", "individual_digits": False},
    {"type": "WhitespaceSplit"},
    {"type": "Whitespace"},
    split(r"\s+$", "Isolated"),
    split(r"\w++\W*", "Removed"),
    split(" ?[^(\\s|[.,!?…。，、।۔،])]+", "Isolated"),
    split("[0-9][0-9][0-9]", "Isolated"),
    byte_level(),
    byte_level(use_regex=False),
    byte_level(prefix_space=True),
]
DECODERS: list[dict[str, Any]] = [
    {"type": "Fuse"},
    {"type": "ByteFallback"},
    metaspace("always"),
    metaspace("never"),
    byte_level(),
    replace("▁", " "),
    replace("t+", "T", "Regex"),
    replace("a", "aaa"),
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Strip", "content": "▁", "start": 2, "stop": 0},
]


def draw_file(draw: random.Random) -> dict[str, Any]:
    """A tokenizer.json of parts that are drawn; not all make sense."""
    kind = draw.choice(("bpe", "bpe", "byte-bpe", "unigram"))
    options: dict[str, Any] = {}
    if kind == "bpe":
        options = {name: draw.random() < 0.5 for name in ("fuse_unk", "byte_fallback", "ignore_merges")}
        options["unk_token"] = draw.choice(("<unk>", None))
    if kind == "unigram":
        options = {"byte_fallback": draw.random() < 0.5}
    made = model(kind, **options)
    if kind != "unigram" and draw.random() < 0.3:
        made = without(made, draw.sample(["<0xC3>", "<0xE2>", "a", "▁", "1", "Ġ", "Ã", "."], 3))
    size = len(made["vocab"])
    contents = draw.sample(["<tool>", "  ", "mat", "é", "\n\n", "Füße", "▁▁", "<s>x"], draw.randrange(4))
    tokens = [added(text, i, special=True, normalized=draw.random() < 0.1) for i, text in enumerate(SPECIAL)]
    vocabulary = made["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {text: i for i, (text, _) in enumerate(vocabulary)}
    for content in contents:
        number = vocabulary.get(content, size)
        size += content not in vocabulary
        tokens.append(
            added(
                content,
                number,
                **{flag: draw.random() < 0.35 for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")},
            )
        )
    normalizer = draw.sample(NORMALIZERS, draw.choice((0, 0, 1, 1, 2, 3)))
    splitter = draw.sample(PRE_TOKENIZERS, draw.choice((0, 1, 1, 2, 3)))
    decoder = draw.sample(DECODERS, draw.choice((1, 2, 3, 4)))
    return whole(
        made,
        added_tokens=tokens,
        decoder=sequence("decoders", *decoder),
        normalizer=sequence("normalizers", *normalizer) if normalizer else None,
        pre_tokenizer=sequence("pretokenizers", *splitter) if splitter else None,
    )
