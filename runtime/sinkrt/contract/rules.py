"""Descriptions of the contract's fields: what each holds, and the values that it may have.

A dataclass of the contract gives each field a `Rule` as metadata. `check_rules` checks an instance by them, and the C++
runtime's structs, readers and checks are generated from the same rules (runtime/cpp/tools/make_manifest.py).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from sinkrt.errors import BundleError, problem

KEY = "rule"
"""Key of a field's metadata that holds its rule."""

LABEL = "_LABEL"
"""Class attribute with a format string: a field's name -> its name in messages."""

CROSS_CHECK = "_check"
"""Method of a class whose fields must agree with each other; its C++ twin is in runtime/cpp/src/bundle/checks.cpp."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one field may hold.

    doc: a phrase for documentation. least: smallest integer, in `unit`. one_of: allowed strings. is_path: a relative
    path inside the bundle. is_digest: SHA-256 as 64 hex digits. label: name in messages, if it is not the class's.
    """

    doc: str
    least: int | None = None
    one_of: tuple[str, ...] = ()
    is_path: bool = False
    is_digest: bool = False
    label: str | None = None
    unit: str = ""

    def failure(self, value: Any) -> str | None:
        """Return what was expected instead of `value`; None if it fits."""
        if self.least is not None and value < self.least:
            return f">= {self.least}{self.unit}"
        if self.one_of and value not in self.one_of:
            return " | ".join(self.one_of)
        if self.is_path and not is_inside(value):
            return "a relative path inside the bundle"
        if self.is_digest and re.fullmatch("[0-9a-f]{64}", value) is None:
            return "64 hex digits"
        return None


def about(doc: str, **rule: Any) -> dict[str, Rule]:
    """Return a field's metadata; the arguments are those of `Rule`."""
    return {KEY: Rule(doc, **rule)}


def rule_of(field: dataclasses.Field[Any]) -> Rule:
    """Return the rule of a field."""
    rule: Rule = field.metadata[KEY]
    return rule


def label_of(cls: type, field: dataclasses.Field[Any]) -> str:
    """Return a field's name in messages."""
    return rule_of(field).label or str(getattr(cls, LABEL, "{}")).format(field.name)


def check_rules(instance: Any) -> None:
    """Check every field by its rule, then all together by the class's own `_check`.

    Raises: BundleError for the first that does not fit.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if value is not None and (expected := rule_of(field).failure(value)) is not None:
            require(False, label_of(type(instance), field), value, expected)
    if hasattr(instance, CROSS_CHECK):
        getattr(instance, CROSS_CHECK)()


def require(ok: bool, what: str, received: object, expected: str) -> None:
    """Raise BundleError unless `ok`."""
    if not ok:
        raise BundleError(problem(what, received=received, expected=expected, fix="export the model again"))


def is_plain(text: str) -> bool:
    """Return whether a text is UTF-8 (no lone surrogates) and has no control characters."""
    return all(c >= " " and c != "\x7f" and not "\ud800" <= c <= "\udfff" for c in text)


def is_inside(path: str) -> bool:
    """Return whether a path stays inside its folder on every system."""
    parts = path.split("/")
    return is_plain(path) and "\\" not in path and not {"", ".."} & set(parts)
