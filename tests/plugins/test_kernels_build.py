"""What of the attention kernels needs no GPU: they compile, refuse bad parameters on the host, ring.h is ring.py."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from plugins.capi.header import DTYPES
from plugins.capi.kernels import SinkAttention, SinkAttentionParams, StreamAngles, StreamAnglesParams
from tests.golden import make_ring
from tests.plugins.compiler import ROOT, needs_nvcc
from tests.plugins.refusals import INVALID_VALUE, assert_refused
from tests.plugins.sink_attention_library import build

GOLDEN = json.loads(make_ring.PATH.read_text(encoding="utf-8"))
NEEDED = ("q", "k", "v", "position", "window_k", "window_v", "sink_k", "sink_v", "out")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SinkAttention:
    return build(tmp_path_factory.mktemp("sink_attention"), "sm_90")


def params(**changes: Any) -> SinkAttentionParams:
    """Valid on the host, where nobody follows the pointers: 1 GiB apart from each other."""
    values = {
        "batch": 2,
        "num_tokens": 1,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "num_sinks": 4,
        "window_size": 1020,
        "dtype": DTYPES["bfloat16"],
        "scale": 0.125,
        "rope_scaling": 1.0,
    }
    return SinkAttentionParams(**{**values, **{name: (i + 1) << 30 for i, name in enumerate(NEEDED)}, **changes})


INT8 = {"int8_window": True, "window_k_scale": 1 << 40, "window_v_scale": 2 << 40}
ACCEPTED: list[dict[str, Any]] = [
    {},
    INT8,
    {"num_sinks": 0, "sink_k": 0, "sink_v": 0},
    {"num_tokens": 1020},
    {"num_q_heads": 71, "num_kv_heads": 1},
    {"stream_rows": 48},
    {"window_size": 65532},
    {"frequency": 1 << 40, "rotary_dim": 2},
    {"shift_cos": 1 << 40, "shift_sin": 2 << 40, "rotary_dim": 128},
    {"sink_scale": 1 << 40, "sink_logit": 1 << 41, "alibi_slopes": 1 << 42, "gate": 1 << 43, "gate_dim": 128},
    *({"head_dim": dim} for dim in (64, 80, 96, 256)),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"batch": 0}, "batch: received 0, expected 1 .. 64"),
    ({"batch": 65}, "batch: received 65, expected 1 .. 64"),
    ({"num_kv_heads": 0}, "num_kv_heads: received 0, expected 1 .. 1023"),
    ({"num_q_heads": 33}, "num_q_heads: received 33, expected a multiple of num_kv_heads (8)"),
    ({"num_q_heads": 0}, "num_q_heads: received 0, expected a multiple of num_kv_heads (8)"),
    ({"head_dim": 112}, "head_dim: received 112, expected 64, 80, 96, 128 or 256"),
    ({"num_sinks": -1}, "num_sinks: received -1, expected >= 0"),
    ({"window_size": 0}, "window_size: received 0, expected >= 1"),
    ({"window_size": 65533}, "num_sinks + window_size: received 65537, expected at most 65536"),
    ({"num_sinks": 2**31 - 1}, "num_sinks + window_size: received 2147484667, expected at most 65536"),
    ({"num_tokens": 0}, "num_tokens: received 0, expected 1 .. window_size (1020)"),
    ({"num_tokens": 1021}, "num_tokens: received 1021, expected 1 .. window_size (1020)"),
    ({"batch": 64, "num_q_heads": 8000, "num_tokens": 60000, "window_size": 60000}, "batch * num_q_heads * num_tokens"),
    ({"dtype": 2}, "dtype: received 2, expected 0 (float16) or 1 (bfloat16)"),
    ({"scale": 0.0}, "scale: received 0, expected a finite number > 0"),
    ({"scale": float("nan")}, "scale: received nan, expected a finite number > 0"),
    ({"softcap": -1.0}, "softcap: received -1, expected a finite number >= 0"),
    ({"softcap": float("inf")}, "softcap: received inf, expected a finite number >= 0"),
    ({"shift_cos": 1 << 40, "rotary_dim": 128}, "shift_cos, shift_sin: received one of them, expected both or neither"),
    (
        {"shift_cos": 1 << 40, "shift_sin": 2 << 40, "frequency": 3 << 40, "rotary_dim": 128},
        "frequency, shift_cos: received both, expected frequency alone (q, k unrotated) or shift alone",
    ),
    ({"stream_rows": 7}, "stream_rows: received 7, expected 0, or num_q_heads (32) or more in a step"),
    ({"stream_rows": 24, "num_tokens": 2}, "stream_rows: received 24"),
    ({"frequency": 1 << 40}, "rotary_dim: received 0, expected an even number in 2 .. head_dim (128)"),
    ({"frequency": 1 << 40, "rotary_dim": 63}, "rotary_dim: received 63, expected an even number in 2 .. head_dim"),
    ({"frequency": 1 << 40, "rotary_dim": 130}, "rotary_dim: received 130, expected an even number in 2 .. head_dim"),
    ({"frequency": 1 << 40, "rotary_dim": 64, "rope_scaling": float("inf")}, "rope_scaling: received inf"),
    ({"sink_scale": 1 << 40, "num_sinks": 0}, "sink_scale: received with num_sinks = 0, expected num_sinks >= 1"),
    ({"gate": 1 << 40, "gate_dim": 2}, "gate_dim: received 2, expected 1 or head_dim (128)"),
    ({**INT8, "window_k_scale": 0}, "window_k_scale: received null, expected a pointer"),
    *(({name: 0}, f"{name}: received null, expected a pointer") for name in NEEDED),
    *(
        ({name: (1 << 40) + 8}, f"{name}: received 0x10000000008, expected an address that 16 divides")
        for name in (*NEEDED, "num_valid", "alibi_slopes", "sink_logit", "sink_scale")
    ),
]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_what_can_be_launched(library, changes):
    assert library.problem(params(**changes)) is None


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_is_refused_and_why(library, changes, expected):
    assert_refused(library, params(**changes), expected, 1 << 44)


@needs_nvcc
@pytest.mark.slow
def test_workspace_holds_what_any_pointers_need(library):
    step, chunk = params(), params(num_tokens=64)
    row = 2 * 32 * 128 * 2  # bytes of q of one token
    assert library.workspace_bytes(step) > row
    assert library.workspace_bytes(chunk) >= 64 * (2 * row + row // 4)  # q twice and k, rotated
    more = {"frequency": 1 << 40, "rotary_dim": 128, "gate": 1 << 40, "sink_logit": 1 << 40}
    for one in (step, chunk):
        shapes = {name: getattr(one, name) for name in ("batch", "num_tokens")}
        assert library.workspace_bytes(params(**more, **shapes)) == library.workspace_bytes(one)
    # Many streams fill the chip without splits: a partial result each at most, no 64 times as much.
    assert library.workspace_bytes(params(batch=64)) < 16 * library.workspace_bytes(step)
    assert library.workspace_bytes(params(num_kv_heads=0)) == 0
    assert library.launch(step, 0) == INVALID_VALUE
    assert library.launch(step, (1 << 40) + 8) == INVALID_VALUE


ANGLES = {"batch": 2, "num_tokens": 3, "num_frequencies": 8} | {
    name: (i + 1) << 30 for i, name in enumerate(("position", "frequency", "cos", "sin"))
}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_tokens": 0}, "batch, num_tokens, num_frequencies: received 2, 0, 8, expected at least 1 of each"),
        ({"num_tokens": 1 << 28}, "batch * num_tokens * num_frequencies: expected below 2^31"),
        ({"behind": -1}, "behind: received -1, expected >= 0"),
        ({"cos": 0}, "cos: received null, expected a device pointer"),
    ],
    ids=str,
)
def test_angles_that_are_refused_and_why(library, changes, expected):
    angles = StreamAngles(library.path)
    assert angles.problem(StreamAnglesParams(**ANGLES)) is None
    assert_refused(angles, StreamAnglesParams(**ANGLES | changes), expected)


@needs_nvcc
@pytest.mark.slow
def test_a_struct_of_another_size_is_refused(library):
    class Longer(ctypes.Structure):
        _fields_ = (*SinkAttentionParams._fields_, ("more", ctypes.c_void_p))

    class Newer(SinkAttention):
        PARAMS = Longer

    with pytest.raises(ValueError, match=r"received a library whose struct has \d+ bytes, expected \d+; build it"):
        Newer(library.path)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory):
    """The C++ twin's answers to a list of questions, one a line."""
    compiler = shutil.which("g++") or shutil.which("c++") or "c++"
    program, source = tmp_path_factory.mktemp("ring") / "ring_golden", Path(__file__).with_name("ring_golden.cpp")
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsanitize=undefined",
            "-fno-sanitize-recover=all",
            f"-I{ROOT / 'runtime/cpp/include'}",
            str(source),
            "-o",
            str(program),
        ],
        check=True,
    )

    def ask(questions: list[str]) -> list[list[int]]:
        done = subprocess.run([program], input="\n".join(questions), capture_output=True, text=True, check=True)
        lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
        assert len(lines) == len(questions)
        return lines

    return ask


@pytest.mark.parametrize("group", GOLDEN["rings"], ids=lambda g: f"S{g['num_sink_tokens']}-W{g['window_size']}")
def test_ring_h_replays_the_golden_rings(answers, group):
    ring = f"{group['num_sink_tokens']} {group['window_size']}"
    names = ("slot", "is_sink", "num_sinks", "num_window_tokens", "shift")
    cases = group["cases"]
    assert answers([f"ring {ring} {case['t']}" for case in cases]) == [[case[name] for name in names] for case in cases]
    cached = [(case["t"], j, token) for case in cases for j, token in enumerate(case.get("cached_tokens", ()))]
    assert answers([f"cached {ring} {t} {j}" for t, j, _ in cached]) == [[token, j] for _, j, token in cached]
    slots = [(case["t"], slot, token) for case in cases for slot, token in enumerate(case.get("token_in_slot", ()))]
    assert answers([f"in {ring} {t} {slot}" for t, slot, _ in slots]) == [[token] for *_, token in slots]


@pytest.mark.parametrize("group", GOLDEN["phases"], ids=lambda g: f"{g['inv_freq']:.3g}")
def test_ring_h_replays_the_golden_phases(answers, group):
    assert answers([f"frequency {group['inv_freq']!r}"]) == [[group["frequency"]]]
    questions = [f"phase {case['t']} {group['frequency']}" for case in group["cases"]]
    assert answers(questions) == [[case["phase"]] for case in group["cases"]]
