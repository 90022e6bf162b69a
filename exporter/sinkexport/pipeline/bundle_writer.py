"""Write a bundle to disk: all of it or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import onnx_ir as ir
from sinkrt.contract import MANIFEST_NAME, FileFacts, TokenizerFacts, hash_file
from sinkrt.contract.constants import ENGINE_FOLDER
from sinkrt.errors import UsageError, problem
from sinkrt.files import lock, named_beside, sync_folder, unlocked

from sinkexport.graph.builder import LARGE_CONSTANT_BYTES
from sinkexport.graph.convert import WEIGHTS_FILE
from sinkexport.loading.tokenizers.source_tokenizer import TEMPLATE_FILE, TOKENIZER_FILE, SourceTokenizer
from sinkexport.util.traced_names import MODEL

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Constants of Linux's renameat2."""

PAGE_BYTES = 4096
"""Large weights start on a page, so that runtimes can map the file."""


@contextlib.contextmanager
def staged_bundle(
    out: Path, *, overwrite: bool = False, exchange: Callable[[Path, Path], bool] | None = None
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when it does not.

    A bundle that is replaced is exchanged in one step where the system can: `out` is never without one. What killed
    exports left beside `out` is removed. exchange: swaps two names, False where it cannot; `exchange_names` by default.

    Raises: UsageError if `out` holds something already (unless it is a bundle and nothing else, and `overwrite`), also
    if that has come meanwhile; or the disk is full.
    """
    target = Path(os.path.realpath(out))  # a link to a bundle stays one
    _remove_leftovers(target)
    _refuse_to_replace(out, target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage, handle = _locked_stage(target)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield stage
        stage.chmod(0o755)  # mkdtemp makes it private
        _sync(stage)
        _refuse_to_replace(out, target, overwrite)  # an export takes minutes, in which others write too
        _take_place(stage, target, exchange)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(handle)


def _locked_stage(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, and an open handle whose lock says that its process lives."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):  # another export took it for a leftover before it was locked
            handle = os.open(stage, os.O_RDONLY)
            lock(handle)
            if os.path.samestat(os.fstat(handle), stage.stat()):
                return stage, handle


def _take_place(stage: Path, target: Path, exchange: Callable[[Path, Path], bool] | None) -> None:
    """Put `stage` where `target` is, and remove what was there."""
    if not target.exists():
        stage.rename(target)
    elif (exchange or exchange_names)(stage, target):
        shutil.rmtree(stage)  # what `target` was
    else:
        retired = stage.with_name(f"{stage.name}-old")
        target.rename(retired)
        stage.rename(target)
        shutil.rmtree(retired)
    sync_folder(target.parent)


def exchange_names(a: Path, b: Path) -> bool:
    """Swap the names of two folders in one step. False: this system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    done = renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
    return bool(done == 0)


def _remove_leftovers(target: Path) -> None:
    """Remove the folders of exports to `target` that were killed, and bring back a bundle that one had put aside."""
    pattern = re.compile(re.escape(f".{target.name}.partial-") + r"[a-z0-9_]{8}(-old)?")
    for path in named_beside(target, pattern):
        if path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError), unlocked(path):
            if path.name.endswith("-old") and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path)


def write_graph(model: ir.Model, folder: Path, file: str, progress: Callable[[int, int], None]) -> None:
    """Write an ONNX file and its weights, one tensor at a time."""

    def report(_tensor: ir.TensorProtocol, info: Any) -> None:
        progress(info.index + 1, info.total)

    ir.save(model, folder / file, external_data=WEIGHTS_FILE, alignment=PAGE_BYTES, callback=report)


def write_graph_with_weights_of(model: ir.Model, folder: Path, file: str, other: str) -> None:
    """Write an ONNX file that reads its weights from those of another graph of the folder, by their names.

    Only names of the model's parameters say what a constant holds. Others are numbered as each graph is made: there the
    two may have the same name for other numbers, which are compared.

    Raises: RuntimeError if a large weight is not there: it would be held twice.
    """
    written = ir.load(folder / other).graph.initializers
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        found = written.get(name)
        shared = None if found is None else found.const_value
        if _holds_the_same(tensor, shared, name.startswith(MODEL)):
            value.const_value = shared
        elif tensor is not None and tensor.nbytes > LARGE_CONSTANT_BYTES:
            raise RuntimeError(f"weight '{name}' of {file} is not in {other}; this is a bug of the graph passes")
    ir.save(model, folder / file)


def _holds_the_same(
    tensor: ir.TensorProtocol | None, shared: ir.TensorProtocol | None, is_parameter: bool
) -> TypeGuard[ir.ExternalTensor]:
    """Whether a constant is one of another graph's weights file. is_parameter: its name says so."""
    if tensor is None or not isinstance(shared, ir.ExternalTensor):
        return False
    if (shared.dtype, shared.shape) != (tensor.dtype, tensor.shape):
        return False
    return is_parameter or tensor.tobytes() == shared.tobytes()


def write_tokenizer(tokenizer: SourceTokenizer | None, folder: Path) -> TokenizerFacts | None:
    """Write tokenizer files and chat template; None if there is no tokenizer."""
    if tokenizer is None:
        return None
    tokenizer.save(folder)
    template = None if tokenizer.chat_template is None else TEMPLATE_FILE
    return TokenizerFacts(file=TOKENIZER_FILE, chat_template=template)


def hash_bundle(folder: Path, known: Mapping[str, FileFacts] = MappingProxyType({})) -> dict[str, FileFacts]:
    """Size and SHA-256 of every file of a bundle but the manifest. known: those of files that have been hashed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: known.get(name) or hash_file(path) for name, path in names.items()}


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before minutes of work what would not fit.

    Raises: UsageError.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UsageError(
            problem(
                "disk",
                received=f"{free / 1e6:.0f} MB free",
                expected=f"at least {needed_bytes / 1e6:.0f} MB",
                fix="free some space or choose another folder",
            )
        )


def _refuse_to_replace(out: Path, target: Path, overwrite: bool) -> None:
    """target: what `out` leads to.

    Raises: UsageError.
    """
    if target.is_mount():  # of a container's volume, say: it can be written, but not renamed
        raise UsageError(
            problem(
                "output",
                received=f"'{out}', where a file system is mounted",
                expected="a new folder",
                fix=f"choose one inside it: '{out / 'bundle'}'",
            )
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_NAME).is_file():
        held, fix = "something that is not a bundle", "choose another folder"
    elif not overwrite:
        held, fix = "a bundle", "pass --overwrite"
    elif (other := _other_file(target)) is not None:
        held, fix = f"a bundle and '{other}', which is no part of it", "move that away, or choose another folder"
    else:
        return
    raise UsageError(problem("output", received=f"'{out}', which holds {held}", expected="a new folder", fix=fix))


def _other_file(bundle: Path) -> str | None:
    """The path inside a bundle of a file that the exporter did not write, such as a saved stream; None if none is."""
    try:
        manifest = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
        known = {MANIFEST_NAME, *manifest["files"]}
    except (ValueError, KeyError, TypeError, RecursionError):  # a broken bundle may be replaced
        return None
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle)
        if not path.is_dir() and name.as_posix() not in known and name.parts[0] != ENGINE_FOLDER:
            return str(name)
    return None


def _sync(folder: Path) -> None:
    """Reach the disk before the rename does, so that a power cut cannot leave a bundle with empty files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unwritable(out: Path, error: OSError) -> UsageError:
    if error.errno is None:  # NumPy's short writes
        reason = "a write was cut short: the disk is full or a file size limit is reached"
    else:
        known = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file size limit is reached"}
        reason = known.get(error.errno, error.strerror or str(error))
    return UsageError(
        problem(
            "output",
            received=f"'{out}' ({reason})",
            expected="a folder that can be written",
            fix="nothing was left behind; free space or choose another folder",
        )
    )
