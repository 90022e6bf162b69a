"""Variables of a chat template that a user sets, such as ``enable_thinking``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sinkrt.errors import UsageError, problem

RESERVED_ARGS = frozenset(
    (
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
        "dict",
        "namespace",
        "range",
        "lipsum",
        "cycler",
        "joiner",
        "self",
        "caller",
        "varargs",
        "kwargs",
        "loop",
    )
)
"""Variables of a template that are not the user's to set, besides the special tokens."""


def parse_template_args(texts: Iterable[str]) -> dict[str, Any]:
    """Variables of ``KEY=VALUE`` texts. A value that is JSON is what it says (true, 3, "x"), any other is a text.

    Raises: UsageError.
    """
    args: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                problem(
                    "--template-arg",
                    received=f"'{text}'",
                    expected="KEY=VALUE",
                    fix="for example --template-arg enable_thinking=false",
                )
            )
        try:
            args[name] = json.loads(value)
        except (ValueError, RecursionError):
            args[name] = value
    return args


def check_template_args(args: Mapping[str, Any], variables: Collection[str], special_tokens: Collection[str]) -> None:
    """Make sure that a template reads each of the user's variables.

    variables: names that the template reads. special_tokens: names that it gets anyway.

    Raises: UsageError.
    """
    known = {name for name in variables if not _is_reserved(name, special_tokens)}
    for name in args:
        if _is_reserved(name, special_tokens):
            raise UsageError(
                problem(
                    "template argument",
                    received=f"'{name}', which is reserved",
                    expected="a variable of the template's own",
                    fix="leave it out",
                )
            )
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise UsageError(
                problem(
                    "template argument",
                    received=f"'{name}', which the template does not read",
                    expected=f"one of those that it reads: {listed}",
                    fix="leave it out",
                )
            )


def _is_reserved(name: str, special_tokens: Collection[str]) -> bool:
    return (
        name in RESERVED_ARGS or name in special_tokens or name.endswith(("_token", "_tokens")) or name.startswith("_")
    )
