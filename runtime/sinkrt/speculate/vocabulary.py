"""Ids of a draft bundle and of the model: one tokenizer, whose vocabularies may differ in size and in added tokens."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sinkrt.errors import UsageError, problem
from sinkrt.speculate.sessions import BundleSession
from sinkrt.text.tokenizer_files import read_tokenizer_files

PARTS = ("normalizer", "pre_tokenizer")
"""Parts of a tokenizer file that decide, with the model, which tokens a text has."""

SAME_TEXT = ("type", "merges", "unk_token", "byte_fallback", "ignore_merges", "continuing_subword_prefix")
"""Keys of its model that do so too. The vocabulary is compared token by token."""


class VocabularyMap(NamedTuple):
    """to_draft: int64 [the model's vocabulary]. to_model: int64 [the draft's]. -1: the other has no such token."""

    to_draft: npt.NDArray[np.int64]
    to_model: npt.NDArray[np.int64]


def map_vocabularies(session: BundleSession, draft: BundleSession) -> VocabularyMap:
    """Find the ids of tokens that both have, by their texts.

    Raises: UsageError naming what differs if a text would have other tokens; BundleError if a file is unreadable.
    """
    files = [read_tokenizer_files(each.bundle, each.manifest)[0] for each in (session, draft)]
    if (reason := difference(*(json.loads(file.to_str()) for file in files))) is not None:
        raise UsageError(
            problem(
                "draft bundle",
                received=f"another tokenizer: {reason}",
                expected="the tokenizer of the bundle that it drafts for",
                fix="use a smaller model of the same family",
            )
        )
    ours, theirs = (file.get_vocab(with_added_tokens=True) for file in files)
    sizes = [each.manifest.model.vocab_size for each in (session, draft)]
    to_draft, to_model = (np.full(size, -1, dtype=np.int64) for size in sizes)
    for token, number in ours.items():
        other = theirs.get(token, -1)
        if number < sizes[0] and 0 <= other < sizes[1]:
            to_draft[number], to_model[other] = other, number
    return VocabularyMap(to_draft, to_model)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Name what makes two tokenizer files cut a text into other tokens; None: nothing does."""
    for part in PARTS:
        if ours.get(part) != theirs.get(part):
            return f"its {part} is {_short(theirs.get(part))}, not {_short(ours.get(part))}"
    models = ours.get("model", {}), theirs.get("model", {})
    for key in SAME_TEXT:
        one, other = (model.get(key) for model in models)
        if one != other and isinstance(one, list) and isinstance(other, list):
            at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            if at is None:
                return f"it has {len(other)} {key}, not {len(one)}"
            return f"{key}[{at}] is {_short(other[at])}, not {_short(one[at])}"
        if one != other:
            return f"its model's {key} is {_short(other)}, not {_short(one)}"
    tokens = [_texts(model.get("vocab", {})) for model in models]
    if tokens[0] != tokens[1]:
        missing = sorted(tokens[0] - tokens[1]) or sorted(tokens[1] - tokens[0])
        whose = "it has no token" if tokens[0] - tokens[1] else "it has a token more,"
        return f"{whose} {missing[0]!r}"
    return None


def _texts(vocabulary: Any) -> set[str]:
    """Tokens of a model: the keys of a mapping, or the first of pairs with scores, which count as well."""
    if isinstance(vocabulary, dict):
        return set(vocabulary)
    return {json.dumps(pair) for pair in vocabulary}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + ".."
