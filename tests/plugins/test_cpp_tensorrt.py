"""The C++ runtime's TensorRT backend: it compiles without a warning, and its sampling picks what the host's does.

Nothing here runs on a GPU; benchmarks/gpu does.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.plugins.compiler import ROOT, compile_sources, run_nvcc
from tests.plugins.trt_library import PTX_ONLY, headers, needs_plugin_build

RUNTIME = ROOT / "runtime/cpp"
PARTS = ("backend", "buffers", "engine", "library", "prefill")
SOURCES = [
    *(
        RUNTIME / f"src/{name}.cpp"
        for name in (*(f"backends/tensorrt/{part}" for part in PARTS), "cuda/device", "bundle/engines")
    ),
    RUNTIME / "src/cuda/sampling.cu",
]
INCLUDES = (f"-I{RUNTIME / 'src'}", f"-I{RUNTIME / 'include'}")

pytestmark = [needs_plugin_build, pytest.mark.slow]  # compiles for half a minute


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_sources(
        tmp_path_factory.mktemp("objects"), SOURCES, "-O0", PTX_ONLY, *INCLUDES, "-isystem", str(headers())
    )


def test_it_compiles_and_links_neither_tensorrt_nor_the_plugin(objects: list[Path]) -> None:
    """All that is undefined is CUDA's, the C library's, or libsinkrt's own."""
    for file in objects:
        symbols = subprocess.run(["nm", "-C", "-u", file], capture_output=True, text=True, check=True).stdout
        names = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
        assert names
        foreign = [n for n in names if n.startswith(("createInfer", "getPluginRegistry", "getInferLib", "getLogger"))]
        assert foreign == []


def test_sampling_picks_what_the_host_picks(tmp_path: Path) -> None:
    """The device code, compiled for the host as a block of one thread, over random logits, ties and penalties."""
    program = tmp_path / "sampling_on_host"
    run_nvcc(
        "-std=c++17",
        "-O1",
        *INCLUDES,
        "-o",
        str(program),
        str(ROOT / "tests/plugins/sampling_on_host.cpp"),
        str(RUNTIME / "src/session/sampler.cpp"),
        str(RUNTIME / "src/error.cpp"),
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3000 picks, 0 differ\n"), done.stdout + done.stderr
