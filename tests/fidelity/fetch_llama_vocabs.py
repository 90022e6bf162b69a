"""Fetch llama.cpp's test vocabularies: python fetch_llama_vocabs.py FOLDER [PIP ARGUMENT]..

They lie in the source archive of PyPI's llama-cpp-python, which pip downloads as it is set up to. Nothing is compiled:
for an archive pip only asks the build tool for the package's metadata. The archive is not kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
INSIDE = "/vendor/llama.cpp/models/ggml-vocab-"
LICENSE = "/vendor/llama.cpp/LICENSE"


def fetch(folder: Path, pip_arguments: list[str]) -> int:
    """Unpack the vocabularies into `folder`; the number of files."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run(
            [*command, "--no-binary", PACKAGE, "--dest", scratch, *pip_arguments, f"{PACKAGE}=={VERSION}"], check=True
        )
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                if not member.isfile() or not (INSIDE in member.name or member.name.endswith(LICENSE)):
                    continue
                source = archive.extractfile(member)
                with source, (folder / Path(member.name).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
                count += 1
    return count


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if not fetch(Path(sys.argv[1]), sys.argv[2:]):
        sys.exit(f"no vocabularies in {PACKAGE} {VERSION}")
