"""The files that a model folder (or a repository of the Hub) keeps its tokenizer in, and what they say, checked."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import CONFIG_FILE, NAMES, TEMPLATE_FILE, TOKENIZER_FILE, one_line

if TYPE_CHECKING:
    from sinkexport.loading.origin import Origin

LFS_POINTER = b"version https://git-lfs"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
ADDED_FILE, SPECIAL_FILE = "added_tokens.json", "special_tokens_map.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything else.

    flags: those of lstrip, rstrip, single_word, normalized and special that the file says.
    """

    content: str
    flags: Mapping[str, bool]


class TokenizerFiles:
    """Reads the files of one model, each at most once."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin

    def path(self, name: str) -> Path | None:
        """Path of a file; None if the model has none of that name.

        Raises: OSError if the Hub cannot be asked.
        """
        if self._origin.path is not None:
            path = self._origin.path / name
            return path if path.is_file() else None
        from transformers.utils import cached_file

        found = cached_file(
            self._origin.location["pretrained_model_name_or_path"], name, _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else Path(found)

    def raw(self, name: str) -> bytes | None:
        """The content of a file, or None.

        Raises: UsageError for a pointer of Git LFS, and a file that cannot be read.
        """
        path = self.path(name)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _odd(name, error.strerror or str(error), "a file that can be read") from error
        if content.startswith(LFS_POINTER):
            raise UsageError(
                problem(
                    name,
                    received="a pointer of Git LFS",
                    expected="the file itself",
                    fix="run 'git lfs pull' in the model's folder",
                )
            )
        return content

    def text(self, name: str) -> str | None:
        """A file as UTF-8, or None. Raises: UsageError."""
        content = self.raw(name)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _odd(name, one_line(error), "UTF-8 text") from error

    def json_object(self, name: str) -> dict[str, Any] | None:
        """A file that holds a JSON object, or None. Raises: UsageError."""
        text = self.text(name)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _odd(name, one_line(error), "JSON") from error
        if not isinstance(found, dict):
            raise _odd(name, f"{type(found).__name__} where an object should be", "a JSON object")
        return found

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, and of special_tokens_map.json what it lacks; {} if there is neither.

        transformers reads special_tokens_map.json first where tokenizer_config.json lists no added tokens.
        """
        config = self.json_object(CONFIG_FILE) or {}
        wanted = (*NAMES, *_LISTS)
        special = {name: value for name, value in (self.json_object(SPECIAL_FILE) or {}).items() if name in wanted}
        config = {**special, **config} if "added_tokens_decoder" in config else {**config, **special}
        for flag in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens"):
            if not isinstance(config.get(flag), bool | None):
                raise _odd(CONFIG_FILE, f"{flag} of {config[flag]!r}", "true or false")
        if config.get("split_special_tokens"):
            raise _odd(
                CONFIG_FILE,
                "split_special_tokens, by which no special token is ever found",
                "a tokenizer that knows its special tokens",
                "set it to false",
            )
        if any(name != TOKENIZER_FILE for name in config.get("fast_tokenizer_files") or ()):
            raise _odd(
                CONFIG_FILE,
                "fast_tokenizer_files, one for each version of transformers",
                f"one {TOKENIZER_FILE}",
                "remove the key, and keep the file that is right",
            )
        if not isinstance(config.get("tokenizer_class"), str | None):
            raise _odd(CONFIG_FILE, f"tokenizer_class of {config['tokenizer_class']!r}", "a name")
        return config

    @property
    def tokenizer_class(self) -> str:
        """The name of transformers' class without 'Fast', or ""."""
        return (self.config.get("tokenizer_class") or "").removesuffix("Fast")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens by name (``bos_token``). Raises: UsageError for what is no text."""
        found = {}
        for name in NAMES:
            value = self.config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[name] = text
            elif value is not None and text != "":
                raise _odd(CONFIG_FILE, f"{name} of {json.dumps(value)[:60]}", "a token's text")
        return found

    def other_named_tokens(self) -> tuple[str, ...]:
        """Texts of tokens that the config names apart from `special_tokens`. Raises: UsageError."""
        found: list[Any] = [
            value
            for name, value in self.config.items()
            if name.endswith("_token") and name not in NAMES and isinstance(value, str | dict)
        ]
        for name in _LISTS:
            value = self.config.get(name) or []
            if not isinstance(value, list | dict):
                raise _odd(CONFIG_FILE, f"{name} of {json.dumps(value)[:60]}", "a list of tokens")
            found += value.values() if isinstance(value, dict) else value
        texts = [value.get("content") if isinstance(value, dict) else value for value in found]
        if not all(isinstance(text, str) for text in texts):
            raise _odd(CONFIG_FILE, "a special token that is no text", "tokens' texts")
        return tuple(text for text in texts if text)

    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens that stand outside tokenizer.json, by id. Raises: UsageError."""
        found: dict[int, AddedToken] = {}
        listed = self.config.get("added_tokens_decoder")
        if listed is None:
            for text, number in (self.json_object(ADDED_FILE) or {}).items():
                if isinstance(number, bool) or not isinstance(number, int):
                    raise _odd(ADDED_FILE, f"id {json.dumps(number)[:60]} of {text!r}", "text: id")
                found[number] = AddedToken(text, {})
            return found
        if not isinstance(listed, dict):
            raise _odd(CONFIG_FILE, "added_tokens_decoder that is no object", "id: token")
        for number, token in listed.items():
            content = token.get("content") if isinstance(token, dict) else None
            if not number.isdecimal() or not isinstance(content, str):
                raise _odd(
                    CONFIG_FILE, f"added_tokens_decoder with {json.dumps({number: token})[:80]}", 'id: {"content": ..}'
                )
            flags = {flag: token[flag] for flag in _FLAGS if flag in token}
            if not all(isinstance(value, bool) for value in flags.values()):
                raise _odd(CONFIG_FILE, f"flags {json.dumps(flags)} of {content!r}", "true or false")
            found[int(number)] = AddedToken(content, flags)
        return found

    def chat_template(self) -> tuple[str | None, tuple[str, ...]]:
        """The Jinja source of the chat template, and remarks. Raises: UsageError for what is no text."""
        found, file = self.text(TEMPLATE_FILE), TEMPLATE_FILE
        if found is None:
            found, file = self.config.get("chat_template"), CONFIG_FILE
        if found is None and self.path(PROCESSOR_TEMPLATE_FILE) is not None:
            return None, (f"{PROCESSOR_TEMPLATE_FILE} is a processor's: it is not read",)
        if isinstance(found, list | dict):
            named = _named_templates(found)
            if named and "default" not in named:
                return None, (f"none of the chat templates {', '.join(named)} is called 'default': no chat",)
            found = named.get("default", "")
        if not isinstance(found, str | None):
            raise _odd_templates(found)
        if found is not None and not found.strip():
            return None, (f"the chat template of {file} is empty: no chat",)
        return found, ()


def _named_templates(found: Any) -> dict[str, str]:
    """Templates by name: of names and texts as saved by transformers, or of an object that transformers takes too."""
    try:
        named = found if isinstance(found, dict) else {one["name"]: one["template"] for one in found}
    except (TypeError, KeyError) as error:
        raise _odd_templates(found) from error
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
        raise _odd_templates(found)
    return named


def _odd_templates(found: Any) -> UsageError:
    return _odd(CONFIG_FILE, f"chat_template of {json.dumps(found)[:60]}", "text, or names and templates")


def _odd(name: str, received: str, expected: str, fix: str = "repair the file in the model's folder") -> UsageError:
    return UsageError(problem(name, received=received, expected=expected, fix=fix))
