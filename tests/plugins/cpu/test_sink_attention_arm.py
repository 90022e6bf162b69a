"""Sink attention by an emulated ARM processor: runs of this processor's portable kernels, done again."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plugins.cpu.attention_streams import recorded
from tests.plugins.cpu.calls import replayed
from tests.plugins.cpu.test_arm import EMULATOR, PROCESSORS, program, pytestmark  # noqa: F401
from tests.plugins.cpu.test_sink_attention import NORMED, cases


@pytest.mark.parametrize("isa", PROCESSORS)
def test_kernels(isa, program, tmp_path):  # noqa: F811
    runs = [run for case in (*cases()[::4], *NORMED) for run in recorded(case, isa)]
    results = replayed([EMULATOR, "-cpu", PROCESSORS[isa], str(program)], [call for call, _ in runs], tmp_path)
    for (call, want), got in zip(runs, results, strict=True):
        for name, array in want.items():
            if array.dtype == np.int8:
                assert (np.abs(array.astype(int) - got[name]) <= 1).all(), name
                continue
            most = 1e-5 if array.dtype == np.float32 else 2.0**-10
            np.testing.assert_allclose(got[name], array, rtol=most, atol=most, err_msg=name)
        for name, array in call.arrays.items():
            assert name in want or array.tobytes() == got[name].tobytes(), f"{name} was written to"
