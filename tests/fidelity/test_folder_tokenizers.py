"""The tokenizer of a folder is the source's own, to the id: copied, or converted and compared with its own library."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from sinkexport.config import ExportConfig
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer, as_source_tokenizer
from sinkexport.loading.tokenizers.tokenizer_checks import check_tokens, fitted
from sinkexport.loading.tokenizers.tokenizer_corpus import TEXTS as ODD_TEXTS
from sinkexport.pipeline.export import export, export_loaded
from sinkexport.sources import LoadedModel, load_tokenizer
from sinkrt import Session, UsageError
from tokenizers import pre_tokenizers, processors

from tests.exporter.tiny_models import tiny_model
from tests.fidelity.tokenizer_folders import DIGITS, TEXTS, byte_level, sentencepiece_model, spaced, write_folder
from tests.support import run_cli

CLASSES = (
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizer",
    "CohereTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "GemmaTokenizer",
    "OwnTokenizer",
    None,
)


def loaded(folder: Path) -> SourceTokenizer:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    return tokenizer


# --- copied -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("build", [lambda: byte_level(DIGITS), spaced], ids=["digits", "prepend"])
def test_tokenizer_json_is_copied_whatever_its_class(build: Any, name: str | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", build(), {} if name is None else {"tokenizer_class": name})
    ours = loaded(folder)
    ours.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    source = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*TEXTS, *ODD_TEXTS):
        assert ours.encode(text) == source.encode(text).ids
        assert ours.encode(text, special=False) == source.encode(text, add_special_tokens=False).ids
    # A peer that reads the files of a bundle gets the same ids, whatever the class was.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_what_the_old_way_lost(tmp_path: Path) -> None:
    """GPT2Tokenizer of transformers forgets the digit split: the reason why nothing is saved through it."""
    folder = write_folder(tmp_path, byte_level(DIGITS), {"tokenizer_class": "GPT2Tokenizer"})
    ours = loaded(folder)
    digits = [ours.token_id(digit) for digit in "2024"]
    assert ours.encode("2024") == digits
    assert [ours.decode([number]) for number in ours.encode("a 12")][-2:] == ["1", "2"]


def test_limits_of_training_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    source = byte_level()
    source.enable_truncation(8)
    source.enable_padding(length=16, pad_id=0, pad_token="<|endoftext|>")
    data = json.loads(source.to_str())
    data["model"]["dropout"] = 0.1
    ours = loaded(write_folder(tmp_path, data))
    text = "The quick brown fox jumps over the lazy dog " * 4
    source.no_truncation()
    source.no_padding()
    assert ours.encode(text) == source.encode(text).ids
    assert ours.encode("a") == source.encode("a").ids
    left = json.loads(ours.files["tokenizer.json"])
    assert left == {**data, "truncation": None, "padding": None, "model": {**data["model"], "dropout": None}}
    assert any("truncation and padding" in remark for remark in ours.remarks)
    assert any("dropout" in remark for remark in ours.remarks)


def test_a_bundle_has_the_source_s_ids(tmp_path: Path) -> None:
    source = byte_level(DIGITS)
    source.enable_truncation(4)
    folder = write_folder(tmp_path / "model", source, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"})
    tiny_model("llama", vocab_size=400).save_pretrained(folder)
    manifest = export(str(folder), tmp_path / "bundle", ExportConfig(2, 8, chunk_size=1))
    source.no_truncation()
    with Session.load(tmp_path / "bundle", threads=1) as session:
        for text in (*TEXTS, *ODD_TEXTS):
            assert session.tokenizer.encode(text) == source.encode(text).ids
    assert manifest.model.eos_token_ids == (2,)  # of config.json and the tokenizer, which agree here
    assert set(manifest.files) >= {"tokenizer.json", "tokenizer_config.json"}


# --- what stands beside tokenizer.json --------------------------------------------------------------------------------


def test_flags_of_added_tokens_are_those_of_the_config(tmp_path: Path) -> None:
    entry = {
        "content": "<|im_end|>",
        "lstrip": False,
        "rstrip": True,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
    folder = write_folder(tmp_path, byte_level(), {"added_tokens_decoder": {"2": entry}})
    ours, theirs = loaded(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.encode("a<|im_end|>  b") == [*ours.encode("a"), 2, *ours.encode("b")]
    assert theirs("a<|im_end|>  b")["input_ids"] == ours.encode("a<|im_end|>  b")


def test_tokens_of_the_vocabulary_with_a_name_are_found_whole(tmp_path: Path) -> None:
    data = json.loads(byte_level().to_str())
    data["added_tokens"] = []
    folder = write_folder(tmp_path, data, {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    ours, theirs = loaded(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.encode("<|im_start|>a<|im_end|>") == [1, *ours.encode("a"), 2]
    assert theirs("<|im_start|>a<|im_end|>")["input_ids"] == ours.encode("<|im_start|>a<|im_end|>")


def test_new_tokens_keep_the_ids_that_are_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", byte_level(), {"added_tokens_decoder": {"400": {"content": "<new>"}}})
    assert loaded(folder).encode("a<new>")[-1] == 400
    check_tokens(loaded(folder))
    legacy = write_folder(tmp_path / "b", byte_level(), added_tokens__json={"<new>": 400})
    assert loaded(legacy).encode("a<new>")[-1] == 400
    gap = write_folder(tmp_path / "c", byte_level(), {"added_tokens_decoder": {"405": {"content": "<new>"}}})
    with pytest.raises(UsageError, match=r"'<new>' to \[400\] instead of 405"):
        check_tokens(loaded(gap))
    with pytest.raises(UsageError, match=r"id 7 for .* beside tokenizer\.json, and 2 in it"):
        loaded(write_folder(tmp_path / "d", byte_level(), {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}))


@pytest.mark.parametrize(
    ("name", "flag", "in_file", "begins", "remark"),
    [
        ("LlamaTokenizerFast", True, False, True, "is put before"),
        ("LlamaTokenizer", False, True, False, "is not put before"),
        ("LlamaTokenizer", True, True, True, None),
        ("LlamaTokenizer", None, False, False, "transformers 4 put it there"),
        ("LlamaTokenizer", None, True, True, None),
        ("PreTrainedTokenizerFast", True, False, True, "is put before"),
        ("PreTrainedTokenizerFast", False, True, True, "says otherwise"),
        ("PreTrainedTokenizerFast", None, False, False, None),
    ],
)
def test_the_beginning_of_texts(
    name: str, flag: bool | None, in_file: bool, begins: bool, remark: str | None, tmp_path: Path
) -> None:
    """DeepSeek's folders have LlamaTokenizerFast, add_bos_token, and a tokenizer.json that adds nothing."""
    config = {"tokenizer_class": name, "bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>"}
    if flag is not None:
        config["add_bos_token"] = flag
    ours = loaded(write_folder(tmp_path, spaced(begins=in_file), config))
    assert ours.beginning == ((1,) if begins else ())
    assert ours.encode("ab") == [1] * begins + ours.encode("ab", special=False)
    assert len(ours.remarks) == (remark is not None)
    assert all(str(remark) in found for found in ours.remarks)


def test_a_beginning_is_added_to_what_is_there(tmp_path: Path) -> None:
    source = byte_level(special=("<s>", "</s>"))
    source.post_processor = processors.ByteLevel(trim_offsets=False)
    ours = loaded(write_folder(tmp_path, source, {"add_bos_token": True, "bos_token": "<s>"}))
    assert ours.encode("Hello") == [0, *source.encode("Hello").ids]


def test_named_tokens_that_are_nowhere_are_said(tmp_path: Path) -> None:
    ours = loaded(write_folder(tmp_path, byte_level(), {"pad_token": "[PAD]", "eos_token": "<|im_end|>"}))
    assert dict(ours.special_tokens) == {"eos_token": "<|im_end|>"}
    assert ours.num_tokens == 400
    assert any("[PAD]" in remark for remark in ours.remarks)
    assert "pad_token" not in json.loads(ours.files["tokenizer_config.json"])


def test_chat_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert loaded(write_folder(tmp_path / "a", byte_level(), {"chat_template": named})).chat_template == "D"
    alone = loaded(write_folder(tmp_path / "b", byte_level(), {"chat_template": named[:1]}))
    assert alone.chat_template is None
    assert any("tool_use" in remark for remark in alone.remarks)
    file = loaded(write_folder(tmp_path / "c", byte_level(), {"chat_template": "C"}, chat_template__jinja="J"))
    assert file.chat_template == "J"
    assert file.files["chat_template.jinja"] == b"J"
    table = loaded(write_folder(tmp_path / "d", byte_level(), {"chat_template": {"default": "D", "rag": "R"}}))
    assert table.chat_template == "D"


@pytest.mark.parametrize(
    ("config", "files", "remark"),
    [
        ({"chat_template": " "}, {}, "the chat template of tokenizer_config.json is empty: no chat"),
        ({"chat_template": []}, {}, "the chat template of tokenizer_config.json is empty: no chat"),
        (
            {"chat_template": "C"},
            {"chat_template__jinja": "\n"},
            "the chat template of chat_template.jinja is empty: no chat",
        ),
        ({}, {"chat_template__json": {"chat_template": "C"}}, "chat_template.json is a processor's: it is not read"),
    ],
)
def test_folders_without_a_chat_template_that_says_something(
    config: Any, files: Any, remark: str, tmp_path: Path
) -> None:
    tokenizer = loaded(write_folder(tmp_path / "a", byte_level(), config, **files))
    assert (tokenizer.chat_template, tokenizer.remarks) == (None, (remark,))


def test_tokens_around_a_text_have_the_ids_of_the_vocabulary(tmp_path: Path) -> None:
    data = json.loads(spaced().to_str())
    data["post_processor"]["special_tokens"]["<s>"]["ids"] = [7]
    with pytest.raises(UsageError, match=r"'<s>' to \[7\] around a text instead of 1"):
        check_tokens(loaded(write_folder(tmp_path, data)))


# --- against the model ------------------------------------------------------------------------------------------------


def with_tokens(*texts: str, template: str | None = None) -> SourceTokenizer:
    library = byte_level()
    library.add_special_tokens(list(texts))
    return SourceTokenizer("test", library, template, {"eos_token": "<|im_end|>"})


def test_tokens_without_a_row_of_the_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 3 1B's tokenizer has <image_soft_token>, its embedding has no row for it."""
    tokenizer = with_tokens("<image>")
    model = LoadedModel(tiny_model("llama", vocab_size=400), tokenizer, "tiny")
    with caplog.at_level(logging.WARNING, "sinkexport"):
        export_loaded(model, tmp_path / "bundle", ExportConfig(2, 8, chunk_size=1))
    assert "'<image>' (400): added to the tokenizer without resizing the embedding of 400 rows" in caplog.text
    with Session.load(tmp_path / "bundle", threads=1) as session:
        ids = session.tokenizer.encode("an <image> here")
        assert max(ids) < 400
        assert session.tokenizer.decode(ids) == "an <image> here"
    assert tokenizer.encode("<image>") == [400]  # the model's own is left as it was
    assert fitted(tokenizer, 401) is tokenizer


def test_tokens_without_a_row_that_chats_need_are_refused() -> None:
    with pytest.raises(UsageError, match=r"<\|u\|>, added without resizing the embedding of 400 rows"):
        fitted(with_tokens("<|u|>", template="{% for m in messages %}<|u|>{{ m.content }}{% endfor %}"), 400)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    loaded = LoadedModel(tiny_model("llama"), with_tokens(), "tiny")
    with pytest.raises(UsageError, match=r"received 400 tokens.*at most 97, the rows of the embedding"):
        export_loaded(loaded, tmp_path / "bundle", ExportConfig(2, 8, chunk_size=1))
    assert not list(tmp_path.iterdir())


def test_tokenizers_in_memory_are_taken_too() -> None:
    library = byte_level(DIGITS)
    library.enable_truncation(3)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|im_end|>", chat_template="C")
    ours = as_source_tokenizer(theirs)
    assert ours is not None
    assert (ours.chat_template, dict(ours.special_tokens)) == ("C", {"eos_token": "<|im_end|>"})
    assert len(ours.encode("12345")) == 5
    assert as_source_tokenizer(ours) is ours
    taken = LoadedModel(None, theirs, "x").tokenizer  # type: ignore[arg-type]
    assert taken is not None
    assert taken.encode("12345") == ours.encode("12345")
    with pytest.raises(UsageError, match="tokenizer: received object"):
        as_source_tokenizer(object())


def test_a_folder_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")) is None
    manifest = export(str(tmp_path / "model"), tmp_path / "bundle", ExportConfig(2, 8, chunk_size=1))
    assert manifest.tokenizer is None
    assert manifest.model.eos_token_ids == (2,)


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "list where an object should be"),
        ("{", "tokenizer_config.json: received"),
        (b"\xff", "UTF-8"),
        ("[" * 100_000, "JSON"),
        ({"add_bos_token": "yes"}, "add_bos_token of 'yes'"),
        ({"eos_token": 7}, "eos_token of 7"),
        ({"bos_token": {"a": 1}}, "bos_token of"),
        ({"chat_template": 5}, "chat_template of 5"),
        ({"chat_template": [{"name": "x"}]}, "chat_template of"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder that is no object"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder with"),
        ({"added_tokens_decoder": {"1": {"content": "<u>", "special": 3}}}, "flags"),
        ({"additional_special_tokens": 3}, "a list of tokens"),
        ({"extra_special_tokens": [3]}, "no text"),
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"tokenizer_class": 3}, "tokenizer_class of 3"),
        ({"fix_mistral_regex": True}, "fix_mistral_regex"),
        ({"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]}, "fast_tokenizer_files"),
    ],
)
def test_an_odd_config_is_one_line(config: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failed:
        load_tokenizer(str(write_folder(tmp_path, byte_level(), config)))
    assert words in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"model": {"vocab": 3}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        byte_level().to_str().encode()[:-400],
    ],
)
def test_a_broken_tokenizer_json_is_one_line(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failed:
        load_tokenizer(str(write_folder(tmp_path, tokenizer__json=raw)))
    assert str(failed.value).replace("'", "").startswith("tokenizer.json: received ")
    assert "\n" not in str(failed.value)


def test_files_without_a_vocabulary_are_refused_with_exit_code_2(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", config={"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(UsageError, match=r"tokenizer_config.json without tokenizer.json"):
        load_tokenizer(str(folder))
    tiny_model("llama").save_pretrained(folder)
    result = run_cli("export", folder, "-o", tmp_path / "bundle")
    result.refusal("without tokenizer.json")
    assert not result.out
    assert not (tmp_path / "bundle").exists()


# --- sentencepiece ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_alone_gives_sentencepiece_s_ids(kind: str, prefix: bool, tmp_path: Path) -> None:
    import sentencepiece

    raw = sentencepiece_model(kind, prefix=prefix)
    ours = loaded(write_folder(tmp_path, config={"tokenizer_class": "LlamaTokenizer"}, tokenizer__model=raw))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    for text in (*TEXTS, *ODD_TEXTS, "Hello again " * 50):
        if "<s>" not in text:
            assert ours.encode(text, special=False) == theirs.encode(text), text
            assert ours.decode(ours.encode(text, special=False)).lstrip(" ") == theirs.decode(
                theirs.encode(text)
            ).lstrip(" ")
    assert ours.beginning == (theirs.bos_id(),)
    check_tokens(ours)


def test_the_space_before_words_stays(tmp_path: Path) -> None:
    """Before the first word, also where a space stands there, and after each special token: as Llama 2 was trained."""
    ours = loaded(write_folder(tmp_path, config={"legacy": True}, tokenizer__model=sentencepiece_model()))
    pieces = [ours.library.id_to_token(number) for number in ours.encode("Hello</s>Hello", special=False)]
    assert pieces == ["▁Hello", "</s>", "▁Hello"]
    assert ours.encode(" Hello", special=False) != ours.encode("Hello", special=False)


def test_symbols_that_users_defined(tmp_path: Path) -> None:
    """Without a space before texts (Gemma) they are converted; with one they come out otherwise, and that is said."""
    raw = sentencepiece_model(prefix=False, symbols=("<x>", "\n\n"))
    ours = loaded(write_folder(tmp_path / "a", config={"tokenizer_class": "GemmaTokenizer"}, tokenizer__model=raw))
    assert ours.token_id("<x>") in ours.encode("a<x>b")
    prefixed = write_folder(
        tmp_path / "b", config={"legacy": True}, tokenizer__model=sentencepiece_model(symbols=("<x>",))
    )
    with pytest.raises(UsageError, match=r"tokenizer.model: received a conversion that gives .*<x>"):
        load_tokenizer(str(prefixed))


@pytest.mark.parametrize(
    ("config", "raw", "words"),
    [
        ({"legacy": False}, None, "legacy: false"),
        ({"add_prefix_space": False}, None, "where sentencepiece"),
        ({"tokenizer_class": "T5Tokenizer"}, None, "class T5Tokenizer"),
        ({}, b"no model", "no sentencepiece model"),
        ({}, b"", "no sentencepiece model"),
    ],
)
def test_what_sentencepiece_alone_cannot_say_is_refused(
    config: Any, raw: bytes | None, words: str, tmp_path: Path
) -> None:
    model = sentencepiece_model() if raw is None else raw
    with pytest.raises(UsageError, match=words):
        load_tokenizer(str(write_folder(tmp_path, config=config, tokenizer__model=model)))


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, tokenizer__model=sentencepiece_model())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UsageError, match=r"pip install 'sinkexport\[export\]'"):
        load_tokenizer(str(folder))


# --- vocab.json and merges.txt ----------------------------------------------------------------------------------------

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocabulary_files_give_the_trained_tokenizer_s_ids(name: str, tmp_path: Path) -> None:
    splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "Qwen2Tokenizer":
        splitter = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    source = byte_level(splitter)
    folder = write_folder(tmp_path, config={"tokenizer_class": name, "eos_token": "<|im_end|>"})
    source.model.save(str(folder))
    assert "\n# " in (folder / "merges.txt").read_text() or "\n#" in (folder / "merges.txt").read_text()  # no comments
    ours = loaded(folder)
    for text in TEXTS:
        assert ours.encode(text) == source.encode(text).ids, text
    assert ours.encode("<|im_end|>") == [2]
    assert ours.encode("<|endoftext|>") == [0]  # special for its class, though no file says so


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("merges.txt", "a b c\n", "line 1"),
        ("merges.txt", "qq zz\n", "merges.txt"),
        ("vocab.json", "[]", "vocab.json"),
        ("vocab.json", '{"a": "b"}', "id 'b'"),
        ("tokenizer_config.json", '{"tokenizer_class": "BartTokenizer"}', "class BartTokenizer"),
    ],
)
def test_broken_vocabulary_files(name: str, content: str, words: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, config={"tokenizer_class": "GPT2Tokenizer"})
    byte_level().model.save(str(folder))
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match=words):
        load_tokenizer(str(folder))


def test_ids_are_numbers_that_numpy_takes(tmp_path: Path) -> None:
    assert np.asarray(loaded(write_folder(tmp_path, byte_level())).encode("a b"), np.int64).ndim == 1
