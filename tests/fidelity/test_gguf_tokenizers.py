"""Tokenizers built from GGUF files give llama.cpp's ids: its own test vocabularies and texts, llama.cpp in-process on
random texts, and a vocabulary made for the purpose with each name of a pre-tokenizer that llama.cpp knows.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from sinkexport.loading.gguf_models.file import GgufFile, open_gguf
from sinkexport.loading.tokenizers.gguf_pre import PRE
from sinkexport.loading.tokenizers.gguf_tokenizer import GgufTokenizer, byte_signs, gguf_tokenizer
from sinkrt.errors import UsageError

from tests.fidelity.gguf_metadata import llama_vocab, read_metadata, write_metadata
from tests.fidelity.llama_cpp import LlamaVocabulary
from tests.fidelity.tokenizer_texts import dense_texts, texts
from tests.real_model import smollm2_file

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SEPARATOR = "\n__ggml_vocab_test__\n"

VOCABULARIES = (
    *("gpt-2", "llama-bpe", "qwen2", "qwen35", "deepseek-coder", "deepseek-llm", "falcon", "mpt"),
    *("starcoder", "refact", "gemma-4", "llama-spm", "phi-3", "baichuan"),
)


def build(metadata: dict[str, Any], **changes: Any) -> GgufTokenizer:
    """The tokenizer of a file with this metadata; a change to None takes a key out."""
    everything = {"general.architecture": "llama", **metadata, **{KEY + key: value for key, value in changes.items()}}
    present = {key: value for key, value in everything.items() if value is not None}
    built = gguf_tokenizer(GgufFile((Path("made.gguf"),), present, {}))
    assert built is not None
    return built


def differing(built: GgufTokenizer, reference: LlamaVocabulary, some: Iterable[str]) -> list[tuple[Any, ...]]:
    """Texts with other ids than llama.cpp's, with BOS and control tokens and without."""
    out = []
    for text, special in itertools.product(some, (False, True)):
        built.tokenizer.encode_special_tokens = not special
        ours = built.tokenizer.encode(text, add_special_tokens=special).ids
        theirs = reference.encode(text, add_special=special, parse_special=special)
        if ours != theirs:
            out.append((text, special, ours, theirs))
    built.tokenizer.encode_special_tokens = False
    return out


# --- vocabularies of real models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOCABULARIES)
def test_llama_cpp_vocabulary(name: str) -> None:
    path = llama_vocab(name)
    metadata = read_metadata(path)
    built = build(metadata)
    kinds = metadata[KEY + "token_type"]
    special = [
        text
        for text, kind in zip(metadata[KEY + "tokens"], kinds, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    with LlamaVocabulary(path) as reference:
        some = list(texts(100, 7, special))
        if name == "phi-3":  # white space outside ASCII after its special tokens: see below
            some = [text for text in some if not any(sign in text for sign in "\u2003\u3000\u00a0\u2028\x85")]
            assert len(some) > 40
        assert differing(built, reference, some) == []
        assert built.end_ids == reference.end_ids
    texts_file = path.with_name(path.name + ".inp")
    if texts_file.exists():
        inputs = texts_file.read_text().split(SEPARATOR)
        wanted = [[*map(int, line.split())] for line in path.with_name(path.name + ".out").read_text().split("\n")]
        built.tokenizer.encode_special_tokens = True
        assert [built.tokenizer.encode(text, add_special_tokens=False).ids for text in inputs] == wanted[: len(inputs)]
        assert len(inputs) >= 46
    else:
        assert name == "baichuan"


def test_smollm2_as_it_was_trained() -> None:
    path = smollm2_file()
    built = gguf_tokenizer(open_gguf(path))
    assert built is not None
    tokens = built.tokenizer.encode("tea:\n\n1. 37 pears\n    2", add_special_tokens=False).tokens
    # Digits are cut off first, each by itself: the white space before one stays together.
    assert tokens == ["te", "a", ":", "ĊĊ", "1", ".", "Ġ", "3", "7", "Ġpears", "ĊĠĠĠĠ", "2"]
    with LlamaVocabulary(path) as reference:
        chat = "<|im_start|>user\nName 3 of 12:\n1. a\n2.  b<|im_end|>\n<|im_start|>assistant\n"
        assert differing(built, reference, [chat, "", " ", *texts(300, 3, ["<|im_end|>", "<|endoftext|>"])]) == []
        assert built.end_ids == reference.end_ids
    assert built.special_tokens["eos_token"] == "<|im_end|>"
    assert (built.bos_id, built.model, built.pre) == (1, "gpt2", "smollm")
    assert built.chat_template is not None and "im_start" in built.chat_template
    assert built.num_tokens == built.tokenizer.get_vocab_size() == 49152


@pytest.mark.parametrize(("name", "kind"), [("bert-bge", "WordPiece"), ("nomic-bert-moe", "Unigram")])
def test_other_kinds_are_refused(name: str, kind: str) -> None:
    with pytest.raises(UsageError, match=f"of the kind {kind}"):
        build(read_metadata(llama_vocab(name)))


@pytest.mark.parametrize("name", ["aquila", "gpt-neox"])
def test_file_without_pre_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"without tokenizer\.ggml\.pre"):
        build(read_metadata(llama_vocab(name)))


# --- each name of a pre-tokenizer -----------------------------------------------------------------------------------


def made_bytes() -> dict[str, Any]:
    """A byte-level vocabulary with merges between a fifth of all pairs of bytes, so that places of cuts show."""
    signs = byte_signs()
    source = random.Random(5)
    spaces = [signs[byte] for byte in b" \t\r\n"]
    pairs = [
        (first, second)
        for first in signs
        for second in signs
        if source.random() < 0.2 or (first in spaces and second in spaces)
    ]
    source.shuffle(pairs)
    named = ["<s>", "</s>", "<|im_end|>", "<unused>", "<mask>", "    "]
    return {
        KEY + "model": "gpt2",
        KEY + "tokens": [*signs, *(first + second for first, second in pairs), *named],
        KEY + "token_type": [NORMAL] * (len(signs) + len(pairs)) + [CONTROL] * 5 + [USER_DEFINED],
        KEY + "merges": [f"{first} {second}" for first, second in pairs],
        KEY + "bos_token_id": len(signs) + len(pairs),
        KEY + "eos_token_id": len(signs) + len(pairs) + 1,
    }


def made_characters() -> dict[str, Any]:
    """A vocabulary of characters with tokens for bytes, and merges between many pairs."""
    source = random.Random(1)
    some = [sign for sign in dict.fromkeys("".join(dense_texts(400, 2)) + "▁") if sign not in " \x00"]
    some = [sign for sign in some if sign in "\n▁" or source.random() < 0.8]
    pairs = [
        (first, second)
        for first in some
        for second in some
        if (first == second == "\n") or ("\n" not in (first, second) and source.random() < 0.5)
    ]
    pairs += [("\n\n", "\n"), ("\n", "\n\n"), ("\n\n", "\n\n"), ("\n\n\n", "\n")]
    source.shuffle(pairs)
    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_end|>", "  "]
    tokens = [*named, *(f"<0x{byte:02X}>" for byte in range(256)), *some, *dict.fromkeys(map("".join, pairs))]
    return {
        KEY + "model": "gpt2",
        KEY + "tokens": tokens,
        KEY + "token_type": [CONTROL, CONTROL, CONTROL, UNKNOWN, CONTROL, USER_DEFINED]
        + [BYTE] * 256
        + [NORMAL] * (len(tokens) - 262),
        KEY + "merges": [f"{first} {second}" for first, second in pairs],
        KEY + "bos_token_id": 2,
        KEY + "eos_token_id": 1,
    }


SPACES = [" " * count + word for count in (3, 9, 40, 1100) for word in ("", "a", "1", "\n")]
CUTS = [
    " ".join(
        f"{before}'{short}{after}"
        for before in "aZ9.中"
        for short in ("s", "m", "d", "re", "LL", "Ve", "T")
        for after in ("", "b", "3")
    ),
    " ".join(
        f"{before}{'1234567'[:size]}{after}"
        for before in ("", "a", "\n", "-", "中")
        for size in range(1, 8)
        for after in ("", "b", "٣", "½")
    ),
    " ".join(
        f"{before}{after}"
        for before in (".", "ab", "=>", "É", "e\u0301")
        for after in ("\n", "\r\n\n", "/", "/\n", "É", "Ab", "\u0301", " c", "中")
    ),
]


def test_every_name_splits_as_llama_cpp(tmp_path: Path) -> None:
    made = {False: made_bytes(), True: made_characters()}
    seen = set()
    wrong = {}
    for name, row in PRE.items():
        metadata = {**made[row.raw], KEY + "pre": name}
        # Names with one row share their texts; those that come later are tried with a few.
        few = dataclasses.astuple(row) in seen
        seen.add(dataclasses.astuple(row))
        special = ["<s>", "</s>", "<|im_end|>", " <mask>"]
        some = [*texts(5 if few else 50, 11, special), *dense_texts(10 if few else 150, 3)]
        some += SPACES if name == "jais-2" else SPACES[:8]
        some += [] if few else CUTS
        some.append("a <mask> b")  # takes the space before it along for some names
        with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
            if found := differing(build(metadata), reference, some):
                wrong[name] = found[:2]
    assert wrong == {}
    assert len(PRE) > 80


def test_the_texts_distinguish_rows() -> None:
    metadata = made_bytes()
    rows = {row.splits: name for name, row in PRE.items() if not row.raw}
    some = [*texts(50, 11), *dense_texts(150, 3), *SPACES, *CUTS]
    found = {}
    for name in rows.values():
        tokenizer = build(metadata, pre=name).tokenizer
        ids = tuple(tuple(item.ids) for item in tokenizer.encode_batch(some, add_special_tokens=False))
        assert ids not in found, (name, found[ids])
        found[ids] = name
    assert len(found) > 25


def test_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(UsageError, match=r"'qwen-2'.*near: qwen2"):
        build(made_bytes(), pre="qwen-2")
    with pytest.raises(UsageError, match=r"'zzzz'.*smollm"):
        build(made_bytes(), pre="zzzz")


def test_gemma_4_always_begins_with_bos(tmp_path: Path) -> None:
    metadata = {**made_characters(), KEY + "model": "gemma4"}
    with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
        assert differing(build(metadata), reference, texts(50, 4, ["<eos>", "  "])) == []
    with pytest.raises(UsageError, match="add_bos_token = false"):
        build(metadata, add_bos_token=False)


@pytest.mark.parametrize("bytes_without_token", [b"\x04\x05!", b"]^\x00-\\", b"\xf1\xf2"])
def test_bytes_without_a_token_are_left_out(tmp_path: Path, bytes_without_token: bytes) -> None:
    """What stands on both sides of one never merges."""
    metadata = {**made_bytes(), KEY + "pre": "smollm"}
    signs = [byte_signs()[byte] for byte in bytes_without_token]
    keep = [not (len(text) < 3 and any(sign in text for sign in signs)) for text in metadata[KEY + "tokens"]]
    for key in ("tokens", "token_type"):
        metadata[KEY + key] = [item for item, kept in zip(metadata[KEY + key], keep, strict=True) if kept]
    metadata[KEY + "merges"] = [line for line in metadata[KEY + "merges"] if not any(sign in line for sign in signs)]
    for name, text in (("bos", "<s>"), ("eos", "</s>")):
        metadata[f"{KEY}{name}_token_id"] = metadata[KEY + "tokens"].index(text)
    some = ["ab\x04cd", "!\x04!", "a]b", "^-\\", *dense_texts(300, 8)]
    with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
        assert differing(build(metadata), reference, some) == []


# --- SentencePiece --------------------------------------------------------------------------------------------------


def made_pieces(seed: int, kind: str) -> dict[str, Any]:
    """A small vocabulary with scores: as trained (a token after what it is made of), at random, or with ties."""
    source = random.Random(seed)
    signs = list("▁abc")[: source.choice([2, 3, 4])]
    words = ["".join(word) for size in range(2, 6) for word in itertools.product(signs, repeat=size)]
    words = source.sample(words, min(len(words), source.choice([5, 12, 30, 60])))
    if kind == "trained":
        words.sort(key=len)
    scores = [float(-source.randint(0, 3) if kind == "ties" else -index) for index in range(len(words))]
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        KEY + "model": "llama",
        KEY + "tokens": [*named, *signs, *words],
        KEY + "scores": [0.0] * len(named) + [-1e6 - index for index in range(len(signs))] + scores,
        KEY + "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(signs) + len(words)),
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
    }


@pytest.mark.parametrize("kind", ["trained", "random", "ties"])
def test_merges_from_scores(tmp_path: Path, kind: str) -> None:
    refused = 0
    for seed in range(40):
        metadata = made_pieces(seed, kind)
        source = random.Random(seed)
        some = ["".join(source.choices(["▁", "a", "b", "c", " ", "é"], k=source.randint(1, 24))) for _ in range(60)]
        try:
            built = build(metadata)
        except UsageError as error:
            assert "one score whose order depends on the text" in str(error)
            refused += 1
            continue
        with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
            assert differing(built, reference, some) == []
    assert (0 < refused < 30) if kind == "ties" else refused == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_space_prefix": False},
        {"add_bos_token": False, "add_eos_token": True},
        {"add_eos_token": True, "add_space_prefix": False},
    ],
)
def test_spaces_and_ends_of_sentencepiece(tmp_path: Path, changes: dict[str, bool]) -> None:
    metadata = read_metadata(llama_vocab("llama-spm"))
    flags = {KEY + key: value for key, value in changes.items()}
    some = ["", " ", "a", " a", "  a", "<s>a", "a</s> b</s>c", "</s>", "\n</s>\n"]
    some += texts(60, 5, ["<s>", "</s>", "<unk>"])
    with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", {**metadata, **flags})) as reference:
        assert differing(build(metadata, **changes), reference, some) == []


@pytest.mark.parametrize("space_prefix", [True, False])
def test_user_defined_tokens_of_sentencepiece(tmp_path: Path, space_prefix: bool) -> None:
    """Runs of spaces and lines, tags and words, as Gemma has; they come before merges and before a space is added."""
    metadata = read_metadata(llama_vocab("llama-spm"))
    more = ["  ", "    ", "\n\n", "\n\n\n", "\t\t", "<table>", "</table>", "xyzwy", "ellowo", "▁of▁the", "<unused1>"]
    metadata[KEY + "tokens"] += more
    metadata[KEY + "scores"] += [-1000.0] * len(more)
    metadata[KEY + "token_type"] += [USER_DEFINED] * (len(more) - 1) + [CONTROL]
    metadata[KEY + "add_space_prefix"] = space_prefix
    built = build(metadata)
    some = ["  a", "Hellowo   world", "one of the", "\n\n\n\na", *texts(150, 6, [*more, "<s>"])]
    with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
        assert differing(built, reference, some) == []


def test_decoding_sentencepiece() -> None:
    tokenizer = build(read_metadata(llama_vocab("llama-spm"))).tokenizer
    for text in ("Hello, wörld", " two  spaces ", "日本\u3042\U0001f600\n\tx"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


# --- special tokens and ends ----------------------------------------------------------------------------------------

NAMED_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<turn|>", "<end_of_utterance>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~[", "<|ifm|im_end|>"),
    *("<|plamo:eos|>", "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|user|>", "<think>"),
    *("<|fim_pad|>", "<PAD>", "<|repo_name|>", "<reponame>", "<|file_sep|>", "<fim_prefix>", "▁<MID>", "<SUF>"),
)


def test_ends_and_types_by_name(tmp_path: Path) -> None:
    base = made_bytes()
    plain = base[KEY + "tokens"][:-6]
    for seed in range(15):
        source = random.Random(seed)
        named = source.sample(NAMED_ENDS, source.randint(1, 12))
        if {"<|repo_name|>", "<reponame>"} <= {*named} or {"<|fim_pad|>", "<PAD>"} <= {*named}:
            continue  # llama.cpp takes whichever its hash table has first
        kinds = [source.choice([NORMAL, CONTROL, USER_DEFINED]) for _ in named]
        ids = {
            f"{KEY}{name}_token_id": len(plain) + source.randrange(len(named))
            for name in source.sample(["eos", "eot", "eom", "fim_sep"], source.randint(1, 4))
        }
        metadata = {
            **base,
            KEY + "tokens": plain + named,
            KEY + "token_type": [NORMAL] * len(plain) + kinds,
            KEY + "pre": "qwen2",
            KEY + "bos_token_id": 0,
            KEY + "eos_token_id": len(plain),
            **ids,
        }
        built = build(metadata)
        with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
            assert built.end_ids == reference.end_ids, named
            assert differing(built, reference, [f"a{text} b" for text in named]) == []


def test_no_end_is_made_up() -> None:
    tokens = [*made_bytes()[KEY + "tokens"][:-6], "<s>", "<a>", "<b>", "<c>", "<d>", "<e>"]
    built = build(made_bytes(), pre="gpt-2", eos_token_id=None, tokens=tokens)
    assert built.end_ids == ()


def test_list_of_ends() -> None:
    """The key that Ollama writes."""
    metadata = made_bytes()
    built = build(metadata, pre="gpt-2", eos_token_ids=[3, 7])
    assert {3, 7, metadata[KEY + "eos_token_id"]} <= {*built.end_ids}
    with pytest.raises(UsageError, match="eos_token_ids"):
        build(metadata, pre="gpt-2", eos_token_ids=[10**6])


def test_named_tokens_and_templates() -> None:
    metadata = {
        **made_bytes(),
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
    }
    built = build(metadata, pre="gpt-2", padding_token_id=3)
    assert built.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": byte_signs()[3]}
    assert (built.chat_template, built.chat_templates) == ("plain", {"tool_use": "tools"})


def test_no_vocabulary() -> None:
    assert gguf_tokenizer(GgufFile((Path("made.gguf"),), {KEY + "model": "no_vocab"}, {})) is None
    assert gguf_tokenizer(GgufFile((Path("made.gguf"),), {}, {})) is None


# --- known differences ----------------------------------------------------------------------------------------------


def test_phi_3_strips_all_white_space_after_special_tokens() -> None:
    """Its own tokenizer does so; llama.cpp strips that of ASCII only."""
    path = llama_vocab("phi-3")
    built = build(read_metadata(path))
    with LlamaVocabulary(path) as reference:
        text = "<|end|>\u3000x"
        assert built.tokenizer.encode(text).ids == reference.encode("<|end|>x") != reference.encode(text)
        assert built.tokenizer.encode("<|end|> \n x").ids == reference.encode("<|end|> \n x")


def test_characters_of_unicode_16_are_letters(tmp_path: Path) -> None:
    """They are for `tokenizers`, and so for models' own tokenizers; llama.cpp's tables end before."""
    metadata = {**made_bytes(), KEY + "pre": "qwen2"}
    built = build(metadata)
    sets = ("ДЖЯ", "\u1c89\ua7cb\ua7da")
    old, new = (["".join(pair) for pair in itertools.product("abcdefg", letters)] for letters in sets)
    with LlamaVocabulary(write_metadata(tmp_path / "made.gguf", metadata)) as reference:
        assert differing(built, reference, new) != []
        assert differing(built, reference, old) == []


def test_leftmost_of_overlapping_special_tokens() -> None:
    metadata = made_bytes()
    metadata[KEY + "tokens"] = [*metadata[KEY + "tokens"], "<a", "a>>"]
    metadata[KEY + "token_type"] = [*metadata[KEY + "token_type"], CONTROL, CONTROL]
    assert build(metadata, pre="gpt-2").tokenizer.encode("<a>>", add_special_tokens=False).tokens[0] == "<a"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "without tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"]}, "'a' for two ids"),
        ({"token_type": [NORMAL]}, "1 entries in tokenizer.ggml.token_type"),
        ({"merges": None}, "without tokenizer.ggml.merges"),
        ({"merges": [1]}, "tokenizer.ggml.merges of another type"),
        ({"pre": 3}, "the pre-tokenizer '3'"),
        ({"pre": "a\nb"}, r"the pre-tokenizer 'a\nb'"),
        ({"bos_token_id": True}, "bos_token_id = True"),
        ({"merges": ["a b", "ab a", "aba c"]}, "that makes no token"),
        ({"eos_token_id": 10**6}, "eos_token_id = 1000000"),
        ({"bos_token_id": None, "add_bos_token": True}, "adds BOS to a text without"),
        ({"add_bos_token": "yes"}, "add_bos_token = 'yes'"),
        ({"model": "rwkv"}, "RWKV's"),
        ({"model": "wordy"}, "'wordy'"),
        ({"novelty": 3}, "the key 'tokenizer.ggml.novelty'"),
        ({"model": "llama"}, "without the token <0x00>"),
    ],
)
def test_bad_vocabularies(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=r"\Atokenizer: received") as caught:
        build(made_bytes(), **{"pre": "gpt-2", **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "without tokenizer.ggml.scores"),
        ({"scores": [float("nan")] * 400}, "no number"),
        ({"precompiled_charsmap": [1, 2]}, "a table of characters"),
    ],
)
def test_bad_sentencepiece(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(made_pieces(1, "trained"), **changes)


def test_token_of_a_character_without_token_is_refused() -> None:
    metadata = made_pieces(1, "trained")
    for key, item in (("tokens", "aZ"), ("scores", -0.5), ("token_type", NORMAL)):
        metadata[KEY + key] = [*metadata[KEY + key], item]
    with pytest.raises(UsageError, match="'aZ' and none for 'Z'"):
        build(metadata)
