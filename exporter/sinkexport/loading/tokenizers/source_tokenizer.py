"""Tokenizer of a model from any source: a tokenizer of 'tokenizers', a template, and files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from sinkrt.errors import SinkError, UsageError, problem
from sinkrt.text import Tokenizer, named_special_tokens
from sinkrt.text.tokenizer import utf8_errors

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of transformers for special tokens that a model may have."""
_PLACEHOLDER = "a"


@dataclasses.dataclass(frozen=True)
class SourceTokenizer:
    """The tokenizer of a model, to the id. Make one with `sinkexport.sources.load_tokenizer`.

    kind: where it was read from, for people. library: how it splits text. chat_template: Jinja source, or None.
    special_tokens: texts by name (``bos_token``). config: further keys of tokenizer_config.json.
    tokenizer_json: the bytes of tokenizer.json, if they are the source's own; None: written by the library.
    declared_end_ids: ids that the source names as ends of a turn, apart from eos_token and the template's.
    remarks: what a user should know of it, one line each.
    """

    kind: str
    library: tokenizers.Tokenizer
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    config: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    tokenizer_json: bytes | None = None
    declared_end_ids: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    @functools.cached_property
    def runtime(self) -> Tokenizer:
        """The same tokenizer as a bundle's runtime has it.

        Raises: UsageError for a chat template that is no Jinja.
        """
        try:
            named = {**named_special_tokens(dict(self.config)), **self.special_tokens}
            return Tokenizer(self.library, self.chat_template, named)
        except SinkError as error:
            raise broken_template(error) from error

    def close(self) -> None:
        """End the process that renders the chat template, if there is one. A later call starts another."""
        if "runtime" in self.__dict__:
            self.runtime.close()

    @functools.cached_property
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of the files of a bundle that hold the tokenizer."""
        files = {
            TOKENIZER_FILE: self.tokenizer_json or self.library.to_str(pretty=True).encode(),
            CONFIG_FILE: _json({**self.config, **self.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}),
        }
        if self.chat_template is not None:
            files[TEMPLATE_FILE] = self.chat_template.encode()
        return MappingProxyType(files)

    def save(self, folder: Path | str) -> None:
        """Write `files` into a folder, which is made if it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the model starts its texts with, if anything.

        Raises: UsageError for text that is not valid Unicode.
        """
        with utf8_errors():
            return list(self.library.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return str(self.library.decode(list(ids), skip_special_tokens=False))

    def token_id(self, text: str | None) -> int | None:
        """The id of a token by its text as the vocabulary has it; None if there is no such token."""
        found: int | None = None if text is None else self.library.token_to_id(text)
        return found

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Text -> id of every token, added ones included."""
        return MappingProxyType(dict(self.library.get_vocab(with_added_tokens=True)))

    @property
    def num_tokens(self) -> int:
        """One more than the highest id."""
        return max(self.vocabulary.values(), default=-1) + 1

    @property
    def beginning(self) -> tuple[int, ...]:
        """Ids that are put before every text: a beginning-of-text token, or none."""
        marked, plain = (self.encode(_PLACEHOLDER, special=special) for special in (True, False))
        for start in range(len(marked) - len(plain) + 1):
            if marked[start : start + len(plain)] == plain:
                return tuple(marked[:start])
        return ()

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of special tokens: those that are marked as such, and those that have a name."""
        marked = {number for number, token in self.library.get_added_tokens_decoder().items() if token.special}
        named = {self.token_id(text) for text in self.special_tokens.values()}
        return frozenset({*marked, *(number for number in named if number is not None)})

    @property
    def template_end(self) -> int | None:
        """Control token with which the chat template closes an answer; None if there is none, or no template."""
        if self.chat_template is None:
            return None
        try:
            rest = (self.runtime.template_facts.closing or "").lstrip()
        except SinkError:  # refused elsewhere
            return None
        control = self.control_ids
        texts = {text: number for text, number in self.vocabulary.items() if number in control}
        fitting = [text for text in texts if text.strip() and rest.startswith(text)]
        return texts[max(fitting, key=len)] if fitting else None

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a turn by what the tokenizer says: eos_token, what the source names and the template's."""
        ends = {*self.declared_end_ids, self.token_id(self.special_tokens.get("eos_token")), self.template_end}
        return tuple(sorted(number for number in ends if number is not None))


def library_tokenizer(raw: bytes, name: str = TOKENIZER_FILE) -> tokenizers.Tokenizer:
    """A tokenizer of 'tokenizers' from the bytes of a tokenizer.json.

    Raises: UsageError if they are none.
    """
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, or the PanicException of Rust, which is no Exception
        raise UsageError(
            problem(
                name,
                received=one_line(error),
                expected="a file of 'tokenizers'",
                fix="get the file again from where the model came from",
            )
        ) from error


def as_source_tokenizer(tokenizer: Any) -> SourceTokenizer | None:
    """`tokenizer` itself, or a fast tokenizer of transformers or 'tokenizers' as it is in memory.

    Raises: UsageError for anything else.
    """
    if tokenizer is None or isinstance(tokenizer, SourceTokenizer):
        return tokenizer
    library = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(library, tokenizers.Tokenizer):
        raise UsageError(
            problem(
                "tokenizer",
                received=type(tokenizer).__name__,
                expected="a tokenizer of 'tokenizers'",
                fix="use a model folder with tokenizer.json",
            )
        )
    named = {name: text for name in NAMES if isinstance(text := getattr(tokenizer, name, None), str)}
    template = getattr(tokenizer, "chat_template", None)
    return SourceTokenizer(
        kind=type(tokenizer).__name__,
        library=without_limits(library),
        chat_template=template if isinstance(template, str) else None,
        special_tokens=named,
    )


def without_limits(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that neither cuts texts nor pads them."""
    copy = tokenizers.Tokenizer.from_str(library.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def broken_template(error: Exception) -> UsageError:
    """The refusal of a model whose chat template cannot be used."""
    return UsageError(
        problem(
            "chat template",
            received=f"the source's own, which fails ({one_line(error)})",
            expected="a template that renders a user's message",
            fix="repair or remove it in the model's folder",
        )
    )


def one_line(error: BaseException) -> str:
    """An error's text, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8", "backslashreplace")
