"""Strict reading: JSON text without ambiguity, and dataclasses of it without unknown, missing or mistyped fields."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from sinkrt.contract.constants import MANIFEST_NAME
from sinkrt.contract.rules import require
from sinkrt.errors import BundleError, problem

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

T = TypeVar("T")


def parse_json(text: str) -> Any:
    """Parse a manifest's text: no key twice, no NaN, no lone surrogates.

    Raises: BundleError.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
        if _SURROGATE.search(text):  # a pair of them is one character; a lone one is none
            json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # the latter of brackets without end
        raise BundleError(
            problem(MANIFEST_NAME, received=f"invalid JSON ({error})", expected="a manifest", fix="export again")
        ) from None
    return raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object whose keys are all different: of two alike, readers keep the first or the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} twice in an object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def build_from_json(cls: type[T], raw: Any, where: str) -> T:
    """Make a dataclass of parsed JSON, strictly: no unknown key, no missing one, no wrong type.

    where: name of `raw` in messages.

    Raises: BundleError.
    """
    if not isinstance(raw, dict):
        raise BundleError(problem(where, received=type(raw).__name__, expected="an object", fix="export again"))
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if unknown := sorted(set(raw) - names):
        raise BundleError(
            problem(
                where,
                received=f"unknown key '{unknown[0]}'",
                expected=", ".join(sorted(names)),
                fix="remove it or export again",
            )
        )
    if missing := sorted(required - set(raw)):
        raise BundleError(problem(where, received=f"no key '{missing[0]}'", expected="every key", fix="export again"))
    return cls(**{name: _value(hints[name], raw[name], f"{where}.{name}") for name in names & set(raw)})


def _value(hint: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the schema's only unions are "X | None"
        if raw is None:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), raw, where)
    if origin is tuple:
        require(isinstance(raw, list), where, type(raw).__name__, "a list")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(raw, dict), where, type(raw).__name__, "an object")
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in raw.items()}
    if dataclasses.is_dataclass(hint):
        return build_from_json(typing.cast(type, hint), raw, where)
    if type(raw) is int:
        limit = 2**1023 if hint is float else 2**63 - 1
        require(-limit - 1 <= raw <= limit, where, "a huge integer", "one of 64 bits")
        if hint is float:  # JSON writes 1.0 as 1 in some tools
            return float(raw)
    ok = isinstance(raw, hint) and not (hint is int and isinstance(raw, bool))
    ok = ok and not (hint is float and not math.isfinite(raw))
    require(ok, where, f"{type(raw).__name__} {raw!r}"[:60], hint.__name__)
    return raw
