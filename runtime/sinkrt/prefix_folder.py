"""Beginnings of prompts on the disk, for when the memory is too small or the process starts anew.

A file is named by its owner's hash, the hash of the ids and their number: ``OWNER-IDS-COUNT.safetensors``, in a folder
named by the bundle's fingerprint, so that bundles may share one. It holds keys and values computed from what people
wrote, and the last ids themselves: only its owner may read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sinkrt.contract import Manifest
from sinkrt.errors import StateError, UsageError, problem
from sinkrt.files import check_replaceable
from sinkrt.graph_runner import StreamCopy
from sinkrt.stream_file import read_stream, save_stream

FINGERPRINT_CHARS = 16
OWNER_BYTES = 8
MAX_WRITES = 2
"""Copies that wait to be written, each as large as a stream; more are not kept."""

_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{32})-([0-9]{1,15})\.safetensors")
logger = logging.getLogger("sinkrt")


class PrefixFolder:
    """Files of one bundle's prefixes below `root`; the least recently used ones make room for new ones.

    They are written in a thread of its own, so that nobody waits for a disk.
    max_bytes: of all files of this bundle, >= 1.

    Raises: UsageError if the folder cannot be made or written.
    """

    def __init__(self, root: Path, manifest: Manifest, max_bytes: int) -> None:
        if max_bytes < 1:
            raise UsageError(problem("max_bytes", received=max_bytes, expected=">= 1", fix="raise it"))
        self._manifest, self._max_bytes = manifest, max_bytes
        self._folder = root / manifest.fingerprint[:FINGERPRINT_CHARS]
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_replaceable(self._folder / "probe")
            self._files = {file.name: file.stat().st_size for file in self._by_age()}
        except OSError as error:
            raise UsageError(
                problem(
                    "folder for prefixes",
                    received=f"'{root}' ({error.strerror or error})",
                    expected="a folder that can be written",
                    fix="choose another",
                )
            ) from error
        self._writer = ThreadPoolExecutor(1, "sinkrt-prefixes")
        self._writes: set[Future[None]] = set()

    def counts(self, owner: str) -> list[int]:
        """Numbers of ids of an owner's files."""
        found = (_NAME.fullmatch(name) for name in list(self._files))
        return [int(match[3]) for match in found if match is not None and match[1] == _hashed(owner)]

    def has(self, owner: str, digest: bytes, count: int) -> bool:
        """Whether there is a file of these ids."""
        return _name(owner, digest, count) in self._files

    def read(self, owner: str, digest: bytes, count: int) -> StreamCopy | None:
        """A copy from its file; None if there is none. A file that is none of ours is deleted, with a warning."""
        name = _name(owner, digest, count)
        if name not in self._files:
            return None
        file = self._folder / name
        try:
            copy = read_stream(file, self._manifest)
            if copy.position != count:
                raise StateError(f"{name}: received {copy.position} tokens, expected {count}")
            os.utime(file)
        except (StateError, OSError) as error:
            logger.warning("a kept beginning of a prompt cannot be used: %s", error)
            self._remove(name)
            return None
        return copy

    def keep(self, owner: str, digest: bytes, copy: StreamCopy) -> None:
        """Write a copy, soon; not if many wait to be written, or it is larger than all files may be."""
        self._writes = {write for write in self._writes if not write.done()}
        name = _name(owner, digest, copy.position)
        if name not in self._files and len(self._writes) < MAX_WRITES and copy.nbytes <= self._max_bytes:
            self._writes.add(self._writer.submit(self._write, name, copy))

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown()

    def _write(self, name: str, copy: StreamCopy) -> None:
        file = self._folder / name
        try:
            for oldest in self._by_age():
                if sum(self._files.values()) + copy.nbytes <= self._max_bytes:
                    break
                self._remove(oldest.name)
            save_stream(file, self._manifest, copy)
            file.chmod(0o600)
            self._files[name] = file.stat().st_size
        except OSError as error:
            logger.warning("the beginning of a prompt could not be kept in '%s': %s", file, error)

    def _by_age(self) -> list[Path]:
        """All files, the least recently used first."""
        files = [file for file in self._folder.iterdir() if _NAME.fullmatch(file.name)]
        return sorted(files, key=lambda file: file.stat().st_mtime)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()
        self._files.pop(name, None)


def _hashed(owner: str) -> str:
    return hashlib.blake2b(owner.encode(), digest_size=OWNER_BYTES).hexdigest()


def _name(owner: str, digest: bytes, count: int) -> str:
    return f"{_hashed(owner)}-{digest.hex()}-{count}.safetensors"
