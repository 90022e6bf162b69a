"""What the answers of ``sinkexport run`` must match: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinkrt import Session, UsageError
from sinkrt.errors import problem
from sinkrt.grammar import Grammar, grammar_of, require_library

MAX_FILE_BYTES = 2**20
"""Largest file of a schema or a grammar; what is longer is refused anyway."""


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """The options of `Session.generate` that say what answers must match, and the grammar that they ask for."""

    options: Mapping[str, Any]
    grammar: Grammar | None

    @classmethod
    def read(cls, json_schema: Path | None, regex: str | None, grammar: Path | None, *, resume: bool) -> AnswerForm:
        """Read the files. resume: whether an answer goes on that an earlier run has begun.

        Raises: UsageError for more than one option, an unreadable file, or without the package that they need.
        """
        texts = {"json_schema": _text_of(json_schema), "regex": regex, "grammar": _text_of(grammar)}
        wanted = grammar_of(**texts)
        if wanted is not None:
            if resume:
                raise UsageError(
                    problem(
                        "--resume",
                        received="with a form that the answer must match",
                        expected="one or the other: a saved state does not say how far the answer has matched",
                        fix="leave out --resume, or --json-schema, --regex and --grammar",
                    )
                )
            require_library()
        return cls(texts, wanted)

    def compile(self, session: Session) -> None:
        """Make the grammar ready, before any text is read.

        Raises: UsageError for one that cannot be.
        """
        if self.grammar is not None:
            session.grammars.compile(self.grammar)


def _text_of(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        size = file.stat().st_size
        text = "" if size > MAX_FILE_BYTES else file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "bytes that are no UTF-8"
        raise UsageError(problem(f"'{file}'", received=reason, expected="a text file", fix="check the path")) from error
    if size > MAX_FILE_BYTES:
        raise UsageError(
            problem(f"'{file}'", received=f"{size} bytes", expected=f"at most {MAX_FILE_BYTES}", fix="make it smaller")
        )
    return text
