"""What an answer must match, as a user gives it, checked as far as that needs no package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from sinkrt.errors import UsageError, problem
from sinkrt.grammar.schema import JsonSchema, checked_schema, schema_text

MAX_GRAMMAR_CHARACTERS = 2**17
"""Longest grammar or regular expression."""
MAX_NESTING = 64
"""Deepest brackets of a grammar or a regular expression."""

Kind = Literal["json_schema", "regex", "lark"]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must match. Make one with a class method.

    kind: of `text`, which is llguidance's: a JSON schema, a regular expression or a grammar in its dialect of Lark.
    around: an expression of Lark with ``@body`` in it, which is `text`: what may come before it, such as a model's
    thinking, and what may come instead. "": nothing. rules: rules of Lark that `around` names.
    """

    kind: Kind
    text: str
    around: str = ""
    rules: str = ""

    @classmethod
    def of_schema(cls, schema: JsonSchema | str) -> Grammar:
        """A grammar of JSON texts that a schema allows. schema: an object, a bool, or either as JSON text.

        Raises: UsageError for a schema that is none, is too large, or asks for what cannot be made sure.
        """
        return cls("json_schema", schema_text(checked_schema(schema)))

    @classmethod
    def of_regex(cls, regex: str) -> Grammar:
        """A grammar of texts that match a regular expression as a whole.

        Raises: UsageError for one that is empty or too large.
        """
        _check_text("regex", regex)
        return cls("regex", regex)

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> Grammar:
        """A grammar of some texts.

        Raises: UsageError if there is none, or one is empty.
        """
        if not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise UsageError(
                problem("choice", received=choices, expected="a list of texts, none empty", fix="give one at least")
            )
        text = "start: " + " | ".join(lark_text(choice) for choice in choices)
        _check_text("choice", text, nested=False)
        return cls("lark", text)

    @classmethod
    def of_text(cls, text: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark, or in llama.cpp's GBNF, which writes ``::=``.

        Raises: UsageError for one that is empty or too large.
        """
        _check_text("grammar", text)
        return cls("lark", text)


def grammar_of(
    json_schema: JsonSchema | str | None = None, regex: str | None = None, grammar: str | None = None
) -> Grammar | None:
    """The grammar that one of three options asks for, or None without any.

    Raises: UsageError if there is more than one, or as the methods of `Grammar`.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UsageError(
            problem(" and ".join(names), received="together", expected="one of them", fix="leave out the others")
        )
    if json_schema is not None:
        return Grammar.of_schema(json_schema)
    if regex is not None:
        return Grammar.of_regex(regex)
    return None if grammar is None else Grammar.of_text(grammar)


def lark_text(text: str) -> str:
    """A text as Lark writes it: in quotes, with JSON's escapes."""
    return json.dumps(text)


def lark_json(schema: JsonSchema) -> str:
    """An expression of Lark for the JSON texts that a checked schema allows."""
    return f"%json {schema_text(schema)}"


def _check_text(what: str, text: Any, *, nested: bool = True) -> None:
    if not isinstance(text, str) or not text.strip():
        received = "nothing" if isinstance(text, str) else type(text).__name__
        raise UsageError(problem(what, received=received, expected="a text", fix="write one, or leave it out"))
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise UsageError(
            problem(
                what,
                received=f"{len(text)} characters",
                expected=f"at most {MAX_GRAMMAR_CHARACTERS}",
                fix="make it shorter",
            )
        )
    if nested and (depth := _nesting(text)) > MAX_NESTING:
        raise UsageError(
            problem(
                what,
                received=f"brackets {depth} deep",
                expected=f"at most {MAX_NESTING}",
                fix="give its parts names, or make it flatter",
            )
        )


def _nesting(text: str) -> int:
    """Deepest round brackets, as if none were escaped."""
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest, depth = max(deepest, depth), max(depth, 0)
    return deepest
