"""The tokenizer of a model folder, a repository of the Hub or a GGUF file."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import CONFIG_FILE, TOKENIZER_FILE, SourceTokenizer, without_limits
from sinkexport.loading.tokenizers.tokenizer_files import TokenizerFiles
from sinkexport.loading.tokenizers.tokenizer_json import TokenizerJson, folder_tokenizer_json

if TYPE_CHECKING:
    from sinkexport.loading.origin import Origin

SENTENCEPIECE_FILE, TEKKEN_FILE = "tokenizer.model", "tekken.json"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
_OTHER_FILES = (CONFIG_FILE, TEKKEN_FILE, VOCABULARY_FILE, "vocab.txt", "spiece.model", "tiktoken.model")
_NOT_KEPT = (
    "chat_template",
    "auto_map",
    "added_tokens_decoder",
    "add_bos_token",
    "add_eos_token",
    "tokenizer_file",
    "name_or_path",
    "fix_mistral_regex",
)
"""Keys of tokenizer_config.json that say how to change tokenizer.json, which is done, or run code."""


def source_tokenizer(origin: Origin) -> SourceTokenizer | None:
    """The tokenizer, or None for a model that has none: such a bundle takes ids only.

    Raises: UsageError for one that cannot be taken over to the id.
    """
    return _of_gguf(origin) if origin.is_gguf else _of_folder(TokenizerFiles(origin))


def _of_folder(files: TokenizerFiles) -> SourceTokenizer | None:
    raw = files.raw(TOKENIZER_FILE)
    kind, remarks = TOKENIZER_FILE, []
    if raw is not None:
        if files.path(TEKKEN_FILE) is not None:
            remarks.append(f"{TEKKEN_FILE} is there too: {TOKENIZER_FILE} is what is read")
    elif (model := files.raw(SENTENCEPIECE_FILE)) is not None:
        from sinkexport.loading.tokenizers.sentencepiece_tokenizer import from_sentencepiece

        kind, raw = SENTENCEPIECE_FILE, from_sentencepiece(model, files)
    elif files.path(VOCABULARY_FILE) is not None and files.path(MERGES_FILE) is not None:
        from sinkexport.loading.tokenizers.bpe_files import from_bpe_files

        kind, raw = f"{VOCABULARY_FILE} and {MERGES_FILE}", from_bpe_files(files)
    else:
        if found := [name for name in _OTHER_FILES if files.path(name) is not None]:
            raise UsageError(
                problem(
                    "tokenizer",
                    received=f"{', '.join(found)} without {TOKENIZER_FILE}",
                    expected=f"{TOKENIZER_FILE}, {SENTENCEPIECE_FILE}, or {VOCABULARY_FILE} with "
                    f"{MERGES_FILE}; or none of these files, for token ids only",
                    fix=f"add {TOKENIZER_FILE}, or remove {', '.join(found)}",
                )
            )
        return None
    file = folder_tokenizer_json(files, TokenizerJson(raw))
    template, more = files.chat_template()
    named = {name: text for name, text in files.special_tokens.items() if text in file.tokens}
    return SourceTokenizer(
        kind=kind,
        library=file.library(),
        chat_template=template,
        special_tokens=MappingProxyType(named),
        config=MappingProxyType(_kept(files.config, file)),
        tokenizer_json=file.content(),
        remarks=(*remarks, *file.remarks, *more),
    )


def _kept(config: dict[str, Any], file: TokenizerJson) -> dict[str, Any]:
    """The keys of tokenizer_config.json that a bundle keeps: not those of tokens that are in no vocabulary."""

    def is_missing(name: str, value: Any) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return name.endswith("_token") and isinstance(text, str) and text not in file.tokens

    return {name: value for name, value in config.items() if name not in _NOT_KEPT and not is_missing(name, value)}


def _of_gguf(origin: Origin) -> SourceTokenizer | None:
    from sinkexport.loading.gguf_models.file import open_gguf
    from sinkexport.loading.tokenizers.gguf_tokenizer import gguf_tokenizer

    if origin.path is None:
        raise UsageError(
            problem(
                "model", received=f"'{origin.source}'", expected="a .gguf file on this machine", fix="download it first"
            )
        )
    found = gguf_tokenizer(open_gguf(origin.path))
    if found is None:
        return None
    return SourceTokenizer(
        kind=f"GGUF {found.model}" + (f", pre {found.pre}" if found.pre else ""),
        library=without_limits(found.tokenizer),
        chat_template=found.chat_template,
        special_tokens=MappingProxyType(dict(found.special_tokens)),
        declared_end_ids=tuple(found.end_ids),
    )
