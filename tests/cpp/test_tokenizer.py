"""The C++ tokenizer against the library 'tokenizers': ids, texts and streamed pieces, real text and noise."""

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
from sinkrt.text import Tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.cpp.probe import CppTokenizer, Probe, ProbeError
from tests.runtime.toy import toy_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "",
    " ",
    "Hello world! It's a test, isn't it? We'LL see what they'd've done; I'm sure you're right.",
    "Füße, naïve cafés — œuvre d’été; ĳ ŉ ǅ ﬁ ß ẞ İ ı ſ 'ſ 'K",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак ґедзь.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΑΒΓ άΰΐ",
    "日本語のテキスト、中文字符。한국어 텍스트 ㄱㄴ ｶﾞ ﾊﾟ 𠮷野家",
    "نص عربي مع تشكيلٍ وأرقام ٠١٢٣٤٥٦٧٨٩ ۴۵۶",
    "हिन्दी में कुछ पाठ, क्षत्रिय ज्ञान १२३४५ ৪৫ ௧௨",
    "ไทย ภาษาไทย ๑๒๓ ລາວ ខ្មែរ ქართული Հայերեն עברית",
    "👩‍🚀🚀 👍🏽 🇩🇪🇯🇵 1️⃣ ❤️ 😀😀😀",
    "e\u0301 a\u0308\u0323 \u1100\u1161\u11a8 \u0344 \u212b \u2126 \ufb1d \u0958 q\u0307\u0323 \U0001d15e \u2adc",
    "def f(x):\n\tif x>=10 and y!=3:\n        return {'a': [1,2,3], \"b\": x**2}  # comment\r\n\r\n\r\n",
    "   leading\n\n\n  \t mixed \u00a0\u2003\u3000 spaces \u200b\u2028\u2029 end   ",
    "1234567890 3.14159 1e-10 ½ ² Ⅷ ① 0x1F 12ab34",
    "<|bos|>user<|end|> text<mask>more <mask>  x<plain>y<|end|><|end|>",
    "\x00\x01\x7f\x80\x85\xad\ufeff\ufffd\U0010ffff",
    "a" * 300 + " " * 300 + "ab" * 200 + "\n" * 50 + "1" * 100,
]


def corpus() -> list[str]:
    words = ("the cat sat on the mat and the dog ate the hat ", "Съешь ещё булок 日本語日本語 हिन्दी हिन्दी ")
    return [*TEXTS, *(text * 3 for text in words)]


def trained(pre: Any, *, normalizer: Any = None, post: Any = None, **model: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE of 700 tokens, with added tokens of several kinds."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(
        [
            AddedToken("<plain>", normalized=True),
            AddedToken("<mask>", lstrip=True, rstrip=True),
            AddedToken("Füße", normalized=False),
            AddedToken("é\u0323x", normalized=True),
            AddedToken("<|end|>x", special=True, normalized=False),
        ]
    )
    if post is not None:
        tokenizer.post_processor = post
    return tokenizer


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior, invert=invert), byte_level(use_regex=False)]
    )


BOS = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
BOTH = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 0), ("<|end|>", 1)])
KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt2": lambda: trained(byte_level()),
    "prefix-space": lambda: trained(byte_level(add_prefix_space=True), post=processors.ByteLevel()),
    "smollm": lambda: trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=True)])
    ),
    "digit-runs": lambda: trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level()]), post=BOTH
    ),
    "llama3": lambda: trained(
        split(LLAMA3), ignore_merges=True, post=processors.Sequence([processors.ByteLevel(), BOS])
    ),
    "qwen2": lambda: trained(split(QWEN2), normalizer=normalizers.NFC()),
    "gpt4o": lambda: trained(split(GPT4O), normalizer=normalizers.Sequence([normalizers.NFC()])),
    "deepseek": lambda: trained(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
                split(DEEPSEEK),
            ]
        )
    ),
    "removed": lambda: trained(split(r"\p{L}+|\d", "removed", invert=True)),
    "bytes": toy_tokenizer,
}


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, probe: Probe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CppTokenizer, tokenizers.Tokenizer]:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    theirs = KINDS[request.param]()
    theirs.save(str(path))
    return probe.tokenizer(path), theirs


def noise(seed: int) -> str:
    """Characters of all of Unicode, common scripts and white space more often, with marks and special tokens."""
    draw = random.Random(seed)
    pools = (
        lambda: chr(draw.randrange(0x20, 0x7F)),
        lambda: draw.choice(" \t\n\r\u00a0\u3000'’"),
        lambda: chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, sys.maxunicode + 1)))),
        lambda: chr(draw.randrange(0xA0, 0x900)),
        lambda: chr(draw.randrange(0x300, 0x340)),
        lambda: chr(draw.randrange(0x1F300, 0x1F700)),
        lambda: draw.choice("0123456789²½٣"),
        lambda: draw.choice(["<|bos|>", "<mask>", "<plain>", "'ll", "'S", "Füße", "the ", "日本語"]),
        lambda: chr(draw.randrange(0xAC00, 0xD7A4)),
        lambda: chr(draw.randrange(0x1100, 0x1200)),
    )
    return "".join(draw.choice(pools)() for _ in range(draw.randrange(1, 60)))


def assert_same(ours: CppTokenizer, theirs: tokenizers.Tokenizer, text: str) -> None:
    for special in (False, True):
        want = theirs.encode(text, add_special_tokens=special).ids
        assert ours.encode(text, int(special)) == want, text
    assert ours.decode(want) == theirs.decode(want), text
    assert ours.decode(want, keep_special=True) == theirs.decode(want, skip_special_tokens=False), text


def test_texts_of_many_scripts(pair: tuple[CppTokenizer, tokenizers.Tokenizer]) -> None:
    for text in corpus():
        assert_same(*pair, text)


def test_noise(pair: tuple[CppTokenizer, tokenizers.Tokenizer]) -> None:
    for seed in range(200):
        assert_same(*pair, noise(seed))


def test_streams_and_turns_as_python_does(pair: tuple[CppTokenizer, tokenizers.Tokenizer]) -> None:
    ours, library = pair
    theirs = Tokenizer(library, None)
    draw = random.Random(7)
    size = library.get_vocab_size()
    for text in TEXTS:
        assert ours.encode(text, 2) == theirs.encode_next(text)
    for _ in range(60):
        ids = [draw.choice((draw.randrange(size), draw.randrange(256), 5, size + 9)) for _ in range(50)]
        decoder = theirs.streaming_decoder()
        want = [decoder.push(i) for i in ids]
        assert ours.stream(ids) == [*want, decoder.flush()]
        assert ours.decode(ids) == theirs.decode(ids)


def test_categories_and_spaces_of_every_character(probe: Probe, tmp_path: Path) -> None:
    """Every code point by itself, through regular expressions that sort them into nine classes and more."""
    pattern = r"\p{Lu}+|\p{Ll}+|[\p{Lt}\p{Lm}]+|\p{Lo}+|\p{M}+|\p{Nd}+|[\p{Nl}\p{No}]+|\p{P}+|\p{S}+|\s+|\p{Cf}+"
    bytewise = tokenizers.Tokenizer(models.BPE(vocab=toy_tokenizer().get_vocab(), merges=[]))
    bytewise.pre_tokenizer = split(pattern, "removed", invert=True)  # ids only of what matches
    bytewise.decoder = decoders.ByteLevel()
    bytewise.save(str(tmp_path / "tokenizer.json"))
    ours = probe.tokenizer(tmp_path / "tokenizer.json")
    everything = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(everything), 4096):
        text = "".join(everything[start : start + 4096])
        assert ours.encode(text) == bytewise.encode(text).ids, hex(start)


def test_normal_form_of_every_decomposition(probe: Probe, tmp_path: Path) -> None:
    theirs = trained(split(QWEN2), normalizer=normalizers.NFC())
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = probe.tokenizer(tmp_path / "tokenizer.json")
    everything = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    changing = [character for character in everything if unicodedata.normalize("NFD", character) != character]
    for start in range(0, len(changing), 500):
        for form in ("NFC", "NFD"):
            text = unicodedata.normalize(form, "x".join(changing[start : start + 500]))
            assert ours.encode(text) == theirs.encode(text).ids, hex(ord(changing[start]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a model of type 'WordPiece', expected BPE, Unigram"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0]]}}, "a Unigram model without unk_id"),
        ({"model": {"type": "Unigram", "unk_id": 1, "vocab": [["a", 0]]}}, "an unk_id outside the vocabulary"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0], ["a", 1]]}}, "the token 'a' twice"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]}}, "a score that is no number"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "two tokens with the id 0"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "a merge of 'a' and 'b'"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "x"}}, "an unk_token that is not"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1}}, "a BPE model with dropout"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "fuse_unk": 1}}, "a 'fuse_unk' that is no switch"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "dream": 1}}, "a BPE with the option 'dream'"),
        ({"version": "2.0"}, "another version"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAA="}}, "a precompiled_charsmap that is"),
        ({"normalizer": {"type": "Nmt"}}, "a normalizer of type 'Nmt'"),
        ({"normalizer": {"type": "BertNormalizer"}}, "a normalizer of type 'BertNormalizer'"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": ""}}, "a search for nothing"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "a pre-tokenizer of type 'UnicodeScripts'"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "ab"}}, "a 'replacement' that is no single character"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "x"}}, "the prepend_scheme 'x'"),
        ({"pre_tokenizer": {"type": "Punctuation", "behavior": "x"}}, "the behavior 'x'"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True, "x": 1}}, "a Digits with the option 'x'"),
        (
            {
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "WhitespaceSplit"},
                        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"},
                    ],
                },
            },
            "a Metaspace of the first piece",
        ),
        ({"decoder": {"type": "WordPiece"}}, "a decoder of type 'WordPiece'"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}}, "a decoder that strips the end"),
        ({"decoder": None}, "no decoder"),
        ({"post_processor": {"type": "BertProcessing"}}, "a post-processor of type 'BertProcessing'"),
        ({"post_processor": {"type": "TemplateProcessing", "special_tokens": {}, "single": []}}, "without the text"),
        ({"truncation": {"max_length": 5}}, "a tokenizer with truncation"),
        ({"padding": {"length": 5}}, "a tokenizer with padding"),
        ({"added_tokens": [{"id": 1, "content": "x"}]}, "the added token 'x' with the id 1, expected "),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "an id that is none"),
        *(
            (
                {
                    "pre_tokenizer": {
                        "type": "Split",
                        "pattern": {"Regex": regex},
                        "behavior": "Isolated",
                        "invert": False,
                    }
                },
                message,
            )
            for regex, message in (
                ("(?:a+)+", "a group that repeats without end"),
                ("a+?", "a lazy, possessive"),
                ("a{2}+", "a lazy, possessive"),
                ("a*|b", "a match of nothing"),
                ("[a&&b]", "an intersection"),
                ("[[:alpha:]]", "a POSIX class"),
                ("(?i:st)", "a (?i:..) with 'st'"),
                ("(?i:é)", "more than ASCII"),
                ("(?<x>a)", "an unknown kind of group"),
                (r"\bx", r"the unknown escape \b"),
                (r"\p{Greek}", "the unknown property Greek"),
                ("(a", "a '(' without ')'"),
                ("a)", "a ')' without '('"),
                ("[a", "an end too early"),
                ("^a", "a '^'"),
                ("[b-a]", "an odd range"),
                ("a{3,1}", "an odd quantifier"),
                ("(" * 99, "groups nested too deeply"),
            )
        ),
    ],
)
def test_what_is_refused(probe: Probe, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "tokenizer.json"
    raw = json.loads(toy_tokenizer().to_str())
    path.write_text(json.dumps({**raw, **change}))
    with pytest.raises(ProbeError) as error:
        probe.tokenizer(path)
    assert str(error.value).startswith("tokenizer.json: received ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tokenizers(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ProbeError, match="No such file"):
        probe.tokenizer(path)
    for text, message in (("{", "invalid JSON"), ("[]", "JSON that is no object"), ("{}", "no decoder")):
        path.write_text(text)
        with pytest.raises(ProbeError, match=message):
            probe.tokenizer(path)


def test_text_that_is_none(probe: Probe, tmp_path: Path) -> None:
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours = probe.tokenizer(tmp_path / "tokenizer.json")
    for data in (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        with pytest.raises(ProbeError, match="text: received something that is not Unicode text"):
            ours.encode(data)
