"""JSON schemas: their limits, and what llguidance would take without making sure of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sinkrt.errors import UsageError, problem

JsonSchema = Mapping[str, Any] | bool

MAX_SCHEMA_BYTES = 2**18
MAX_SCHEMA_DEPTH = 64
MAX_REFERENCES = 1000
"""References in a schema: llguidance follows a chain of them by calls within calls (2,500 ended the process)."""
DRAFTS = ("draft-04", "draft-06", "draft-07", "2019-09", "2020-12")
"""Parts of ``$schema`` of the versions that are known."""
WHITE_SPACE = r"[ \n\r\t]{1,32}"
"""Between the tokens of a JSON text: models that are unsure would write line breaks forever."""
_OPTIONS = {
    "whitespace_pattern": WHITE_SPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_SUBSCHEMAS = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OLD = ("disallow", "extends", "divisibleBy")


def checked_schema(schema: JsonSchema | str) -> JsonSchema:
    """A schema within the limits. schema: as JSON text, or read.

    Raises: UsageError.
    """
    if isinstance(schema, str):
        if len(schema) > MAX_SCHEMA_BYTES:
            raise _too_large(len(schema))
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refused("text that is no JSON", "a JSON schema", "check it with a JSON parser") from error
    if not isinstance(schema, (Mapping, bool)):
        raise _refused(type(schema).__name__, "an object, or true", 'for example {"type": "object"}')
    if isinstance(schema, bool):
        return schema
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise _refused(f"more than {MAX_SCHEMA_DEPTH} levels", "fewer", "give inner parts names in $defs")
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise _refused("values that are no JSON", "texts, numbers, lists and objects", "leave them out") from error
    if size > MAX_SCHEMA_BYTES:
        raise _too_large(size)
    version = schema.get("$schema")
    if version is not None and not any(draft in str(version) for draft in DRAFTS):
        raise _refused(f"$schema '{version}'", f"one of {', '.join(DRAFTS)}", "leave $schema out")
    references = 0
    for part in _parts(schema):
        _check_part(part)
        references += "$ref" in part
    if references > MAX_REFERENCES:
        raise _refused(f"{references} references", f"at most {MAX_REFERENCES}", "write some of them out")
    return schema


def schema_text(schema: JsonSchema) -> str:
    """A checked schema as llguidance takes it, with the options that make it strict, whatever it says itself."""
    return json.dumps(
        {**({} if schema is True else {"not": {}} if schema is False else schema), "x-guidance": _OPTIONS}
    )


def _check_part(part: Mapping[str, Any]) -> None:
    """Refuse what llguidance takes and does not make sure of, or reads otherwise than the judges do.

    Raises: UsageError.
    """
    for name in _OLD:
        if name in part:
            raise _refused(f"'{name}' of JSON Schema draft 3", "a keyword of draft 4 or newer", "use its newer name")
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(part.get(name), bool):
            raise _refused(f"'{name}' that is true or false, as in draft 4", "a number", "write the bound itself")
        if name in part and part.get("type") != "integer":
            # Of a number llguidance 1.9.1 gives the bound itself too: 0 under "exclusiveMinimum": 0.
            raise _refused(f"'{name}' of numbers", "it with the type integer", "use minimum or maximum")
    least = part.get("minProperties")
    required = part.get("required")
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
        # Names that no `properties` list may come twice, and count once.
        raise _refused("'minProperties' above the number of required ones", "as many names in 'required'", "list them")


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and all inside it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        yield part
        waiting += [part[name] for name in _SUBSCHEMAS if name in part]
        waiting += [item for name in _LISTS if isinstance(part.get(name), list) for item in part[name]]
        waiting += [item for name in _MAPS if isinstance(part.get(name), Mapping) for item in part[name].values()]


def _depth(value: Any) -> int:
    """Levels of objects and lists, at most one more than `MAX_SCHEMA_DEPTH` of them counted."""
    level, depth = [value], 0
    while level and depth <= MAX_SCHEMA_DEPTH:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level if isinstance(v, (Mapping, list, tuple))]
        if not inner:
            return depth
        level, depth = [item for items in inner for item in items], depth + 1
    return depth


def _too_large(size: int) -> UsageError:
    return _refused(f"{size} characters", f"at most {MAX_SCHEMA_BYTES}", "make it smaller")


def _refused(received: str, expected: str, fix: str) -> UsageError:
    return UsageError(problem("JSON schema", received=received, expected=expected, fix=fix))
