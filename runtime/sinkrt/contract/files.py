"""The bundle's files: its manifest read from disk, and sizes and hashes compared with it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from sinkrt.contract.constants import MANIFEST_NAME
from sinkrt.contract.manifest import Manifest
from sinkrt.contract.schema import FileFacts
from sinkrt.errors import BundleError, problem
from sinkrt.files import is_special


def load_manifest(bundle: Path) -> Manifest:
    """Read ``bundle/manifest.json``.

    Raises: BundleError if it is missing or invalid.
    """
    path = bundle / MANIFEST_NAME
    try:
        if is_special(path):
            raise OSError("a device, pipe or socket, no file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "a bundle needs one" if isinstance(error, FileNotFoundError) else str(error)
        raise BundleError(
            problem(
                MANIFEST_NAME,
                received=f"no readable file at '{path}' ({reason})",
                expected="a folder that 'sinkexport export' wrote",
                fix="check the path or export the model",
            )
        ) from None
    return Manifest.from_json(text)


def hash_file(path: Path) -> FileFacts:
    """Return size and SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return FileFacts(os.path.getsize(path), digest.hexdigest())


def check_files(bundle: Path, manifest: Manifest, *, hashes: bool = True) -> None:
    """Compare every file of the bundle with the manifest: size always, SHA-256 if `hashes`.

    Raises: BundleError naming the first file that is missing or differs.
    """
    for name, facts in sorted(manifest.files.items()):
        path = bundle / name
        if not path.is_file():
            raise BundleError(
                problem(name, received="no such file", expected="every file of the bundle", fix="copy the whole folder")
            )
        size = path.stat().st_size
        if size != facts.bytes:
            raise BundleError(
                problem(name, received=f"{size} bytes", expected=f"{facts.bytes} bytes", fix="copy or export it again")
            )
        if hashes and (found := hash_file(path).sha256) != facts.sha256:
            raise BundleError(
                problem(
                    name,
                    received=f"sha256 {found[:12]}..",
                    expected=f"{facts.sha256[:12]}..",
                    fix="the file is corrupt: copy or export it again",
                )
            )
