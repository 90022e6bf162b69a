"""Text files that commands read, and result files that they write only whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sinkrt.errors import UsageError, problem


def read_text(path: Path, option: str) -> str:
    """The UTF-8 text of a file that was named by `option`.

    Raises: UsageError.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"'{path}' ({error.strerror})"
        raise UsageError(problem(option, received=reason, expected="a readable file", fix="check the path")) from None
    except UnicodeDecodeError as error:
        reason = f"'{path}' ({error.reason} at byte {error.start})"
        raise UsageError(problem(option, received=reason, expected="UTF-8 text", fix="convert the file")) from None


@contextlib.contextmanager
def result_file(path: Path, option: str) -> Iterator[IO[bytes]]:
    """A file to write the result of the block to; it becomes `path` when the block succeeds.

    It is made at once, beside `path`, so that a place that cannot be written shows before long work begins. After an
    error or Ctrl-C nothing is left of it, and what `path` held before is still there.

    Raises: UsageError.
    """
    target = path.resolve()  # a link stays, and what it points to is replaced
    if target.exists() and not target.is_file():  # a folder; or a device, which the rename would destroy
        raise _not_writable(path, option, "no regular file")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _not_writable(path, option, str(error.strerror)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(name).chmod(0o644)  # mkstemp's 0600 would surprise whoever shares the file
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _not_writable(path: Path, option: str, reason: str) -> UsageError:
    return UsageError(
        problem(option, received=f"'{path}' ({reason})", expected="a file that can be written",
                fix="choose another path")
    )  # fmt: skip
