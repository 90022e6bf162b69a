"""Libraries that come as files: cut short, of another kind, or with functions that say nothing; each in one line."""

from __future__ import annotations

import _ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sinkrt.backends.cpu_library import checked_library, instruction_set
from sinkrt.backends.ort_graph import open_graph
from sinkrt.backends.shared_library import open_library, text_of
from sinkrt.backends.tensorrt_library import plugin_facts
from sinkrt.contract import CPU_ABI
from sinkrt.contract.constants import CPU_ISA_VARIABLE, CPU_LIBRARY_VARIABLE
from sinkrt.errors import BackendError, UsageError

from tests.fake_cpu_library import FAILS, compiled, needs_compiler
from tests.support import refused, run_cli

WHOLE = Path(_ctypes.__file__)


def cut(folder: Path, num_bytes: int) -> Path:
    path = folder / "cut.so"
    path.write_bytes(WHOLE.read_bytes()[:num_bytes])
    return path


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_whole_library_opens() -> None:
    assert open_library(WHOLE)._handle


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
def test_a_library_that_was_cut_short(share: float, tmp_path: Path) -> None:
    path = cut(tmp_path, int(WHOLE.stat().st_size * share))
    with pytest.raises(OSError, match=r"cut short: at least [0-9]+ bytes|too short"):
        open_library(path)


def test_one_byte_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="at least 1 bytes"):
        open_library(cut(tmp_path, WHOLE.stat().st_size - 1))


def test_what_is_no_library_is_for_the_loader(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library" * 100)
    with pytest.raises(OSError, match="invalid ELF header"):
        open_library(tmp_path / "text.so")
    with pytest.raises(OSError, match="nothing"):
        open_library(tmp_path / "nothing.so")


def test_a_process_lives_on(tmp_path: Path) -> None:
    """The loader would end the process, with no word."""
    script = "import sys; from sinkrt.backends.cpu_library import is_usable; print(is_usable())"
    environment = {**os.environ, CPU_LIBRARY_VARIABLE: str(cut(tmp_path, WHOLE.stat().st_size // 2))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_plugin_of_tensorrt_that_was_cut_short(tmp_path: Path) -> None:
    with refused("--plugin: received", "cut short", error=UsageError):
        plugin_facts(cut(tmp_path, WHOLE.stat().st_size // 2))


# --- functions -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        ({"abi": "0"}, "version None at"),
        ({"abi": '"\\xff\\xfe"'}, "version \\xff\\xfe at"),
        ({"problem": '"\\xff is wrong"'}, "CPU library: \\xff is wrong"),
        ({"isa": None}, "sinkexport_cpu_isa"),
        ({"operators": None}, "RegisterCustomOps"),
    ],
)
def test_functions_that_say_nothing(
    texts: dict[str, str | None], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(compiled(tmp_path, **texts)))
    with refused("CPU library: ", shown, error=BackendError):
        checked_library()
    run_cli("inspect", "cpu").refusal("CPU library: ", shown)


@needs_compiler
def test_texts_of_a_library(tmp_path: Path) -> None:
    path = compiled(tmp_path, isa="0")
    assert text_of(open_library(path), "sinkexport_cpu_abi") == CPU_ABI
    assert instruction_set(path) == "none"


@needs_compiler
def test_a_library_that_cannot_start_is_no_fault_of_the_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    path = compiled(tmp_path, operators=FAILS)
    with refused("CPU library: received", "threads: received 3", "fewer threads", error=BackendError):
        open_graph(toy_bundle / "decode.onnx", 1, ["CPUExecutionProvider"], library=path)


# --- the command -----------------------------------------------------------------------------------------------------


@needs_compiler
def test_inspect_cpu_with_an_instruction_set_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled(tmp_path, problem='"SINKEXPORT_CPU_ISA: received sse9, expected avx2"')
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(path))
    monkeypatch.setenv(CPU_ISA_VARIABLE, "sse9")
    for options in ((), ("--json",)):
        run_cli("inspect", "cpu", *options).refusal("SINKEXPORT_CPU_ISA: received sse9")
