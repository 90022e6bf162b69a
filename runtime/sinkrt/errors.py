"""Errors that a user can cause, each in one line: what, received, expected, fix.

Twin of runtime/cpp/include/sinkrt/error.h.
"""

from __future__ import annotations

import unicodedata

MAX_SHOWN = 5000
"""Characters of a name or a value in a message: more than the longest path."""


class SinkError(Exception):
    """Base of every error that the command line reports without a traceback (exit code 2)."""


class UsageError(SinkError):
    """Bad input: an argument, an id, a shape."""


class BundleError(SinkError):
    """A bundle that is missing, corrupt, newer than this runtime or inconsistent."""


class StateError(SinkError):
    """A saved state that is truncated, of another model or of another version."""


class BackendError(SinkError):
    """A backend that is not installed or cannot run the bundle."""


def problem(what: str, *, received: object, expected: str, fix: str) -> str:
    """One line in the house form, e.g. ``window size: received 0, expected >= 1; pass --window``.

    Control characters are shown as escapes: names come from files of strangers, and terminals obey them. Very long
    values are cut for the same reason.
    """
    return printable(f"{_cut(what)}: received {_cut(str(received))}, expected {expected}; {fix}")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}.. ({len(text)} characters)"


def printable(text: str) -> str:
    """The text with escapes in place of control characters, lone surrogates and marks that reverse a line."""
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs"


JOINERS = "\u200c\u200d"
"""Needed to write Persian and many emoji; they only join or part their neighbours."""
