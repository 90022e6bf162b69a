"""Norms and gates on a GPU: what they give, in graphs too, and that each waits for the kernel before it.

SINKEXPORT_NORM_AND_GATE: a library that holds capi/rms_norm.cpp and capi/gated_activation.cpp; without it one is
compiled for this machine's GPU.
"""

from __future__ import annotations

import pytest
import torch

from plugins.capi.header import DTYPES
from plugins.capi.kernels import GatedActivationParams, RmsNormParams
from tests.plugins.gpu_tests import library_for_gpu, needs_gpu
from tests.plugins.norm_and_gate_cases import GATE_CASES, NORM_CASES, GateCase, NormCase
from tests.plugins.norm_and_gate_library import NormAndGate, build

pytestmark = needs_gpu("SINKEXPORT_NORM_AND_GATE")

MANY_ROWS = [NormCase(70_001, 64), NormCase(300, 4096, float_weight=True), NormCase(64, 8192, "bfloat16")]
LARGE_GATES = [GateCase(64, 14336), GateCase(1, 14336, "gelu_tanh"), GateCase(70_001, 8, merged=False)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> NormAndGate:
    return library_for_gpu(
        "SINKEXPORT_NORM_AND_GATE", NormAndGate.of, lambda: build(tmp_path_factory.mktemp("norm_and_gate"), "native")
    )


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("case", [*NORM_CASES, *MANY_ROWS], ids=str)
def test_norms(library: NormAndGate, case: NormCase) -> None:
    case.check(library, torch.Tensor.cuda, current_stream())


@pytest.mark.parametrize("case", [*GATE_CASES, *LARGE_GATES], ids=str)
def test_gates(library: NormAndGate, case: GateCase) -> None:
    case.check(library, torch.Tensor.cuda, current_stream())


@pytest.mark.parametrize("num_rows", [1, 3, 64])
@pytest.mark.parametrize("captured", [False, True])
def test_each_launch_waits_for_the_one_before(library: NormAndGate, num_rows: int, captured: bool) -> None:
    """A chain of norms and gates through few buffers, with and without waiting between.

    Kernels may be placed before the one ahead of them has ended: they must not read or write too early.
    """
    width, links = 2048, 24
    start = torch.randn(num_rows, 2 * width, dtype=torch.float16, device="cuda")
    stream, y, total = (torch.zeros_like(start) for _ in range(3))
    gated = torch.zeros(num_rows, width, dtype=torch.float16, device="cuda")
    weight = torch.randn(width, dtype=torch.float16, device="cuda") + 1
    half = DTYPES["float16"]
    # [M, 2 N] as [2 M, N]: norms read and write what the gate takes as gate | up.
    norm = RmsNormParams(
        2 * num_rows,
        width,
        half,
        False,
        1e-5,
        stream.data_ptr(),
        weight.data_ptr(),
        start.data_ptr(),
        y.data_ptr(),
        total.data_ptr(),
    )
    gate = GatedActivationParams(
        num_rows, width, 2 * width, half, 0, y.data_ptr(), y.data_ptr() + 2 * width, gated.data_ptr()
    )
    back = RmsNormParams(
        num_rows, width, half, False, 1e-5, gated.data_ptr(), weight.data_ptr(), 0, stream.data_ptr(), 0
    )

    def chain(wait: bool) -> None:
        stream.copy_(start)
        for _ in range(links):
            launches = [(library.norm, norm), (library.gate, gate), (library.norm, back)]
            for function, params in launches:
                assert function.launch(params, current_stream()) == 0
                if wait:
                    torch.cuda.synchronize()

    chain(wait=True)
    expected = [tensor.clone() for tensor in (stream, y, total, gated)]
    assert all(tensor.isfinite().all() for tensor in expected)
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            chain(wait=False)
    for _ in range(20):
        for tensor in (stream, y, total, gated):
            tensor.fill_(float("nan"))
        if captured:
            graph.replay()
        else:
            chain(wait=False)
        torch.cuda.synchronize()
        for tensor, want in zip((stream, y, total, gated), expected, strict=True):
            assert torch.equal(tensor, want)
