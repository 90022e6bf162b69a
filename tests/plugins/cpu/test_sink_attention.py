"""Sink attention on the CPU against the float64 reference, on every instruction set that this processor has."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

from tests.plugins.cpu.attention_streams import Layout, Streams, recorded
from tests.plugins.cpu.calls import SinkAttentionParams
from tests.plugins.cpu.guarded import Guarded
from tests.plugins.cpu.library import ISAS, isas_here, library
from tests.plugins.sink_attention_cases import error, is_comparable, mixed_case, positions
from tests.plugins.sink_attention_reference import Case, Tokens, attention, stored_rows
from tests.plugins.sink_attention_streams import expected_states
from tests.plugins.test_sink_attention_reference import oracle_outputs

F32 = torch.float32
HEADS = ((4, 4), (6, 2), (8, 2), (7, 1), (16, 2), (12, 1), (5, 1))
LAYOUTS = (Layout(), Layout(is_packed=True, out_tokens_first=True), Layout(tokens_first=True))
MOST = {"fp": 3e-6, "fp16": 2e-5, "int8": 1.5e-4}
"""Errors that pass, |out - want| / |want|. A row that lies between two float16 or int8 numbers may go either way."""


def cases() -> list[Case]:
    """Every head_dim x window type, each with several combinations of the rest; all of each list appear often."""
    basics = itertools.product((8, 64, 72, 80, 96, 128, 256), ("fp", "fp16", "int8"), range(2))
    return [
        mixed_case(i, HEADS, head_dim, F32, kv, value_dim=(0, 0, 40)[i % 3], qk_norm=True)
        for i, (head_dim, kv, _) in enumerate(basics)
    ]


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
        is_exact = not case.v_norm if "v" in name else case.rotation != "kernel" and not case.qk_norm
        if is_exact:
            assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)), name
        elif got.dtype == F32:
            assert torch.equal(got.isfinite(), want.isfinite()), name
            assert (got - want)[got.isfinite()].abs().max() < 3e-6, name
        elif name in ("window_k", "window_v") and case.kv == "int8":
            is_written = streams.states[f"{name}_scale"].tensor.isfinite()
            assert ((got[is_written].int() - want[is_written].int()).abs() <= 1).all()
        else:
            is_written = got.isfinite()
            assert torch.equal(is_written, want.isfinite()), name
            assert torch.allclose(got[is_written].float(), want[is_written].float(), rtol=2.0**-10, atol=1e-4), name


def assert_same_states(first: Streams, second: Streams) -> None:
    for name, state in first.states.items():
        assert torch.equal(state.bits(), second.states[name].bits()), name


def run_case(case: Case, isa: str, record_property, layout: Layout = LAYOUTS[0], threads: int = 2) -> None:
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


NORMED = (
    Case(8, 2, 128, 4, 29, F32, rotation="kernel", rotary_dim=128, qk_norm=True),
    Case(7, 1, 72, 0, 17, F32, kv="int8", rotation="kernel", rotary_dim=36, qk_norm=True, value_dim=40),
    Case(6, 2, 72, 4, 29, F32, rotation="kernel", rotary_dim=72, qk_norm=True, norm_of_rows=True),
    Case(4, 4, 64, 0, 17, F32, kv="fp16", qk_norm=True, norm_of_rows=True, v_norm=True, value_dim=40),
    Case(6, 2, 16, 3, 21, F32, kv="int8", rotation="kernel", rotary_dim=16, qk_norm=True, v_norm=True),
    Case(6, 2, 64, 4, 29, F32, rotation="kernel", rotary_dim=64, qk_norm=True, turned_weights=2),
    Case(4, 1, 24, 0, 13, F32, rotation="kernel", rotary_dim=16, interleaved=True, turned_weights=1),
)


@pytest.mark.parametrize("case", (*cases()[::5], *NORMED), ids=str)
def test_every_instruction_set(record_property, case, isa):
    run_case(case, isa, record_property)


ORACLE = (
    Case(6, 2, 16, 3, 5, F32, rotation="kernel", rotary_dim=16, rope_scaling=1.2),
    Case(3, 1, 24, 2, 6, F32, kv="fp16", rotation="kernel", rotary_dim=8, interleaved=True, softcap=3.0, gate_dim=1),
    Case(
        4, 4, 8, 1, 7, F32, kv="int8", rotation="kernel", rotary_dim=8, sink_logit=True, sink_scale=True, value_dim=16
    ),
    Case(5, 1, 8, 0, 4, F32, kv="int8", alibi=True, gate_dim=8),
    Case(4, 2, 24, 2, 6, F32, kv="fp16", alibi=True, qk_norm=True),
)


@pytest.mark.parametrize("size", (1, 3))
@pytest.mark.parametrize("case", ORACLE, ids=str)
def test_the_oracle(case, size):
    count = 3 * case.capacity + 7
    torch.manual_seed(count)
    tokens = Tokens.random(case, torch.arange(count).expand(case.batch, -1))
    streams, found = Streams(case, tokens, size, isas_here()[-1]), []
    for start in range(0, count, size):
        valid = [min(size, count - start)] * case.batch
        found.append(streams.run([start] * case.batch, valid)[:, :, : valid[0]])
    assert error(torch.cat(found, 2), torch.tensor(oracle_outputs(case, tokens))) < MOST[case.kv]


@pytest.mark.parametrize("size", (1, 5))
@pytest.mark.parametrize("case", NORMED, ids=str)
def test_states_that_another_run_writes(case, size, isa):
    """Outputs of a run that only reads them are the same: in a step after the other has written, in a chunk before."""
    count = 3 * case.capacity + 7
    torch.manual_seed(count)
    tokens = Tokens.random(case, torch.arange(count).expand(case.batch, -1))
    writer, reader = (Streams(case, tokens, size, isa, reads_only=x) for x in (False, True))
    for start in range(0, count, size):
        run = [start] * case.batch, [min(size, count - start)] * case.batch
        if size == 1:
            wanted = writer.run(*run)
        for name, state in writer.states.items():
            reader.states[name].tensor.copy_(state.tensor)
        found = reader.run(*run)
        for name, state in writer.states.items():
            assert torch.equal(reader.states[name].bits(), state.bits()), name
        if size > 1:
            wanted = writer.run(*run)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", NORMED, ids=str)
def test_rows_that_another_run_writes(case, isa):
    """A run that only reads states hands out the very rows that the other writes, and has its outputs."""
    count, size = 3 * case.capacity + 7, 5
    torch.manual_seed(count)
    tokens = Tokens.random(case, torch.arange(count).expand(case.batch, -1))
    writer = Streams(case, tokens, size, isa)
    reader = Streams(case, tokens, size, isa, reads_only=True, hands_out=True)
    for start in range(0, count, size):
        valid = min(size, count - start)
        run = [start] * case.batch, [valid] * case.batch
        for name, state in writer.states.items():
            reader.states[name].tensor.copy_(state.tensor)
        found, wanted = reader.run(*run), writer.run(*run)
        assert torch.equal(found, wanted)
        for i in range(valid):
            is_sink, slot = start + i < case.num_sinks, (start + i - case.num_sinks) % case.window_size
            for name, state in writer.states.items():
                if name.startswith("sink") == is_sink:
                    new = reader.new.get(f"new_{name}", reader.new[f"new_{name.partition('_')[2]}"])
                    written = state.tensor[:, :, start + i if is_sink else slot]
                    assert torch.equal(new.tensor[:, :, i], written), (name, start + i)
    reader.check_guards()


LARGE = (
    Case(9, 3, 64, 4, 1020, F32, kv="int8", rotation="kernel", rotary_dim=64, batch=1),
    Case(9, 3, 64, 4, 8188, F32, rotation="kernel", rotary_dim=64, batch=1),
    Case(4, 4, 128, 4, 4092, F32, kv="fp16", rotation="caller", rotary_dim=128, batch=2),
    Case(8, 1, 256, 0, 2044, F32, kv="int8", alibi=True, batch=3),
    Case(2, 1, 80, 33, 991, F32, kv="int8", alibi=True, sink_logit=True, batch=5),
)


@pytest.mark.parametrize("num_tokens", (1, 64))
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_caches_one_run_on_given_states(case, num_tokens):
    """Caches that several workers share: the same to rounding whatever their number, and the same bits twice."""
    count = case.capacity + num_tokens
    torch.manual_seed(count)
    tokens = Tokens.random(case, positions(case, count))
    k, v = stored_rows(case, tokens)
    before = Tokens(**{**vars(tokens), "positions": tokens.positions[:, :-num_tokens]})
    states = expected_states(case, before, k[:, :, :-num_tokens].to(F32), v[:, :, :-num_tokens].to(F32))
    want = attention(case, tokens, torch.float64, slice(count - num_tokens, count))
    for threads in (1, 2, 3, 7):
        outputs = []
        for _ in range(2):
            streams = Streams(case, tokens, num_tokens, isas_here()[-1], threads)
            for name, state in states.items():
                streams.states[name].tensor.copy_(state)
            outputs.append(streams.run([count - num_tokens] * case.batch, [num_tokens] * case.batch))
            streams.check_guards()
        assert torch.equal(*outputs)
        assert error(outputs[0], want) < MOST[case.kv]


@pytest.mark.parametrize("case", cases()[1::4], ids=str)
def test_chunks_in_bfloat16(case):
    """Where the processor has it: states to the bit, outputs as eight bits of a number allow."""
    isa = isas_here()[-1]
    count = 2 * case.capacity + 7
    torch.manual_seed(count)
    tokens = Tokens.random(case, positions(case, count))
    size = min(case.window_size, 13)
    exact, rounded = (Streams(case, tokens, size, isa, bfloat16_chunks=x) for x in (False, True))
    exact_outputs, outputs = exact.run_all(count), rounded.run_all(count)
    assert_same_states(exact, rounded)
    keep = is_comparable(case, count)
    got, want = (x.transpose(1, 2)[keep] for x in (outputs, exact_outputs.double()))
    most = 0.02 if isa == "avx512_bf16" and size > 1 else 0.0
    assert error(got, want) <= most


@pytest.mark.parametrize("case", cases()[2::6], ids=str)
def test_nothing_beyond_the_arrays_is_read(case, isa):
    """Every array ends at a page without access."""
    for call, want in recorded(case, isa):
        memory = {name: Guarded(array, array.itemsize) for name, array in call.arrays.items()}
        params = SinkAttentionParams(**call.numbers, **{name: one.address for name, one in memory.items()})
        library().sinkexport_cpu_sink_attention(ctypes.byref(params), ISAS.index(isa), 2)
        for name, one in memory.items():
            assert one.is_intact(), name
            if name not in want:
                assert one.array.tobytes() == call.arrays[name].tobytes(), f"{name} was written to"
        np.testing.assert_allclose(memory["out"].array, want["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", (1, 5))
def test_what_is_not_a_number_stays_in_its_head(isa, size):
    case = Case(6, 2, 64, 4, 40, F32, rotation="none")
    tokens = Tokens.random(case, positions(case, 10))
    outputs = []
    for bad in (False, True):
        if bad:
            tokens.q[1, 3, size - 1] = float("nan")
        outputs.append(Streams(case, tokens, size, isa).run([0] * 3, [size] * 3))
    is_bad = torch.zeros(3, 6, size, dtype=torch.bool)
    is_bad[1, 3, size - 1] = True
    assert outputs[1][is_bad].isnan().all()
    assert torch.equal(outputs[0][~is_bad], outputs[1][~is_bad])


REFUSED = {
    "batch": ({"batch": 0}, "batch: received 0, expected 1 .. 65535"),
    "heads": ({"num_q_heads": 5}, "num_q_heads: received 5, expected a multiple of num_kv_heads (2)"),
    "head_dim": ({"head_dim": 12}, "head_dim: received 12, expected a multiple of 8 up to 1024"),
    "value_dim": ({"value_dim": 0}, "value_dim: received 0, expected a multiple of 8 up to 1024"),
    "window": ({"window_size": 0}, "window_size: received 0, expected 1 .. 1048576"),
    "tokens": ({"num_tokens": 30}, "num_tokens: received 30, expected 1 .. window_size (29)"),
    "type": ({"window_type": 3}, "window_type: received 3, expected 0 (float32), 1 (float16) or 2 (int8)"),
    "width": (
        {"row_width": 8},
        "row_width: received 8, expected 0, or with tokens_first num_q_heads * head_dim (64) or",
    ),
    "scale": ({"scale": 0.0}, "scale: received 0, expected a finite number > 0"),
    "softcap": ({"softcap": -1.0}, "softcap: received -1, expected a finite number >= 0"),
    "rotary_dim": ({"rotary_dim": 18}, "rotary_dim: received 18, expected an even number in 0 .. head_dim (16)"),
    "qk_norm": ({"k_norm_weight": 64}, "q_norm_weight, k_norm_weight: received one of them, expected both or neither"),
    "v_norm_epsilon": ({"v_norm_epsilon": -1.0}, "v_norm_epsilon: received -1, expected a finite number >= 0"),
    "turned": ({"k_turned_weight": 64}, "k_turned_weight: received without q_turned_weight, expected both or neither"),
    "qk_norm_epsilon": ({"qk_norm_epsilon": -1.0}, "qk_norm_epsilon: received -1, expected a finite number >= 0"),
    "frequency": ({"rotary_dim": 0}, "rotary_dim: received 0 with frequency, expected the dimensions that turn"),
    "sink_scale": ({"num_sinks": 0}, "sink_scale: received with num_sinks = 0, expected num_sinks >= 1"),
    "gate_dim": ({"gate_dim": 3}, "gate_dim: received 3, expected 1 or value_dim (16)"),
    "null": ({"q": None}, "q: received null, expected a pointer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    changes, line = REFUSED[name]
    case = Case(4, 2, 16, 4, 29, F32, rotation="kernel", rotary_dim=16, sink_scale=True, gate_dim=16)
    params = Streams(case, Tokens.random(case, positions(case, 60)), 1, "portable").params
    for field, value in changes.items():
        setattr(params, field, value)
    problem = library().sinkexport_cpu_sink_attention_problem
    problem.restype = ctypes.c_char_p
    assert problem(ctypes.byref(params)).decode().startswith(line)
