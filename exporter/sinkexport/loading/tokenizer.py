"""The tokenizer of a model folder or a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkexport.sources import Origin

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def source_tokenizer(origin: Origin) -> Any | None:
    """The tokenizer, or None for a model folder that has none: such a bundle takes ids only."""
    import transformers

    if origin.path is not None and origin.path.is_dir() and not any((origin.path / name).is_file() for name in FILES):
        return None
    return transformers.AutoTokenizer.from_pretrained(**origin.location, trust_remote_code=False)
