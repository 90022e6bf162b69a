"""A request's body: strict JSON becomes a checked request, or one line that names the wrong field."""

from __future__ import annotations

import json
import logging
import re
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.types import Scope

from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.middleware import values_of
from sinkexport.serve.requests import Fields, Request, refuse

MAX_DEPTH = 64
"""Levels of lists and objects inside each other."""

MAX_ERRORS = 20
"""Errors that are searched for the one to report."""

MAX_UNKNOWN = 20
"""Unknown fields that the log names."""

R = TypeVar("R", bound=Fields)
logger = logging.getLogger("sinkexport.serve")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_content_type(scope: Scope) -> None:
    """Accept JSON in UTF-8 only: web pages can send other types to a server on this machine without asking anybody.

    Raises: ApiError 415.
    """
    given = values_of(scope, b"content-type")
    kind, *parameters = (part.strip().lower() for part in (given[0] if len(given) == 1 else b"").split(b";"))
    charsets = [p.partition(b"=")[2].strip(b'"') for p in parameters if p.startswith(b"charset")]
    if kind != b"application/json" or any(charset not in (b"utf-8", b"utf8") for charset in charsets):
        raise ApiError(415, "content type: expected application/json, in UTF-8")
    if any(value.strip().lower() not in (b"", b"identity") for value in values_of(scope, b"content-encoding")):
        raise ApiError(415, "content encoding: expected none; send the body uncompressed")


def parse(raw: bytes, kind: type[R]) -> R:
    """Parse the request in a body.

    Raises: ApiError 400.
    """
    value = read_json(raw)
    if not isinstance(value, dict):
        raise ApiError(400, f"body: received {shown(value)}, expected a JSON object")
    refuse(value, kind.model_fields, only_prompt=not issubclass(kind, Request))
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise invalid(error, kind, value) from None
    if logger.isEnabledFor(logging.DEBUG):
        if isinstance(request, Request) and request.unused:
            logger.debug("taken and not used: %s", ", ".join(request.unused))
        if unknown := kind.unknown(value):
            logger.debug("ignored, since unknown: %s", ", ".join(map(shown, unknown[:MAX_UNKNOWN])))
    return request


def read_json(raw: bytes) -> Any:
    """Parse JSON strictly: no key twice, no NaN, whole characters only.

    Raises: ApiError 400.
    """
    if not raw.strip():
        raise _no_json("received nothing, expected a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start} is no UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        _check_depth(value)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _no_json("a \\u escape is half a character (a lone surrogate)") from None
    except RecursionError:
        raise _no_json(f"nested deeper than expected, at most {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise _no_json(f"no JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # Python's own limit
        raise _no_json("a number has too many digits") from None
    return value


def invalid(error: ValidationError, kind: type[Fields], body: dict[str, Any]) -> ApiError:
    """Describe the first thing that is wrong: its place in the body, what was received and what is expected."""
    errors = error.errors(include_url=False, include_context=True, include_input=False)[:MAX_ERRORS]
    top = errors[0]["loc"][:1]
    # A union gives an error for each part: the one that got furthest is meant.
    first = max((e for e in errors if e["loc"][:1] == top), key=lambda e: len(_place(e["loc"], kind, body)[0]))
    path, expected, value, found = _place(first["loc"], kind, body)
    where = ".".join(path) or "body"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        if not path:  # of the request as a whole: the message says which field
            return ApiError(400, message[:400], param=message.partition(":")[0])
    else:
        message = f"received {shown(value) if found else 'nothing'}, expected {expected or first['msg']}"
    where = where.encode("ascii", "backslashreplace").decode()[:100]
    return ApiError(400, f"{where}: {message[:400]}", param=where if path else None)


def _place(
    loc: tuple[int | str, ...], kind: type[Fields] | None, value: Any
) -> tuple[list[str], str | None, Any, bool]:
    """Find the field that `loc` names, without the names that pydantic gives the parts of a union.

    Returns: the path (names of fields, numbers of items); what the innermost field's description expects; its value;
    whether it is there.
    """
    path: list[str] = []
    expected, found = None, True
    for part in loc:
        fields = {} if kind is None else kind.model_fields
        if isinstance(value, dict) and (part in value or part in fields):
            found, value = part in value, value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
            expected = expected if kind is None else "an object"  # what was described is the list
        else:
            continue
        path.append(str(part))
        if part in fields:
            nested = {} if kind is None else kind.nested
            expected, kind = fields[str(part)].description, nested.get(str(part))
    return path, expected, value, found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _no_json(f"key {shown(twice)} is there twice")
    return found


def _no_number(name: str) -> None:
    raise _no_json(f"{name} is no JSON; expected finite numbers")


def _check_depth(value: Any) -> None:
    """Raises: RecursionError beyond `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (list, dict))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def _no_json(message: str) -> ApiError:
    return ApiError(400, f"body: {message}", code="invalid_json")
