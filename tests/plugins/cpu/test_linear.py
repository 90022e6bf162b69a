"""The CPU's matmuls and rows of tables against float64, on every instruction set that this processor has."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tests.plugins.cpu.calls import Call, problem, run_here
from tests.plugins.cpu.linear_cases import Case, Problem, error, quantised
from tests.plugins.cpu.packing import WEIGHT_TYPES, int_weight, random_weight

FORMATS = (
    {"kind": "float32"},
    {"kind": "bfloat16"},
    {"kind": "int8"},
    {"kind": "int8", "block_size": 32, "has_half_scales": True},
    {"kind": "int8", "block_size": 128},
    {"kind": "int4", "block_size": 32},
    {"kind": "int4", "block_size": 32, "has_zeros": True, "has_half_scales": True},
    {"kind": "int4", "block_size": 64, "has_zeros": True},
    {"kind": "int4", "block_size": 128, "has_half_scales": True},
)
SIZES = ((64, 32), (576, 48), (100, 40), (7, 1), (33, 17), (261, 23), (1, 16), (130, 100))
"""K and N: most are no multiples of a block or a tile."""
ROWS = (*range(1, 18), 64, 100)
FUSED = (
    {},
    {"norm": True},
    {"bias": True, "activation": "gelu"},
    {"residual": True},
    {"norm": True, "bias": True, "activation": "silu", "gated": True, "residual": True},
    {"activation": "gelu_tanh", "gated": True},
    {"bias": True, "activation": "relu2"},
    {"norm": True, "layer_norm": True},
    {"norm": True, "layer_norm": True, "norm_bias": True, "bias": True, "multiplier": 0.3, "residual": True},
    {"output_norm": True, "residual": True},
    {"norm": True, "bias": True, "activation": "silu", "multiplier": -2.0, "output_norm": True},
)
MOST = {"float32": 2e-6, "bfloat16": 2e-6, "int8": 2e-6, "int4": 2e-6}
"""Errors that pass, |got - want| / |want|; with integers against the same int8 activations."""
MOST_WITH_NORM = 2e-3
"""The same after a norm: its last bit decides which of two integers a few activations are rounded to."""


def cases() -> list[Case]:
    """Every format with every number of rows, sizes and what is fused in turns."""
    found = []
    for i, (rows, form) in enumerate(itertools.product(ROWS, FORMATS)):
        columns, outputs = SIZES[(i + i // 8) % len(SIZES)]
        found.append(Case(**form, rows=rows, columns=columns, outputs=outputs, **FUSED[i % len(FUSED)]))
    return found


def check(task: Problem, got: np.ndarray) -> None:
    """Against float64 with the same int8 activations, and against plain float64 within what int8 can change."""
    case = task.case
    is_integer = case.kind in {"int8", "int4"}
    if not is_integer:
        assert error(got, task.plain()) < MOST[case.kind], str(case)
        return
    assert error(got, task.rounded()) < (MOST_WITH_NORM if case.norm else MOST[case.kind]), str(case)
    if case.activation == "none" and not case.gated and not case.output_norm:
        off = np.abs(got - task.plain())
        assert (off <= task.rounding_of_activations() * 1.001 + 1e-5 * np.abs(task.plain()) + 1e-5).all(), str(case)


def test_matmuls(isa):
    tasks = [Problem(case, seed) for seed, case in enumerate(cases())]
    calls = [task.call(isa, threads=1 + i % 3) for i, task in enumerate(tasks)]
    run_here(calls)
    for task, call in zip(tasks, calls, strict=True):
        check(task, call.results)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, form.values())))
def test_a_row_has_the_same_bits_in_any_company(isa, form):
    whole = Problem(Case(**form, rows=100, columns=261, outputs=70, norm=True, output_norm=True))
    calls = [whole.call(isa, threads) for threads in (1, 2, 5)]
    for rows in (1, 2, 3, 5, 6, 7, 13):
        call = whole.call(isa)
        call.numbers["num_rows"] = rows
        call.arrays = {**call.arrays, "x": whole.x[:rows], "y": call.arrays["y"][:rows]}
        calls.append(call)
    run_here(calls)
    for call in calls[1:]:
        assert np.array_equal(call.results, calls[0].results[: len(call.results)])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, form.values())))
def test_a_row_has_the_same_bits_where_rows_and_inputs_take_several_turns(isa, form):
    whole = Problem(Case(**form, rows=290, columns=1700, outputs=36, activation="silu", gated=True, bias=True))
    calls = [whole.call(isa, threads=2)]
    for first, rows in ((0, 1), (283, 7), (130, 40)):
        call = whole.call(isa)
        call.numbers["num_rows"] = rows
        part = slice(first, first + rows)
        call.arrays = {**call.arrays, "x": whole.x[part], "y": call.arrays["y"][part]}
        calls.append(call)
    run_here(calls)
    for call, first in zip(calls[1:], (0, 283, 130), strict=True):
        assert np.array_equal(call.results, calls[0].results[first : first + len(call.results)])
    check(whole, calls[0].results)


def largest_sums(isa: str, rows: int = 7) -> tuple[list[Call], list[np.ndarray]]:
    """Calls and what they give to the bit. Scales of 1 leave whole numbers, which float32 holds.

    Sums are as large as they can be: pairs of products would saturate 16 bits.
    """
    rng = np.random.default_rng(1)
    calls, results = [], []
    for kind, block_size, has_zeros in (("int8", 0, False), ("int4", 32, False), ("int4", 128, True)):
        columns, outputs, low, high = 160, 24, *((-128, 127) if kind == "int8" else (0, 15))
        values = rng.choice([low, high], (outputs, columns))
        values[:4], values[4:8] = high, low
        blocks = -(-columns // block_size) if block_size else 1
        zeros = rng.choice([0, 15], (outputs, blocks)) if has_zeros else None
        weight = int_weight(kind, values, np.ones((outputs, blocks)), zeros, block_size, np.float32)
        x = rng.choice([-127.0, 127.0], (rows, columns)).astype(np.float32)
        x[0], x[1] = 127, -127
        whole, scales, _ = quantised(x, block_size)
        assert (scales == 1).all()
        assert np.array_equal(whole, x)
        arrays = {"weight": weight.packed, "scale": weight.packed_scales, "zero_point": weight.packed_zeros}
        y = np.full((rows, outputs), np.nan, np.float32)
        calls.append(
            Call("linear", Case(kind, rows, columns, outputs, block_size).numbers, {**arrays, "x": x, "y": y}, isa)
        )
        results.append((x.astype(np.int64) @ weight.whole.T).astype(np.float32))
    return calls, results


@pytest.mark.parametrize("rows", [7, 31])
def test_integer_sums_are_exact_at_their_largest(isa, rows):
    calls, results = largest_sums(isa, rows)
    run_here(calls)
    for call, result in zip(calls, results, strict=True):
        assert np.array_equal(call.results, result)


@pytest.mark.parametrize("times", [1, 10])
def test_zeros_stay_zeros_and_extremes_finite(isa, times):
    task = Problem(Case("int4", 3 * times, 64, 16, 32))
    call = task.call(isa)
    rows = [np.zeros(64), np.full(64, 1e-42), np.full(64, 1e30)]
    call.arrays["x"] = np.stack(rows * times).astype(np.float32)
    run_here([call])
    assert (call.results[::3] == 0).all()
    assert np.isfinite(call.results).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("rows", [8, 30])
def test_what_is_not_a_number_spoils_its_row_alone(isa, rows, form):
    task = Problem(Case(**form, rows=rows, columns=100, outputs=16))
    clean, spoilt = task.call(isa), task.call(isa)
    spoilt.arrays["x"] = task.x.copy()
    spoilt.arrays["x"][[1, 4, 6], [0, 99, 50]] = np.nan, np.inf, np.nan
    run_here([clean, spoilt])
    for row in range(rows):
        if row in {1, 4, 6}:
            assert not np.isfinite(spoilt.results[row]).any()
        else:
            assert np.array_equal(spoilt.results[row], clean.results[row])


def test_residual_in_place(isa):
    task = Problem(Case("int8", 9, 100, 40, residual=True))
    apart, together = task.call(isa), task.call(isa)
    del together.arrays["residual"]
    together.arrays["y"] = task.residual
    together.aliases = {"residual": "y"}
    run_here([apart, together])
    assert np.array_equal(apart.results, together.results)


EXPERTS = [*FORMATS, {"kind": "int4", "block_size": 64, "activation": "silu", "gated": True, "bias": True}]
EXPERTS += [{"kind": "float32", "activation": "clamped_swiglu", "gated": True, "bias": True, "limit": 2.5}]


def expert_calls(isa: str) -> tuple[list[Call], list[Callable[[], np.ndarray]]]:
    """Calls of every format, first each expert's own matrix, then chosen ones; and what each gives, once all have run.

    Picks beyond the last give the last; every row has the bits of a call with its own matrix.
    """
    rng = np.random.default_rng(3)
    experts, tokens, top_k, columns, outputs = 5, 23, 3, 100, 40
    calls, results = [], []
    for form in EXPERTS:
        tasks = [Problem(Case(**form, rows=tokens, columns=columns, outputs=outputs), seed) for seed in range(experts)]
        picks = rng.integers(0, experts, (tokens, top_k))
        picks[: tokens // 2] = 1  # most rows are of one matrix
        picks[picks == 3] = 2  # nobody's
        asked = picks.copy()
        asked[asked == experts - 1] = experts + 7
        asked[asked == 0] = -1
        alone = [task.call(isa) for task in tasks]
        for call in alone:
            call.arrays["x"] = tasks[0].x
        parts = [name for name in ("weight", "scale", "zero_point", "bias") if alone[0].arrays[name] is not None]
        arrays = {name: np.stack([call.arrays[name] for call in alone]) for name in parts}
        y = np.full((tokens * top_k, outputs), np.nan, np.float32)
        numbers = {**alone[0].numbers, "num_rows": tokens * top_k, "num_experts": experts, "num_x_rows": tokens}
        arrays |= {"x": tasks[0].x, "picks": asked.reshape(-1), "y": y}

        def chosen(alone: list[Call] = alone, picks: np.ndarray = picks) -> np.ndarray:
            return np.stack([alone[pick].results[row // top_k] for row, pick in enumerate(picks.reshape(-1))])

        calls += [*alone, *(Call("linear", numbers, arrays, isa, threads) for threads in (1, 2, 5))]
        results += [*(lambda call=call: call.results for call in alone), chosen, chosen, chosen]
    return calls, results


def test_experts_are_the_matmuls_of_their_matrices(isa):
    calls, results = expert_calls(isa)
    run_here(calls)
    for call, result in zip(calls, results, strict=True):
        assert np.array_equal(call.results, result())


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("tokens", "outputs", "threads"), [(1, 40, 1), (23, 41, 2), (300, 64, 3)])
def test_weighted_sums_of_experts(tokens, outputs, threads, has_residual, isa):
    rng = np.random.default_rng(5)
    experts, top_k, columns = 5, 3, 36
    tasks = [Problem(Case("float32", tokens, columns, outputs), seed) for seed in range(experts)]
    picks = rng.integers(0, experts, (tokens, top_k))
    weights = rng.random((tokens, top_k)).astype(np.float32)
    residual = rng.standard_normal((tokens, outputs)).astype(np.float32) if has_residual else None
    rows = np.stack([tasks[0].x.astype(np.float64) @ task.weights[0].values.T for task in tasks])
    want = (rows[picks, np.arange(tokens)[:, None]] * weights[..., None]).sum(axis=1)
    want = want if residual is None else want + residual
    numbers = {**tasks[0].case.numbers, "num_rows": tokens * top_k, "num_experts": experts}
    numbers |= {"num_x_rows": tokens, "num_sums": tokens}
    packed = np.stack([task.call(isa).arrays["weight"] for task in tasks])
    y = np.full((tokens, outputs), np.nan, np.float32)
    arrays = {"weight": packed, "x": tasks[0].x, "picks": picks.reshape(-1), "y": y}
    arrays |= {"pick_weights": weights.reshape(-1), "residual": residual}
    call = Call("linear", numbers, arrays, isa, threads)
    run_here([call])
    assert error(call.results, want) < 1e-6


@pytest.mark.parametrize("outputs", [32, 41])
def test_clamped_gates(outputs, isa):
    case = Case("float32", 7, 36, outputs, bias=True, activation="clamped_swiglu", gated=True, limit=2.5)
    task = Problem(case)
    call = task.call(isa)
    run_here([call])
    assert error(call.results, task.plain()) < 1e-6


def row_calls() -> tuple[list[Call], list[np.ndarray]]:
    """Rows of a table of every format, and what they are."""
    rng = np.random.default_rng(4)
    calls, results = [], []
    for form in FORMATS:
        table = random_weight(
            rng,
            form["kind"],
            50,
            101,
            form.get("block_size", 0),
            form.get("has_zeros", False),
            np.float16 if form.get("has_half_scales") else np.float32,
        )
        ids = np.concatenate([rng.integers(0, 50, 30), [-5, 50, 1 << 40]])
        numbers = {
            "num_ids": len(ids),
            "num_rows": 50,
            "row_length": 101,
            "weight_type": WEIGHT_TYPES.index(table.kind),
            "block_size": table.block_size,
            "scale_type": int(form.get("has_half_scales", False)),
        }
        arrays = {"weight": table.packed, "scale": table.packed_scales, "zero_point": table.packed_zeros}
        y = np.full((len(ids), 101), np.nan, np.float32)
        calls.append(Call("rows", numbers, {**arrays, "ids": ids, "y": y}, "portable", threads=3))
        results.append(table.values[np.clip(ids, 0, 49)].astype(np.float32))
    return calls, results


def test_rows_of_a_table():
    calls, results = row_calls()
    run_here(calls)
    for call, result in zip(calls, results, strict=True):
        assert np.array_equal(call.results, result)


REFUSED = [
    ({"num_rows": 0}, "num_rows: received 0, expected 1 .. 16777216"),
    ({"num_inputs": -3}, "num_inputs: received -3, expected 1 .. 16777216"),
    ({"num_outputs": 1 << 25}, "num_outputs: received 33554432, expected 1 .. 16777216"),
    ({"weight_type": 4}, "weight_type: received 4, expected 0 (float32), 1 (bfloat16), 2 (int8) or 3 (int4)"),
    ({"scale_type": 2}, "scale_type: received 2, expected 0 (float32) or 1 (float16)"),
    ({"block_size": 16}, "block_size: received 16, expected 32, 64 or 128"),
    ({"weight_type": 2, "block_size": 16}, "block_size: received 16, expected 0 (a scale an output), 32, 64 or 128"),
    ({"weight_type": 0}, "block_size: received 32, expected 0 with weights that are not integers"),
    (
        {"weight_type": 0, "block_size": 0},
        "scale: received a pointer, expected null with weights that are not integers",
    ),
    ({"activation": 6}, "activation: received 6, expected 0 (none) .. 5 (clamped_swiglu)"),
    ({"activation": 5}, "activation: received clamped_swiglu without gates, expected gates and ups"),
    ({"activation_limit": -1.0}, "activation_limit: received -1, expected a number from 0 on"),
    ({"num_experts": 2, "num_x_rows": 3, "num_sums": 2}, "num_sums: received 2, expected 0 or a number that divides"),
    ({"num_experts": 2, "num_x_rows": 3, "num_sums": 1}, "pick_weights, num_sums: received one of them, expected both"),
    ({"pick_weights": 1 << 40}, "pick_weights: received without experts or with output_norm_weight"),
    ({"norm_epsilon": float("nan")}, "norm_epsilon: received nan, expected a number from 0 on"),
    ({"multiplier": float("inf")}, "multiplier: received inf, expected a finite number"),
    ({"output_norm_epsilon": -1.0}, "output_norm_epsilon: received -1, expected a number from 0 on"),
    ({"norm_bias": 5 << 30}, "norm_bias: received a pointer, expected null without a layer norm"),
    (
        {"residual": 4 << 30, "output_norm_weight": 5 << 30},
        "y: is residual's memory, expected memory of its own with output_norm_weight",
    ),
    ({"num_experts": -1}, "num_experts: received -1, expected 0 (one matrix) .. 4096"),
    ({"num_experts": 2, "num_x_rows": 2}, "num_x_rows: received 2, expected a number that divides the 3 rows of y"),
    ({"num_experts": 2, "num_x_rows": 3}, "picks: received null, expected a pointer"),
    ({"x": 0}, "x: received null, expected a pointer"),
    ({"weight": 0}, "weight: received null, expected a pointer"),
    ({"scale": 0}, "scale: received null, expected a pointer"),
    ({"weight": (1 << 40) + 32}, "weight: received 0x10000000020, expected a multiple of 64"),
    ({"weight_type": 2, "zero_point": 1 << 40}, "zero_point: received a pointer, expected null with weights"),
    ({"y": (1 << 30) + 4}, "y: overlaps x, expected memory of its own"),
    ({"residual": (4 << 30) + 4}, "y: overlaps a part of residual, expected all of its memory or none"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_is_refused_and_why(changes, expected):
    numbers = {**Case("int4", 3, 64, 16, 32).numbers, "x": 1 << 30, "weight": 2 << 30, "scale": 3 << 30, "y": 4 << 30}
    assert problem(Call("linear", numbers, {}, "portable")) is None
    refusal = problem(Call("linear", {**numbers, **changes}, {}, "portable"))
    assert refusal is not None
    assert refusal.startswith(expected)


def test_cases_cover_every_format_and_size():
    found = cases()
    assert {case.rows for case in found} == set(ROWS)
    assert {(case.columns, case.outputs) for case in found} == set(SIZES)
    assert len({dataclasses.replace(case, rows=1, columns=1, outputs=1) for case in found}) >= len(FORMATS) * len(FUSED)
