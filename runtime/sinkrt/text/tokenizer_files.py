"""The tokenizer files of a bundle: tokenizer.json, chat template and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from sinkrt.contract import Manifest
from sinkrt.errors import BundleError, UsageError, problem

_TOKENIZER_CONFIG = "tokenizer_config.json"


def read_tokenizer_files(bundle: Path, manifest: Manifest) -> tuple[tokenizers.Tokenizer, str | None, dict[str, Any]]:
    """Read a bundle's tokenizer.

    Returns: the library's tokenizer, the chat template's source if there is one, and special tokens by name.

    Raises: UsageError if the bundle has none; BundleError if its files are unreadable.
    """
    facts = manifest.tokenizer
    if facts is None:
        raise UsageError(
            problem(
                "tokenizer",
                received="a bundle without one",
                expected="tokenizer.json",
                fix="feed token ids, or export a model folder with its tokenizer",
            )
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(bundle / facts.file))
    except Exception as error:  # the library raises plain Exception
        raise _unreadable(facts.file, error, "a tokenizer of 'tokenizers'") from error
    model = manifest.model
    special: dict[str, Any] = {
        name: tokenizer.id_to_token(token) or ""
        for name, token in (("bos_token", model.bos_token_id), ("eos_token", next(iter(model.eos_token_ids), None)))
        if token is not None
    }
    template = None
    try:
        if facts.chat_template is not None:
            template = (bundle / facts.chat_template).read_text(encoding="utf-8")
        if _TOKENIZER_CONFIG in manifest.files:  # what the tokenizer itself calls its special tokens goes first
            config = json.loads((bundle / _TOKENIZER_CONFIG).read_text(encoding="utf-8"))
            special |= named_special_tokens(config)
    except (OSError, ValueError) as error:
        raise _unreadable("tokenizer files", error, "UTF-8 text and JSON") from error
    return tokenizer, template, special


def named_special_tokens(config: Any) -> dict[str, Any]:
    """Special tokens of a tokenizer_config.json by name: plain texts, or objects with a ``content``.

    Lists, such as ``additional_special_tokens``, stay lists of texts.
    """
    if not isinstance(config, dict):
        return {}
    named: dict[str, Any] = {}
    for group in (config, config.get("model_specific_special_tokens"), config.get("extra_special_tokens")):
        if isinstance(group, dict):
            named |= {name: _token_text(token) for name, token in group.items() if name.endswith("_token")}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(name), list):
            named[name] = [text for token in config[name] if (text := _token_text(token)) is not None]
    return {name: value for name, value in named.items() if value is not None}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _unreadable(what: str, error: Exception, expected: str) -> BundleError:
    reason = " ".join(str(error).split())[:200]
    return BundleError(problem(what, received=reason, expected=expected, fix="export the model again"))
