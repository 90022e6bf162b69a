"""Sink attention by an emulated ARM processor: runs of this processor's portable kernels, done again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.plugins.cpu.attention_streams import Streams, positions
from tests.plugins.cpu.calls import Call, replayed
from tests.plugins.cpu.test_arm import EMULATOR, PROCESSORS, program, pytestmark  # noqa: F401
from tests.plugins.cpu.test_sink_attention import cases
from tests.plugins.sink_attention_reference import Case, Tokens


def recorded(case: Case, isa: str) -> list[tuple[Call, dict[str, np.ndarray]]]:
    """Steps and chunks where something changes, for `isa`, and the arrays that they left here."""
    count = 3 * case.capacity + 7
    torch.manual_seed(count)
    tokens = Tokens.random(case, positions(case, count))
    found = []
    for size in sorted({1, min(7, case.window_size), min(64, case.window_size)}):
        streams = Streams(case, tokens, size, "portable", records=True)
        streams.run_all(count)
        wanted = {0, 1, case.num_sinks, case.capacity - 1, case.capacity, len(streams.calls) - 1}
        found += [streams.calls[i] for i in sorted(wanted) if 0 <= i < len(streams.calls)]
    for call, _ in found:
        call.isa = isa
    return found


@pytest.mark.parametrize("isa", PROCESSORS)
def test_kernels(isa, program, tmp_path):  # noqa: F811
    runs = [run for case in cases()[::4] for run in recorded(case, isa)]
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
