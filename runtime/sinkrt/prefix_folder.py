"""Beginnings of prompts on the disk, for when the memory is too small or the process starts anew.

A file is named by its owner's hash, the hash of the ids and their number: ``OWNER-IDS-COUNT.safetensors``.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sinkrt.contract import Manifest
from sinkrt.graph_runner import StreamCopy
from sinkrt.stream_folder import StreamFolder

OWNER_BYTES = 8
MAX_WRITES = 2
"""Copies that wait to be written, each as large as a stream; more are not kept."""

_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{32})-([0-9]{1,15})\.safetensors")


class PrefixFolder:
    """Files of one bundle's prefixes below `root`, written in a thread of its own: nobody waits for a disk.

    max_bytes: of all files of this bundle, >= 1.

    Raises: UsageError if the folder cannot be made or written.
    """

    def __init__(self, root: Path, manifest: Manifest, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._files = StreamFolder(root, manifest, max_bytes, _NAME, "prefixes")
        self._writer = ThreadPoolExecutor(1, "sinkrt-prefixes")
        self._writes: set[Future[bool]] = set()

    def counts(self, owner: str) -> list[int]:
        """Numbers of ids of an owner's files."""
        found = (_NAME.fullmatch(name) for name in self._files.names)
        return [int(match[3]) for match in found if match is not None and match[1] == _hashed(owner)]

    def has(self, owner: str, digest: bytes, count: int) -> bool:
        """Whether there is a file of these ids."""
        return _name(owner, digest, count) in self._files

    def read(self, owner: str, digest: bytes, count: int) -> StreamCopy | None:
        """A copy from its file; None if there is none that can be used."""
        name = _name(owner, digest, count)
        found = self._files.read(name)
        if found is not None and found[0].position != count:  # renamed
            self._files.remove(name)
            return None
        return None if found is None else found[0]

    def keep(self, owner: str, digest: bytes, copy: StreamCopy) -> None:
        """Write a copy, soon; not if many wait to be written, or it is larger than all files may be."""
        self._writes = {write for write in self._writes if not write.done()}
        name = _name(owner, digest, copy.position)
        if name not in self._files and len(self._writes) < MAX_WRITES and copy.nbytes <= self._max_bytes:
            self._writes.add(self._writer.submit(self._files.write, name, copy))

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown()


def _hashed(owner: str) -> str:
    return hashlib.blake2b(owner.encode(), digest_size=OWNER_BYTES).hexdigest()


def _name(owner: str, digest: bytes, count: int) -> str:
    return f"{_hashed(owner)}-{digest.hex()}-{count}.safetensors"
