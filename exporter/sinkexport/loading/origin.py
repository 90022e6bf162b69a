"""Origin of a model, and the model once it is in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkrt.errors import UsageError, problem

if TYPE_CHECKING:
    from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model that is named by a user.

    source: as it was given. path: the model folder or the GGUF file; None: an id of the Hub.
    location: arguments of transformers' from_pretrained. name: of the model, for the manifest.
    """

    source: str
    path: Path | None
    location: dict[str, Any]
    name: str

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return "gguf_file" in self.location


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on the CPU, its tokenizer if the source has one, and a name for the manifest.

    origin: where its weights lie on the disk; None: a model that was made in memory.
    A fast tokenizer of transformers, or one of 'tokenizers', is taken over as it is.

    Raises: UsageError for a tokenizer that is none of these.
    """

    model: Any
    tokenizer: SourceTokenizer | None
    name: str
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            from sinkexport.loading.tokenizers.source_tokenizer import as_source_tokenizer

            object.__setattr__(self, "tokenizer", as_source_tokenizer(self.tokenizer))

    def text_tokenizer(self) -> SourceTokenizer:
        """The tokenizer, where a text has to be read.

        Raises: UsageError if the source has none.
        """
        if self.tokenizer is None:
            raise UsageError(
                problem(
                    "model",
                    received="one without a tokenizer",
                    expected="a tokenizer for the text",
                    fix="use a complete model folder",
                )
            )
        return self.tokenizer
