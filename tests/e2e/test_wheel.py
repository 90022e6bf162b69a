"""What `pip install .` makes: with the CPU library where it can be built, pure Python where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILDS = '#!/bin/sh\nif [ "$1" = -S ]; then mkdir -p "$4/ort" && echo library > "$4/ort/libsinkexport_cpu.so"; fi\n'
FAILS = "#!/bin/sh\necho no compiler; exit 1\n"


@pytest.mark.parametrize(
    ("cmake", "tag"), [(BUILDS, "py3-none-linux"), (FAILS, "py3-none-any"), (None, "py3-none-any")], ids=str
)
def test_a_wheel(cmake: str | None, tag: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    names = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "recipes", "exporter", "runtime", "plugins/cpu")
    files = subprocess.run(["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.split("\n")[:-1]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    if cmake is not None:
        (tools / "cmake").write_text(cmake)
        (tools / "cmake").chmod(0o755)
    path = f"{tools}:/bin:/usr/bin" if cmake is not None else str(tools)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "out"), str(source)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert tag in wheel.name
    inside = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("sinkrt/libsinkexport_cpu.so") for name in inside) == ("linux" in tag)
    assert any(name.endswith("sinkexport/recipes/int8-weights.yaml") for name in inside)
    assert "built without the CPU library" in done.stdout + done.stderr or "linux" in tag
