"""CPU libraries that do not serve, in the C++ runtime: cut short, of another kind, or with nothing to say."""

from __future__ import annotations

from pathlib import Path

import pytest
from sinkrt.contract.constants import CPU_LIBRARY_VARIABLE

from tests.cpp.build import CppRuntime
from tests.exporter.tiny_models import tiny_tokenizer
from tests.fake_cpu_library import FAILS, compiled, needs_compiler
from tests.support import export_model

pytestmark = pytest.mark.usefixtures("cpu_library")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "bundle"
    export_model("llama", folder, tokenizer=tiny_tokenizer(), num_sink_tokens=2, window_size=14, target="cpu")
    return folder


def refusal(cpp_runtime: CppRuntime, bundle: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line of a process that ends with code 2."""
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(library))
    done = cpp_runtime.run(cpp_runtime.generate, bundle, "--prompt", "a")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_that_was_cut_short(
    share: float,
    cpp_runtime: CppRuntime,
    bundle: Path,
    cpu_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = cpu_library.read_bytes()
    (tmp_path / "cut.so").write_bytes(whole[: int(len(whole) * share)])
    line = refusal(cpp_runtime, bundle, tmp_path / "cut.so", monkeypatch)
    assert "CPU library: received no library that loads" in line and "was cut short: at least" in line


@needs_compiler
@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        ({"abi": "0"}, "version none at"),
        ({"abi": '"\\xff\\xfe"'}, "version "),
        ({"operators": None}, "which is another library"),
        ({"operators": FAILS}, "(threads: received 3 (no more), expected 9)"),
    ],
)
def test_functions_that_say_nothing(
    texts: dict[str, str | None],
    shown: str,
    cpp_runtime: CppRuntime,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = refusal(cpp_runtime, bundle, compiled(tmp_path, **texts), monkeypatch)
    assert "CPU library: received" in line and shown in line
