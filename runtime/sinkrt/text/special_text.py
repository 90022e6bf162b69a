"""Control tokens written out in a user's text: found, and encoded as ordinary text.

A tokenizer takes ``<|im_end|>`` for a control token wherever it stands. `PlainEncoder` is the same tokenizer with its
control tokens renamed: text is read as before, but for their names, and a control token that a template has written is
given by its new name. So every other rule of the tokenizer (white space, splits, merges) still holds.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from sinkrt.errors import UsageError, problem

_PRIVATE = range(0xE000, 0xF8FF)
"""Code points that mean nothing by themselves: marks around a user's text, never passed on."""


@dataclasses.dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer.

    special: texts of those that it calls special. named: other added tokens that the chat template writes by itself,
    such as a role's name in brackets; white space is none.
    """

    special: frozenset[str]
    named: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, literals: str = "") -> ControlTokens:
        """Control tokens of a tokenizer with a template that writes `literals`."""
        added = list(tokenizer.get_added_tokens_decoder().values())
        special = frozenset(token.content for token in added if token.special and token.content)
        named = (token.content for token in added if not token.special and token.content.strip())
        return cls(special, frozenset(name for name in named if name in literals))

    @property
    def all(self) -> frozenset[str]:
        """Names of both kinds."""
        return self.special | self.named


def pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Pattern that finds any of some texts, the longest where several begin."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def texts_in(value: Any) -> Iterator[str]:
    """All texts of a JSON value, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def names_in(value: Any) -> Iterator[str]:
    """All names of fields of a JSON value."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from names_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from names_in(item)


def split(text: str, control: re.Pattern[str]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is one that `control` finds."""
    pieces, at = [], 0
    for found in control.finditer(text):
        pieces += [(text[at : found.start()], False), (found[0], True)]
        at = found.end()
    return [*pieces, (text[at:], False)]


class Marks:
    """Two characters around each control token of a user's text, so that it is found again in a rendered text.

    texts: everything that will be rendered; the two occur in none of it.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        used = set().union(*texts)
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        try:
            self._start, self._end = next(free), next(free)
        except StopIteration:
            raise UsageError(
                problem(
                    "text",
                    received="all private characters of Unicode and a control token",
                    expected="ordinary text",
                    fix="pass --allow-special",
                )
            ) from None

    def put(self, value: Any, control: re.Pattern[str]) -> Any:
        """A text with its control tokens marked; texts in lists and dicts too."""
        if isinstance(value, str):
            return control.sub(lambda found: self._start + found[0] + self._end, value)
        if isinstance(value, Mapping):
            return {key: self.put(item, control) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.put(item, control) for item in value]
        return value

    def remove(self, text: str) -> str:
        """The text without any marks."""
        return text.replace(self._start, "").replace(self._end, "")

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces without marks, each with whether it was marked: the user's."""
        found, at = [], 0
        for match in re.finditer(f"{self._start}([^{self._start}{self._end}]*){self._end}", text):
            found += [(self.remove(text[at : match.start()]), False), (match[1], True)]
            at = match.end()
        return [*found, (self.remove(text[at:]), False)]


class PlainEncoder:
    """Encoder of text in which only chosen pieces may be control tokens.

    Raises: UsageError if the tokenizer does not work with other names for its control tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, control: ControlTokens) -> None:
        # Nobody can write the new names: they are drawn anew in every process.
        secret = secrets.token_hex(8)
        self._names = {name: f"\ue000{secret}{i:x}\ue001" for i, name in enumerate(sorted(control.all))}
        self._ids = {name: int(tokenizer.token_to_id(name) or 0) for name in self._names}  # added tokens have one
        self._find = pattern(self._names)
        try:
            self._tokenizer = _renamed(tokenizer, self._names)
        except Exception as error:  # the library raises plain Exception
            raise _impossible(str(error)) from error
        self._check(tokenizer)

    def encode(self, pieces: Iterable[tuple[str, bool]], *, special: bool) -> list[int]:
        """Ids of a text in pieces, each with whether it is the user's, in which nothing becomes a control token.

        special: whether to add what the model starts its texts with.

        Raises: UsageError if a control token does not come out as one.
        """
        written: collections.Counter[str] = collections.Counter()

        def new_name(found: re.Match[str]) -> str:
            written[found[0]] += 1
            return self._names[found[0]]

        text = "".join(text if users else self._find.sub(new_name, text) for text, users in pieces)
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        for name, count in written.items():  # some tokenizers find a name only where it stands alone, or not at all
            if ids.count(self._ids[name]) < count:
                raise _impossible(f"'{name}' is not always one token")
        return ids

    def _check(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Make sure that ids are those of the tokenizer itself, for its control tokens and between them."""
        for name, other in self._names.items():
            if self._tokenizer.token_to_id(other) != self._ids[name]:
                raise _impossible(f"'{name}' gets another id")
        text = "A b\n 12 c." + " d ".join(self._names) + "e\u00e9 \n"
        for special in (False, True):
            if self.encode([(text, False)], special=special) != tokenizer.encode(text, add_special_tokens=special).ids:
                raise _impossible("text gets other ids")


def _renamed(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer with other names for some of its tokens, in the vocabulary too: text cannot become them."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
    model = data["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
    """Whether a merge takes part in making a control token out of text."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _impossible(reason: str) -> UsageError:
    one_line = " ".join(reason.split())[:200]
    return UsageError(
        problem(
            "text",
            received=f"a control token, which this tokenizer cannot take as ordinary text ({one_line})",
            expected="text without control tokens",
            fix="leave it out, or pass --allow-special",
        )
    )
