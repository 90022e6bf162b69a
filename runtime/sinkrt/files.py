"""Files that replace others whole or not at all, and the leftovers of killed runs.

A new file is written under ``.NAME.xxxxxxxx.partial`` in the folder of NAME. It is locked for as long as its process
lives, and renamed once it has reached the disk. So a leftover whose lock is free belongs to a killed run, and the next
one to write NAME removes it. Twin of `Replacement` in runtime/cpp/src/text/replacement.cpp.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and no leftover removed
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 16
"""Tries to make a file that no other process removes, as a leftover, before it is locked."""


@contextlib.contextmanager
def replacing(path: Path, buffering: int = -1) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends well.

    A symbolic link stays one: the file that it names is replaced. Only regular files are.
    buffering: as of `open`; 0: a full disk shows at `write`, which may then take only a part.

    Raises: OSError if `path` is something else, or cannot be written.
    """
    target = replaceable(path)
    remove_leftovers(target)
    temporary, file = _new_file(target, buffering)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames closed files only
            temporary.replace(target)  # while it is locked
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


def replaceable(path: Path) -> Path:
    """Regular file, there or not, that writing to `path` replaces: links are followed.

    Raises: OSError for a folder, a device, a pipe or a socket, and for links that lead nowhere or in a circle.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a device, pipe or socket, no file", str(path))
    return target


def check_replaceable(path: Path) -> None:
    """Make sure, by trying, that `replacing` can write `path`; what is there stays as it is.

    Raises: OSError.
    """
    target = replaceable(path)
    temporary, file = _new_file(target)
    file.close()
    temporary.unlink()


def is_special(path: Path) -> bool:
    """Whether `path` is there and neither a regular file nor a folder: reading a pipe may wait forever."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def remove_leftovers(target: Path) -> None:
    """Remove the partial files of `target` that killed runs left: nobody holds a lock on them."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.partial")
    for path in named_beside(target, pattern):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError), unlocked(path):
                path.unlink()


def named_beside(target: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Paths in the folder of `target` whose name `pattern` matches whole; none if it cannot be read."""
    try:
        return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
    except OSError:
        return []


@contextlib.contextmanager
def unlocked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that no other process holds, for the length of the block.

    Raises: OSError if another does, or there are no locks here.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        if not lock(handle):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        yield
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Take the lock of an open file or folder, without waiting. False: another has it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, where folders can be synced (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _new_file(target: Path, buffering: int = -1) -> tuple[Path, BinaryIO]:
    """Make a locked, empty file beside `target`, with the permissions that the user's umask grants."""
    for _ in range(ATTEMPTS):
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        file = path.open("xb", buffering)
        lock(file.fileno())
        if fcntl is None or os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # another process took it for a leftover before it was locked
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))
