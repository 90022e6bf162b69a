"""What a configuration says of how a checkpoint was quantised: known keys, each with a value that is understood."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sinkrt.errors import UsageError, problem

Known = Mapping[str, Collection[object] | Callable[[Any], bool]]
"""Keys that are understood, each with its values or a test of them."""


def anything(_value: object) -> bool:
    """Any value: the key says how weights were found, or how others run them, and nothing of what they are."""
    return True


def nothing(value: object) -> bool:
    """None, false, or empty."""
    return not value


def checked(facts: object, known: Known, where: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a table, if all are known and have values that are understood. needed: those that must be there.

    Raises: UsageError naming the first that is not.
    """
    if not isinstance(facts, Mapping):
        raise unknown(where, f"{facts!r:.60}", "a table")
    for key, value in facts.items():
        if key not in known:
            raise unknown(where, f"the key '{key}'", f"keys that are understood: {', '.join(sorted(known))}")
        allowed = known[key]
        if callable(allowed):
            if not allowed(value):
                raise unknown(where, f"{key} {value!r:.60}", "a value that can be kept exactly")
        elif not any(value == one and type(value) is type(one) for one in allowed):
            expected = " | ".join("none" if one is None else str(one) for one in allowed)
            raise unknown(where, f"{key} {value!r:.60}", expected)
    for key in needed:
        if key not in facts:
            raise unknown(where, f"no {key}", " and ".join(needed))
    return dict(facts)


def unknown(where: str, received: str, expected: str) -> UsageError:
    """A key or a value that may mean other weights than those that would be read."""
    return UsageError(
        problem(
            where,
            received=received,
            expected=expected,
            fix="export the model's floating-point original, or one quantised otherwise",
        )
    )


def is_size(value: object) -> bool:
    """A whole number above 0, or -1, which stands for all."""
    return isinstance(value, int) and not isinstance(value, bool) and (0 < value < 2**31 or value == -1)
