"""The C++ tokenizer against the library 'tokenizers': SentencePiece's kinds, every part, files of drawn parts."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from sinkrt.text import MAX_PENDING, Tokenizer

from tests.cpp.charsmap import charsmap
from tests.cpp.probe import CppTokenizer, Probe, ProbeError
from tests.cpp.test_tokenizer import TEXTS, assert_same, noise
from tests.cpp.tokenizer_kinds import (
    CORPUS,
    LLAMA_DECODER,
    NORMALIZERS,
    PRE_TOKENIZERS,
    SPECIAL,
    added,
    byte_level,
    bytewise,
    draw_file,
    load,
    metaspace,
    model,
    replace,
    sequence,
    split,
    whole,
    without,
)

BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
LLAMA = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))
GEMMA_DECODER = sequence("decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"})
LATIN = "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ"


def chat_tokens(start: int) -> list[dict[str, Any]]:
    """Special tokens that take the white space after them, as Phi-3's, and one of white space."""
    extra = [
        added("<|user|>", start, special=True, rstrip=True),
        added("<|end|>", start + 1, special=True, rstrip=True),
        added("<mask>", start + 2, lstrip=True, single_word=True, normalized=True),
    ]
    return [*(added(text, i, special=True) for i, text in enumerate(SPECIAL)), *extra]


def _size(made: dict[str, Any]) -> int:
    return len(made["vocab"])


def _phi3() -> dict[str, Any]:
    made = model("bpe")
    return whole(made, normalizer=LLAMA, decoder=LLAMA_DECODER, added_tokens=chat_tokens(_size(made)))


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "llama2": lambda: whole(model("bpe"), normalizer=LLAMA, decoder=LLAMA_DECODER, post_processor=BOS),
    "mistral": lambda: whole(
        model("bpe"), pre_tokenizer=metaspace("first", split=False), decoder=LLAMA_DECODER, post_processor=BOS
    ),
    "phi3": _phi3,
    "gemma": lambda: whole(model("bpe"), normalizer=replace(" ", "▁"), decoder=GEMMA_DECODER, post_processor=BOS),
    "gemma2": lambda: whole(
        model("bpe"),
        normalizer=replace(" ", "▁"),
        decoder=GEMMA_DECODER,
        pre_tokenizer=split(" ", "MergedWithPrevious", kind="String"),
    ),
    "no-fallback": lambda: whole(
        without(model("bpe", byte_fallback=False), ["é", "日", "1"]), decoder=metaspace(), pre_tokenizer=metaspace()
    ),
    "some-bytes": lambda: whole(
        without(model("bpe", fuse_unk=False), ["<0xC3>", "<0xE6>", "é", "日"]), normalizer=LLAMA, decoder=LLAMA_DECODER
    ),
    "falcon": lambda: whole(
        model("byte-bpe"),
        decoder=byte_level(),
        post_processor=byte_level(),
        pre_tokenizer=sequence(
            "pretokenizers",
            {"type": "Punctuation", "behavior": "Contiguous"},
            byte_level(),
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]", "Isolated"),
        ),
    ),
    "bloom": lambda: whole(
        model("byte-bpe"),
        decoder=byte_level(),
        pre_tokenizer=sequence(
            "pretokenizers", split(" ?[^(\\s|[.,!?…。，、।۔،])]+", "Isolated"), byte_level(use_regex=False)
        ),
    ),
    "deepseek-llm": lambda: whole(
        model("byte-bpe"),
        decoder=byte_level(),
        pre_tokenizer=sequence(
            "pretokenizers",
            split("[\r\n]", "Isolated"),
            split(f"\\s?[{LATIN}]+", "Isolated"),
            split("\\s?[!-/:-~！-／：-～‘-‟　-。]+", "Isolated"),
            split("\\s+$", "Isolated"),
            split("[一-龥ࠀ-一가-퟿]+", "Isolated"),
            {"type": "Digits", "individual_digits": True},
            byte_level(use_regex=False),
        ),
    ),
    "tiktoken": lambda: whole(
        model("byte-bpe", ignore_merges=True),
        decoder=byte_level(),
        pre_tokenizer=sequence(
            "pretokenizers",
            split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
                "Isolated",
            ),
            byte_level(use_regex=False),
        ),
    ),
    "unigram": lambda: whole(
        model("unigram"),
        decoder=metaspace(),
        pre_tokenizer=sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace()),
        normalizer=sequence("normalizers", {"type": "NFKC"}, replace(" {2,}", "▁", "Regex")),
    ),
    "t5": lambda: whole(
        model("unigram"),
        decoder=metaspace(),
        post_processor=BOS,
        pre_tokenizer=metaspace(),
        normalizer=sequence(
            "normalizers",
            precompiled(
                {
                    "\t": " ",
                    "\n": " ",
                    "\u00a0": " ",
                    "ﬁ": "fi",
                    "½": "1/2",
                    "…": "...",
                    "e\u0301": "é",
                    "\x01": "",
                    "ｶ": "カ",
                    "ﾞ": "゛",
                    "\u200b": " ",
                }
            ),
            {"type": "Strip", "strip_left": False, "strip_right": True},
            replace(" {2,}", "▁", "Regex"),
        ),
    ),
    "unigram-bytes": lambda: whole(
        model("unigram", byte_fallback=True), decoder=LLAMA_DECODER, normalizer=LLAMA, post_processor=BOS
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, probe: Probe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CppTokenizer, tokenizers.Tokenizer]:
    return load(probe, tmp_path_factory.mktemp(request.param) / "tokenizer.json", KINDS[request.param]())


def test_texts_and_noise(pair: tuple[CppTokenizer, tokenizers.Tokenizer]) -> None:
    chats = ("<s> <|user|>\n hi<|end|> \n<|user|>", " <mask>", "x<mask> <mask>y <mask>", "é<mask>", "<s><s> a")
    for text in (*TEXTS, *CORPUS, *chats, *map(noise, range(150))):
        assert_same(*pair, text)


def pieces_after(library: tokenizers.Tokenizer, after: list[int], ids: list[int]) -> list[str]:
    """What a stream that has taken `after` gives for each id, and at the end: by whole texts, nothing kept."""
    special = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
    known = [i for i in after if i not in special and library.id_to_token(i) is not None]
    context, pending, out = known[-MAX_PENDING:], list[int](), []
    for end in (*ids, None):
        if end is not None and (end in special or library.id_to_token(end) is None):
            out.append("")
            continue
        pending += [] if end is None else [end]
        before, text = library.decode(context), library.decode(context + pending)
        piece = text[len(before) :] if text.startswith(before) else library.decode(pending)
        whole = end is None or not piece.endswith("\ufffd") or len(pending) == MAX_PENDING
        out.append(piece if whole and pending else "")
        if whole:
            context, pending = pending, []
    return out


def test_streams_after_a_prompt(pair: tuple[CppTokenizer, tokenizers.Tokenizer]) -> None:
    ours, library = pair
    theirs = Tokenizer(library, None)
    draw = random.Random(3)
    ids = list(library.get_vocab().values())
    in_bytes = [i for text, i in library.get_vocab().items() if text.startswith("<0x")] or ids
    for text in (*TEXTS, "ab ab"):
        assert ours.encode(text, 2) == theirs.encode_next(text)
    for size in (0, 1, 3, 9, 30) * 8:
        pool = draw.choice((ids, in_bytes, [*in_bytes, *ids[:40]], library.encode(draw.choice(CORPUS)).ids))
        after, then = ([draw.choice(pool) for _ in range(n)] for n in (size, 40))
        decoder = theirs.streaming_decoder(after)
        want = [*map(decoder.push, then), decoder.flush()]
        assert ours.stream(then, after=after) == want == pieces_after(library, after, then)


def test_only_what_follows_a_prompt_comes_out(probe: Probe, tmp_path: Path) -> None:
    """SentencePiece drops the space that begins a text, not the one after a prompt."""
    ours, library = load(probe, tmp_path / "tokenizer.json", KINDS["llama2"]())
    prompt = library.encode("the cat").ids
    word = library.encode("cat", add_special_tokens=False).ids
    assert "".join(ours.stream(word)) == "cat"
    assert "".join(ours.stream(word, after=prompt)) == " cat"
    assert "".join(ours.stream(word, after=[*prompt, 2, 1])) == " cat"  # special tokens do not count
    assert "".join(ours.stream(word, after=[1, 2] * 50)) == "cat"
    smile = [library.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    assert ours.stream(smile, after=prompt) == ["", "", "", "😀", ""]


def test_what_begins_texts_comes_once(probe: Probe, tmp_path: Path) -> None:
    ours, library = load(probe, tmp_path / "tokenizer.json", KINDS["gemma"]())
    theirs = Tokenizer(library, None)
    assert ours.encode("<s>the cat", 3) == ours.encode("the cat", 3) == library.encode("the cat").ids
    assert ours.encode("<s>the cat", 1)[:2] == [1, 1]
    for text in ("<s>the cat", "the <s>cat", "<s><s>cat", "</s>cat"):
        assert ours.encode(text, 3) == theirs.prompt_ids(text, allow_special=True)


def test_files_of_drawn_parts(probe: Probe, tmp_path: Path) -> None:
    """Parts in any order, sensible or not: the same ids and texts, or refused for one of two reasons."""
    accepted = 0
    for seed in range(160):
        draw = random.Random(seed)
        raw = draw_file(draw)
        try:
            ours, library = load(probe, tmp_path / "tokenizer.json", raw)
        except ProbeError as error:
            assert "Metaspace" in str(error) or "added token" in str(error)
            continue
        accepted += 1
        theirs = Tokenizer(library, None)
        words = ["mat", "  ", "<tool>", "▁", "<s>", "\n\n", "é", "ab", "xxxxx", "zzzz", "qqq", "123", ".,", "<0x41>"]
        for i in range(8):
            text = "".join(
                draw.choice(words) if draw.random() < 0.7 else noise(draw.randrange(99))[:6]
                for _ in range(draw.randrange(1, 9))
            )
            want = library.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == want, (seed, text)
            ids = [draw.choice(list(library.get_vocab().values())) for _ in range(20)] + want
            assert ours.decode(ids) == library.decode(ids), (seed, ids)
            if i == 0:
                decoder = theirs.streaming_decoder()
                assert ours.stream(ids) == [*map(decoder.push, ids), decoder.flush()], (seed, ids)
    assert accepted > 120


EVERYTHING = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


@pytest.mark.parametrize("kind", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"])
def test_normalizers_of_every_character(probe: Probe, tmp_path: Path, kind: str) -> None:
    """Alone, and before and after marks of several classes, which are sorted by their own."""
    ours, library = load(probe, tmp_path / "tokenizer.json", bytewise(normalizer={"type": kind}))
    assigned = EVERYTHING[: 0x30000 - 0x800]
    for start in range(0, len(assigned), 1 << 14):
        for mark in ("x", "x\u0315\u0334", "\u0345x"):
            text = mark.join(assigned[start : start + (1 << 14)])
            for begin in range(0, len(text), 1 << 12):
                piece = text[begin : begin + (1 << 12)]
                assert ours.encode(piece) == library.encode(piece).ids, hex(start)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "Punctuation", "behavior": "Removed"},
        {"type": "Whitespace"},
        {"type": "WhitespaceSplit"},
        *(
            split(pattern, "Removed")
            for pattern in (r"\w+", r"\W+", r"\D+", r"[^\d_]+", r"[\s\w]+", r"[\W_]+", r"[^\W]+", r"[\D7]+", r"[^\S]+")
        ),
    ],
)
def test_classes_of_every_character(probe: Probe, tmp_path: Path, part: dict[str, Any]) -> None:
    ours, library = load(probe, tmp_path / "tokenizer.json", bytewise(pre_tokenizer=part))
    for start in range(0, len(EVERYTHING), 1 << 14):
        text = "".join(EVERYTHING[start : start + (1 << 14)])
        assert ours.encode(text) == library.encode(text).ids, hex(start)


def precompiled(pairs: dict[str, str]) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": charsmap(pairs)}


def test_what_belongs_to_a_character(probe: Probe, tmp_path: Path) -> None:
    """A character map replaces whole clusters by what the shortest beginning becomes, if they have at most 5 bytes."""
    joins = [
        *"a\r\n\x01\u0301\u0334\ufe0f\u200c\u200d\u0903\u0e33\u0600\u0d4e\u1100\u1161\u11a8\uac00\uac01©⌚😀क",
        *"\u094d\u093c\U0001f1e9\U0001f1ea\U0001f3fb\U000e0100",
    ]
    pairs = {character: chr(ord("A") + i) for i, character in enumerate(joins)}
    ours, library = load(probe, tmp_path / "tokenizer.json", bytewise(normalizer=precompiled(pairs)))
    draw = random.Random(4)
    for _ in range(400):
        text = "".join(draw.choice(joins) for _ in range(200))
        assert ours.encode(text) == library.encode(text).ids, text
    pairs = {"a": "Z", "ab": "Q", "é": "e", "\u0301": "'", "x": "", "ﬁ": "fi"}
    ours, library = load(probe, tmp_path / "tokenizer.json", bytewise(normalizer=precompiled(pairs)))
    for start in range(0, len(EVERYTHING), 1 << 11):
        text = "a".join(EVERYTHING[start : start + (1 << 11)])
        assert ours.encode(text) == library.encode(text).ids, hex(start)
    # What joins the next character: Unicode has 27 of them, all among format characters and letters of a few scripts.
    many = [c for c in EVERYTHING if unicodedata.category(c) == "Cf" or 0x11000 <= ord(c) < 0x12000 or c == "\u0d4e"]
    pairs = {character: f"<{ord(character):x}>" for character in many}
    ours, library = load(probe, tmp_path / "tokenizer.json", bytewise(normalizer=precompiled(pairs)))
    for character in many:
        text = f"{character}a{character}\n{character}\u0301"
        assert ours.encode(text) == library.encode(text).ids, hex(ord(character))


def test_each_part_by_itself(probe: Probe, tmp_path: Path) -> None:
    """All parts that `draw_file` draws from, one at a time, where pieces show: a model that never joins them."""
    texts = [*TEXTS, *CORPUS, " a  b ", "1,2..3 ,", ",", "12", "▁a▁", "a  b", "ab``ab", *map(noise, range(300, 330))]
    made = model("bpe", ignore_merges=True)
    for raw in (
        *(whole(made, normalizer=part) for part in NORMALIZERS),
        *(whole(made, pre_tokenizer=part) for part in PRE_TOKENIZERS),
    ):
        ours, library = load(probe, tmp_path / "tokenizer.json", raw)
        for text in texts:
            assert ours.encode(text) == library.encode(text).ids, (raw["normalizer"], raw["pre_tokenizer"], text)


def test_scores_are_read_as_the_library_reads_them(probe: Probe, tmp_path: Path) -> None:
    """Not always to the nearest number: a tie, or none, of a token with the two that it is made of."""
    draw = random.Random(11)
    vocabulary: list[list[Any]] = [["<unk>", 0]]
    words = [chr(0x4E00 + i) for i in range(400)]
    for word in words:
        digits = draw.choice((3, 12, 16, 17, 19, 21, 25))
        half = "".join(draw.choice("0123456789") for _ in range(digits))
        score = draw.choice((f"-{draw.randrange(30)}.{half}", f"-0.000{half}", f"-1{half[:8]}.{half}e-{digits % 9}"))
        vocabulary += [[word, score], [word * 2, repr(2 * float(score))]]
    text = json.dumps(whole({"type": "Unigram", "unk_id": 0, "vocab": []}, added_tokens=[]))
    vocab = ",".join(f"[{json.dumps(word)},{score}]" for word, score in vocabulary)
    path = tmp_path / "tokenizer.json"
    path.write_text(text.replace('"vocab": []', f'"vocab": [{vocab}]'), encoding="utf-8")
    ours, library = probe.tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    read = dict(json.loads(library.to_str())["model"]["vocab"])
    assert any(read[word] != float(score) for word, score in vocabulary)  # so it matters how they are read
    for word in words:
        assert ours.encode(word * 2) == library.encode(word * 2).ids, word


def test_old_files_without_a_models_type(probe: Probe, tmp_path: Path) -> None:
    for kind in ("byte-bpe", "unigram"):
        made = model(kind)
        del made["type"]
        ours, library = load(probe, tmp_path / "tokenizer.json", whole(made, pre_tokenizer=byte_level()))
        assert ours.encode("the cat 123") == library.encode("the cat 123").ids


def test_sequences_inside_sequences(probe: Probe, tmp_path: Path) -> None:
    inner = sequence("normalizers", sequence("normalizers", {"type": "NFC"}), replace(" ", "▁"))
    ours, library = load(probe, tmp_path / "tokenizer.json", whole(model("bpe"), normalizer=inner))
    assert ours.encode("e\u0301 a") == library.encode("e\u0301 a").ids
