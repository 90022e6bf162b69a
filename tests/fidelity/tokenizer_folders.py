"""Small model folders with tokenizers of the kinds that real ones have."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINING = [
    "The quick brown fox jumps over the lazy dog, 12 times in 2024.",
    "def f(x):\n    return x ** 2  # square\n",
    "## Heading\n\n# a # b ## c\n",
    "naïve café, Straße, 你好世界, こんにちは, Привет мир",
    "  indented\n\twith tabs  and  spaces",
    "1 22 333 4444 55555",
    "Hello world! Hello again, world? It's what they've said: don't.",
] * 4
TEXTS = (
    "",
    " ",
    "Hello world",
    " Hello  world ",
    "in 2024 and 12345",
    "naïve 你好 Привет 🙂",
    "a\n\n\nb\t c",
    "# ## ### #!",
    "don't they've",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def byte_level(
    splitter: Any = None, *, vocab_size: int = 400, special: tuple[str, ...] = tuple(SPECIAL)
) -> tokenizers.Tokenizer:
    """Byte-level BPE, special tokens first, trained on a few lines."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def spaced(*, begins: bool = True) -> tokenizers.Tokenizer:
    """BPE with byte fallback as Llama 2's tokenizer.json has it: a normaliser that puts a space before each piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], pair=["<s>", "$A", "$B"], special_tokens=[("<s>", 1)]
        )
    return tokenizer


def write_folder(
    folder: Path, tokenizer: tokenizers.Tokenizer | dict[str, Any] | None = None, config: Any = None, **files: Any
) -> Path:
    """A folder with tokenizer files and a config.json of Llama. files: by name with dots as two underscores, as JSON
    unless they are text or bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {"config__json": {"model_type": "llama"}, **files}
    if tokenizer is not None:
        data = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
        contents["tokenizer__json"] = json.dumps(data, ensure_ascii=False)
    if config is not None:
        contents["tokenizer_config__json"] = config
    for name, content in contents.items():
        raw = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        (folder / name.replace("__", ".")).write_bytes(raw)
    return folder


@functools.cache
def sentencepiece_model(kind: str = "bpe", *, prefix: bool = True, symbols: tuple[str, ...] = ()) -> bytes:
    """tokenizer.model as sentencepiece trains it, with byte fallback as in Llama 2."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING * 3),
        model_writer=written,
        vocab_size=420,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=list(symbols),
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()
