"""Streaming text and chat templates, with the tokenizer of a real model and some of other kinds."""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkrt import BundleError, UsageError
from sinkrt.contract import load_manifest
from sinkrt.text import MAX_PENDING, REPLACEMENT, StreamingDecoder, Tokenizer
from tokenizers import decoders, models, normalizers

from tests.real_model import smollm2_file
from tests.runtime.toy import BOS, EOS, build_toy, rehash, toy_tokenizer

TEXTS = [
    "Plain words, and a  double space.\n\tTabs\n\n",
    "naïve café, Straße, Ωμέγα, Привет, 你好世界, こんにちは, 안녕하세요",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff \U0001d518\U0001d52b",
    "A real \N{REPLACEMENT CHARACTER} in the text, and one at its end \N{REPLACEMENT CHARACTER}",
    " leading space",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer of SmolLM2-135M-Instruct, and ours read from the files that it writes."""
    gguf = smollm2_file()
    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder = build_toy(tmp_path_factory.mktemp("smollm2") / "bundle")
    theirs.save_pretrained(folder)
    rehash(folder)
    return theirs, Tokenizer.load(folder, load_manifest(folder))


@functools.cache
def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """Llama 2, Mistral and Gemma: a space before the text is part of words, rare characters are byte tokens."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "你"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def streamed(decoder: StreamingDecoder, ids: list[int]) -> str:
    pieces = [decoder.push(token) for token in ids]
    return "".join([*pieces, decoder.flush()])


# --- streaming decoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_streams_of_a_real_tokenizer(smollm2: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = smollm2
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    decoder = ours.streaming_decoder()
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == text
    incomplete = [piece for piece in pieces if REPLACEMENT in piece]
    assert not incomplete or REPLACEMENT in text, "a character was split"


def test_an_emoji_waits_for_its_last_byte() -> None:
    decoder = StreamingDecoder(toy_tokenizer())
    assert [decoder.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]
    assert decoder.flush() == ""


def test_a_decoder_goes_on_after_a_flush() -> None:
    decoder = StreamingDecoder(toy_tokenizer())
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == REPLACEMENT
    assert decoder.flush() == ""
    assert streamed(decoder, list("né".encode())) == "né"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_streams_through_bytes(text: str) -> None:
    assert streamed(StreamingDecoder(toy_tokenizer()), list(text.encode())) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=60), st.booleans())
def test_any_ids_stream_without_error_in_constant_memory(ids: list[int], byte_fallback: bool) -> None:
    decoder = StreamingDecoder(byte_fallback_tokenizer() if byte_fallback else toy_tokenizer())
    for token in ids:
        piece = decoder.push(token)
        assert not piece.endswith(REPLACEMENT) or len(decoder._context) == MAX_PENDING, "given up too early"
        assert len(decoder._pending) < MAX_PENDING and len(decoder._context) <= MAX_PENDING
    decoder.flush()


@settings(max_examples=200, deadline=None)
@given(st.text("ab 你好🙂é\n", max_size=30))
def test_any_text_streams_through_byte_fallback(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    assert streamed(StreamingDecoder(tokenizer), tokenizer.encode(text).ids) == text


def test_spaces_between_words_of_a_byte_fallback_tokenizer() -> None:
    tokenizer = byte_fallback_tokenizer()
    decoder = StreamingDecoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer.encode("ab ab ab").ids] == ["ab", " ab", " ab"]


def test_broken_bytes_after_a_byte_fallback_character() -> None:
    """One stray byte makes this decoder call the whole run of bytes broken, also what has been given out already."""
    tokenizer = byte_fallback_tokenizer()
    ids = [tokenizer.token_to_id(name) for name in ("<0xE5>", "<0xA5>", "<0xBD>", "<0xFF>", "ab")]
    assert streamed(StreamingDecoder(tokenizer), ids) == f"好{REPLACEMENT}ab"


@pytest.mark.parametrize("token", [0x80, 0xF0, BOS, EOS, 10**6], ids=["stray", "start", "bos", "eos", "unknown"])
def test_the_same_token_for_ever_takes_no_memory(token: int) -> None:
    decoder = StreamingDecoder(toy_tokenizer())
    text = streamed(decoder, [token] * 1000)
    assert set(text) <= {REPLACEMENT}
    assert len(text) == (1000 if token < 256 else 0)
    assert decoder.push(ord("a")) == "a"


# --- encoding --------------------------------------------------------------------------------------------------------


def test_encoding_inside_a_stream_adds_no_space() -> None:
    ours = Tokenizer(byte_fallback_tokenizer(), None)
    name = byte_fallback_tokenizer().id_to_token
    assert [name(i) for i in ours.encode("ab")] == ["▁ab"]
    assert [name(i) for i in ours.encode_next("ab")] == ["ab"]
    assert [name(i) for i in ours.encode_next(" ab")] == ["▁ab"]
    assert [name(i) for i in ours.encode_next("\nab")] == ["<0x0A>", "ab"]
    assert ours.encode_next("") == []


@pytest.mark.parametrize("text", ["x", " x", "\n", "\n\nx", "word and\n", "🙂", ""])
def test_encoding_inside_a_stream_of_a_real_tokenizer(smollm2: tuple[Any, Tokenizer], text: str) -> None:
    _, ours = smollm2
    assert ours.decode(ours.encode_next(text)) == text


def test_text_that_is_no_unicode(smollm2: tuple[Any, Tokenizer]) -> None:
    for encode in (smollm2[1].encode, smollm2[1].encode_next):
        with pytest.raises(UsageError, match="UTF-8"):
            encode("a\ud800b")


# --- chat ------------------------------------------------------------------------------------------------------------

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&amp; 'you'</b>"}],
    [
        {"role": "user", "content": "One\n\n  two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "fo{{ 1 }}ur 🙂"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_of_a_real_model(
    smollm2: tuple[Any, Tokenizer], messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    theirs, ours = smollm2
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours.render_chat(messages, add_generation_prompt=add_generation_prompt) == want
    assert ours.encode(want, special=False) == theirs(want, add_special_tokens=False)["input_ids"]


TEMPLATES = {
    "blocks": "{% if messages %}\n  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\n{% endif %}\nend",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ nothing }}",
    "json": "{{ {'a': '<é>', 'b': [1, 2]} | tojson }}{{ messages | tojson(indent=2) }}",
    "tools": "{% if tools is none and documents is none %}none{% else %}some{% endif %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%Y') }}",
    "methods": "{{ messages[0].content.strip().upper().split(' ')[0] }}{{ messages[-1]['content'] | trim }}",
}
SHOWN = "{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
def test_templates_render_as_in_transformers(name: str, messages: list[dict[str, str]]) -> None:
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=toy_tokenizer(), **special)
    theirs.chat_template = TEMPLATES[name] + SHOWN  # a template that leaves out messages is refused
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(toy_tokenizer(), TEMPLATES[name] + SHOWN, special).render_chat(messages) == want


def test_the_date_is_todays() -> None:
    tokenizer = Tokenizer(toy_tokenizer(), "{{ strftime_now('%Y-%m-%d') }}")
    before = datetime.datetime.now().strftime("%Y-%m-%d")
    assert before <= tokenizer.render_chat([]) <= datetime.datetime.now().strftime("%Y-%m-%d")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ 'a' + 1 }}", "chat"),
        ("{{ 1 // 0 }}", "chat"),
        ("{{ messages.append(1) }}", "chat"),  # a sandbox that changes nothing
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat"),
    ],
)
def test_a_template_that_refuses(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Tokenizer(toy_tokenizer(), template).render_chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)


def test_no_template() -> None:
    tokenizer = Tokenizer(toy_tokenizer(), None)
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="chat template"):
        tokenizer.render_chat([])


def test_the_next_turn_of_a_real_model(smollm2: tuple[Any, Tokenizer]) -> None:
    """Opening, answer and next turn together are the whole conversation, as if it had been rendered at once."""
    theirs, ours = smollm2
    talk = [*CONVERSATIONS[0], {"role": "assistant", "content": "Rayleigh."}, {"role": "user", "content": "Who?"}]
    whole = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    opening = ours.render_chat(talk[:1])
    assert opening + "Rayleigh." + ours.render_next_turn("Who?") == whole
    ids = ours.encode(opening, special=False) + ours.encode_next("Rayleigh.")
    assert ids + ours.encode_next(ours.render_next_turn("Who?")) == theirs(whole, add_special_tokens=False)["input_ids"]


def test_a_template_that_drops_answers_is_refused() -> None:
    tokenizer = Tokenizer(toy_tokenizer(), "{{ messages[-1].content }}")
    with pytest.raises(UsageError, match="earlier answers"):
        tokenizer.render_next_turn("x")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json"),
        ("chat_template.jinja", b"{% for %}", "no Jinja"),
        ("chat_template.jinja", b"\xff\xfe", "tokenizer files"),
        ("tokenizer_config.json", b"{", "tokenizer files"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    bundle = build_toy(tmp_path / "bundle")
    (bundle / file).write_bytes(content)
    rehash(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer.load(bundle, load_manifest(bundle))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (None, "<bos><eos>"),
        ({"eos_token": "<stop>"}, "<bos><stop>"),
        ({"eos_token": {"content": "<stop>", "lstrip": False}, "bos_token": None}, "<bos><stop>"),
        ([1], "<bos><eos>"),
    ],
)
def test_special_tokens_of_the_template(tmp_path: Path, config: Any, want: str) -> None:
    bundle = build_toy(tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}", encoding="utf-8")
    if config is not None:
        (bundle / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    rehash(bundle)
    assert Tokenizer.load(bundle, load_manifest(bundle)).render_chat([]) == want
