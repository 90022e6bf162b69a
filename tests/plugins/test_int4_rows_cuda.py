"""Rows of INT4 tables on a GPU, against float64.

SINKEXPORT_LINEAR: a library that holds capi/int4_rows.cpp; without it one is compiled for this machine's GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plugins.capi.header import DTYPES
from plugins.capi.kernels import Int4Rows, Int4RowsParams
from tests.plugins.gpu_buffers import Buffer
from tests.plugins.gpu_tests import library_for_gpu, needs_gpu
from tests.plugins.linear_library import build
from tests.plugins.matmul_problem import FORMS_OF_INT4, Problem

pytestmark = needs_gpu("SINKEXPORT_LINEAR")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_for_gpu(
        "SINKEXPORT_LINEAR", Int4Rows, lambda: build(Int4Rows, tmp_path_factory.mktemp("int4_rows"), "native")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (33, 200), (999, 1480)], ids=str)
@pytest.mark.parametrize("form", FORMS_OF_INT4)
def test_rows_are_the_tables(library, form, shape, dtype):
    """Every row, one of them twice, and the nearest for ids beyond the table."""
    problem = Problem(library, form, 1, 1, shape, dtype)
    ids = Buffer(shape[0] + 3, dtype=torch.int32)
    ids.tensor.copy_(torch.cat([torch.randperm(shape[0]), torch.tensor([0, -4, 1 << 30])]))
    out = Buffer(shape[0] + 3, shape[1], dtype=dtype)
    fields = {
        name: problem.common[name] for name in ("block_scale", "block_size", "zero_points") if name in problem.common
    }
    params = Int4RowsParams(
        num_ids=shape[0] + 3,
        num_rows=shape[0],
        row_length=shape[1],
        dtype=DTYPES[str(dtype).removeprefix("torch.")],
        ids=ids.address,
        table=problem.common["weight"],
        out=out.address,
        **fields,
    )
    assert library.problem(params) is None
    assert library.launch(params, torch.cuda.current_stream().cuda_stream) == 0
    torch.cuda.synchronize()
    # As the kernel rounds: the product in float32, then to half.
    expected = problem.dense().float().to(dtype)[ids.tensor.clamp(0, shape[0] - 1)]
    assert torch.equal(out.tensor, expected)
    assert all(buffer.is_untouched_outside() for buffer in (ids, out, *problem.stored))
