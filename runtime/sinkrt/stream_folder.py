"""A folder of stream files of one bundle, bounded: the least recently used ones make room for new ones.

Files hold keys and values computed from what people wrote, and the last ids themselves: only their owner may read them.
They lie in a folder named by the bundle's fingerprint, so that bundles may share a root.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]

from sinkrt.contract import Manifest
from sinkrt.errors import StateError, UsageError, problem
from sinkrt.files import check_replaceable
from sinkrt.graph_runner import StreamCopy
from sinkrt.stream_file import read_stream, save_stream

FINGERPRINT_CHARS = 16
LOCK_NAME = ".lock"
logger = logging.getLogger("sinkrt")


class StreamFolder:
    """Stream files below `root` whose names match `pattern`.

    what: what they are, for messages. max_bytes: of all of them, >= 1. Reading and writing may be in two threads.

    Raises: UsageError if the folder cannot be made or written.
    """

    def __init__(self, root: Path, manifest: Manifest, max_bytes: int, pattern: re.Pattern[str], what: str) -> None:
        if max_bytes < 1:
            raise UsageError(problem("max_bytes", received=max_bytes, expected=">= 1", fix="raise it"))
        self._manifest, self._max_bytes, self._pattern, self._what = manifest, max_bytes, pattern, what
        self._lock: BinaryIO | None = None
        self._folder = root / manifest.fingerprint[:FINGERPRINT_CHARS]
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_replaceable(self._folder / "probe")
            self._sizes = {file.name: file.stat().st_size for file in self._by_age()}
        except OSError as error:
            raise UsageError(
                problem(
                    f"folder for {what}",
                    received=f"'{root}' ({error.strerror or error})",
                    expected="a folder that can be written",
                    fix="choose another",
                )
            ) from error

    def claim(self) -> None:
        """Keep other processes out, for as long as this one lives.

        Raises: UsageError if another one is there.
        """
        if fcntl is None:
            return
        self._lock = (self._folder / LOCK_NAME).open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                problem(
                    f"folder for {self._what}",
                    received=f"'{self._folder}', which another process uses",
                    expected="one of its own",
                    fix="choose another, or end that process",
                )
            ) from None

    def release(self) -> None:
        """Let others in again."""
        if self._lock is not None:
            self._lock.close()

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return list(self._sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def read(self, name: str) -> tuple[StreamCopy, npt.NDArray[np.int64]] | None:
        """A stream and the ids that it has not been fed yet; None if there is none.

        A file that is not whole, or of another bundle, is deleted with a warning.
        """
        if name not in self._sizes:
            return None
        file = self._folder / name
        try:
            found = read_stream(file, self._manifest)
            os.utime(file)
        except (StateError, OSError) as error:
            logger.warning("%s: %s", self._what, error)
            self.remove(name)
            return None
        return found

    def write(self, name: str, copy: StreamCopy, pending: npt.NDArray[np.int64] | None = None) -> bool:
        """Write a stream, and remove the oldest others if there are too many bytes. Returns: whether that went well.

        A warning shows what did not. A stream that is larger than all files may be is not written.
        """
        file = self._folder / name
        try:
            if copy.nbytes > self._max_bytes:
                raise OSError(f"it takes {copy.nbytes} bytes, more than all may")
            for oldest in self._by_age():
                others = sum(size for other, size in list(self._sizes.items()) if other != name)
                if others + copy.nbytes <= self._max_bytes:
                    break
                if oldest.name != name:
                    self.remove(oldest.name)
            save_stream(file, self._manifest, copy, pending)
            self._sizes[name] = file.stat().st_size
        except OSError as error:
            logger.warning("%s could not be kept in '%s': %s", self._what, file, error)
            return False
        return True

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()
        self._sizes.pop(name, None)

    def _by_age(self) -> list[Path]:
        """All files, the least recently used first."""
        ages = []
        for file in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if self._pattern.fullmatch(file.name):
                    ages.append((file.stat().st_mtime, file))
        return [file for _, file in sorted(ages)]
