"""Sink attention on the CPU against the float64 reference, on every instruction set that this processor has."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from tests.plugins.cpu.attention_streams import Layout, Streams, is_comparable, positions
from tests.plugins.cpu.library import isas_here, library
from tests.plugins.sink_attention_reference import Case, Tokens, attention, stored_rows
from tests.plugins.sink_attention_streams import expected_states

F32 = torch.float32
HEADS = ((4, 4), (6, 2), (8, 2), (7, 1), (16, 2), (12, 1), (5, 1))
GEOMETRIES = ((4, 29), (0, 17), (1, 16), (20, 45), (3, 64), (5, 1), (4, 150))
EXTRAS = (
    {"rotation": "caller", "rotary_dim": 1.0},
    {"rotation": "kernel", "rotary_dim": 0.5, "interleaved": True, "softcap": 4.0},
    {"alibi": True},
    {"rotation": "kernel", "rotary_dim": 1.0, "rope_scaling": 1.2, "sink_logit": True, "gate_dim": "D"},
    {"rotation": "caller", "rotary_dim": 0.25, "interleaved": True, "sink_scale": True, "gate_dim": 1},
    {
        "rotation": "kernel",
        "rotary_dim": 1.0,
        "alibi": True,
        "softcap": 10.0,
        "sink_logit": True,
        "sink_scale": True,
        "gate_dim": 1,
    },
)
LAYOUTS = (Layout(), Layout(is_packed=True, out_tokens_first=True), Layout(tokens_first=True))
MOST = {"fp": 3e-6, "fp16": 2e-5, "int8": 1.5e-4}
"""Errors that pass, |out - want| / |want|. A row that lies between two float16 or int8 numbers may go either way."""


def cases() -> list[Case]:
    """Every head_dim x window type, each with several combinations of the rest; all of each list appear often."""
    found = []
    basics = itertools.product((8, 64, 72, 80, 96, 128, 256), ("fp", "fp16", "int8"), range(2))
    for i, (head_dim, kv, _) in enumerate(basics):
        heads, (num_sinks, window) = HEADS[i % len(HEADS)], GEOMETRIES[(i + i // 7) % len(GEOMETRIES)]
        extras = dict(EXTRAS[(i + i // 6) % len(EXTRAS)])
        if not num_sinks:
            extras.pop("sink_scale", None)
        if "rotary_dim" in extras:
            extras["rotary_dim"] = max(int(head_dim * extras["rotary_dim"]) // 2 * 2, 2)
        value_dim = (0, 0, 40)[i % 3]
        if extras.get("gate_dim") == "D":
            extras["gate_dim"] = value_dim or head_dim
        found.append(Case(*heads, head_dim, num_sinks, window, F32, kv=kv, value_dim=value_dim, **extras))
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; NaN if any is."""
    return float((got.double() - want).norm() / want.norm())


def check_outputs(case: Case, tokens: Tokens, got: torch.Tensor, most: float, record_property, label: str) -> None:
    """Over all tokens, and at the steps where something changes."""
    count = got.shape[2]
    want, keep = attention(case, tokens, torch.float64), is_comparable(case, count)
    steps = {1, case.num_sinks, case.capacity - 1, case.capacity, case.capacity + 1, count}
    selections = {"all": keep} | {
        f"step{n}": keep & (torch.arange(count) == n - 1) for n in sorted(steps) if 1 <= n <= count
    }
    for name, chosen in selections.items():
        ours, theirs = (x.transpose(1, 2)[chosen] for x in (got, want))
        found = error(ours, theirs)
        if name == "all":
            record_property(f"{label}_error", found)
        assert found <= most * (1 if name == "all" else 4), (label, name, found)


def check_states(case: Case, tokens: Tokens, streams: Streams) -> None:
    """Bit for bit where rows come as they are stored; else as the rotation's rounding allows."""
    k, v = stored_rows(case, tokens)
    for name, want in expected_states(case, tokens, k.to(case.dtype), v.to(case.dtype)).items():
        got = streams.states[name].tensor
        if case.rotation != "kernel" or "v" in name:
            assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)), name
        elif got.dtype == F32:
            assert torch.equal(got.isfinite(), want.isfinite()), name
            assert (got - want)[got.isfinite()].abs().max() < 3e-6, name
        elif name == "window_k" and case.kv == "int8":
            is_written = streams.states["window_k_scale"].tensor.isfinite()
            assert ((got[is_written].int() - want[is_written].int()).abs() <= 1).all()
        else:
            is_written = got.isfinite()
            assert torch.equal(is_written, want.isfinite()), name
            assert torch.allclose(got[is_written].float(), want[is_written].float(), rtol=2.0**-10, atol=1e-4), name


def assert_same_states(first: Streams, second: Streams) -> None:
    for name, state in first.states.items():
        assert torch.equal(state.bits(), second.states[name].bits()), name


def run_case(case: Case, isa: str, record_property, layout: Layout = Layout(), threads: int = 2) -> None:  # noqa: B008
    count = 3 * case.capacity + 7
    torch.manual_seed(count)
    tokens = Tokens.random(case, positions(case, count))
    steps = Streams(case, tokens, 1, isa, threads, layout)
    check_outputs(case, tokens, steps.run_all(count), MOST[case.kv], record_property, "step")
    check_states(case, tokens, steps)
    steps.check_guards()
    for size in sorted({min(size, case.window_size) for size in (7, 64)} - {1}):
        chunks = Streams(case, tokens, size, isa, threads, layout)
        check_outputs(case, tokens, chunks.run_all(count), MOST[case.kv], record_property, f"chunk{size}")
        chunks.check_guards()
        assert_same_states(steps, chunks)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_steps_and_chunks(record_property, case):
    number = cases().index(case)
    run_case(case, isas_here()[-1], record_property, LAYOUTS[number % 3], threads=1 + number % 3)


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_i8mm"))
@pytest.mark.parametrize("case", cases()[::5], ids=str)
def test_every_instruction_set(record_property, case, isa):
    if isa not in isas_here():
        pytest.skip(f"this processor has no {isa}")
    run_case(case, isa, record_property)
