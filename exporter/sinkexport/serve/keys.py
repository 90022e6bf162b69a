"""API keys: where they come from, their names, and the check that takes as long for every key."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sinkrt.errors import UsageError, problem

KEY_VARIABLE = "SINKEXPORT_API_KEY"
"""Environment variable with the key that clients must send."""
ONLY = "default"
"""Name of a key that has none."""
MAX_KEYS = 1000
_LINE = re.compile(r"(?:([A-Za-z0-9._-]{1,64}):[ \t]+)?([!-~]+)")


class ApiKeys:
    """The keys that a server takes, and their names. keys: by name. equal: takes as long for all digests."""

    def __init__(self, keys: Mapping[str, str], equal: Callable[[bytes, bytes], bool] = hmac.compare_digest) -> None:
        self._equal = equal
        self._digests = {name: _digest(key.encode()) for name, key in keys.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all keys."""
        return tuple(self._digests)

    def name_of(self, authorization: list[bytes]) -> str | None:
        """The name of the key in a request's Authorization headers, or None if there is no valid one.

        All keys are compared, by digests of one length: the time says nothing about how much of a key was right.
        """
        scheme, _, given = (authorization[0] if len(authorization) == 1 else b"").partition(b" ")
        digest, found = _digest(given.strip()), None
        for name, other in self._digests.items():
            if self._equal(digest, other):
                found = name
        return found if scheme.lower() == b"bearer" else None


def read_api_keys(file: Path | None, environment: str | None) -> dict[str, str] | None:
    """Read the keys that clients must send, by name: from the file, else from the variable; None if there is neither.

    A file holds a key, or lines ``NAME: KEY``; lines that are empty or begin with # do not count.

    Raises: UsageError if the file is unreadable, a key is no printable ASCII, which headers need, or two are the same.
    """
    if file is not None:
        try:
            text, where = file.read_text(encoding="utf-8"), f"'{file}'"
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                problem(
                    "--api-key-file",
                    received=f"'{file}' ({error})",
                    expected="a readable text file",
                    fix="check the path",
                )
            ) from None
    elif environment is not None:
        text, where = environment.strip(), KEY_VARIABLE
    else:
        return None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    keys = {match[1] or ONLY: match[2] for match in found}
    if not 0 < len(lines) == len(found) <= MAX_KEYS:
        raise _refused(where, "without one" if len(lines) < 2 else "with lines that are none")
    if not len(lines) == len(keys) == len(set(keys.values())):
        raise _refused(where, "with two of the same name, or the same key twice")
    return keys


def _refused(where: str, received: str) -> UsageError:
    return UsageError(
        problem(
            "API key",
            received=f"{where} {received}",
            expected="printable ASCII without spaces, or lines 'NAME: KEY'",
            fix="write one line, for example of 'openssl rand -hex 32'",
        )
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
