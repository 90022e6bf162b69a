"""The INT8 window: both forms of the operator against the float64 oracle, rows that are hard to round, bundles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common
from sinkexport.config import ExportConfig
from sinkexport.graph.convert import convert
from sinkexport.graph.graph_pass import PassContext, run_passes
from sinkexport.model.attention import sink_attention, stream_angles
from sinkexport.model.int8_rows import dequantized, quantized
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import load_recipe
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.sources import LoadedModel
from sinkexport.targets import ONNX
from sinkrt import Session, UsageError
from sinkrt.ring import Ring, phase_frequency

from tests.exporter.pipeline.test_families import exported
from tests.exporter.tiny_models import tiny_model
from tests.reference.oracle import Int8Row, SinkAttentionOracle
from tests.support import export_model, random_ids, run_cli

Arrays = list[np.ndarray]
Run = Callable[[Arrays, np.ndarray, Arrays, np.ndarray | None], tuple[np.ndarray, Arrays]]


@dataclasses.dataclass(frozen=True)
class Case:
    """B, Hq, Hkv, D, dimensions that turn, S, W. affine: whether weights are scaled and shifted, with constants."""

    batch: int
    num_q: int
    num_kv: int
    dim: int
    rotary_dim: int
    num_sinks: int
    window: int
    softcap: float = 0.0
    interleaved: bool = False
    affine: bool = False

    @property
    def pairs(self) -> np.ndarray | None:
        """Scale and bias of each head, [B, Hq, 2]; weights of either sign."""
        if not self.affine:
            return None
        pairs = np.stack((np.linspace(-1.5, 2, self.num_q), np.linspace(1, -3, self.num_q)), axis=1)
        return np.broadcast_to(pairs.astype(np.float32), (self.batch, *pairs.shape))

    @property
    def inv_freq(self) -> np.ndarray:
        return 10000.0 ** (-np.arange(0, self.rotary_dim, 2) / max(self.rotary_dim, 1))

    def oracle(self, kv: str = "int8") -> SinkAttentionOracle:
        return SinkAttentionOracle(
            batch=self.batch,
            num_sink_tokens=self.num_sinks,
            window_size=self.window,
            inv_freq=self.inv_freq,
            interleaved=self.interleaved,
            softcap=self.softcap,
            kv=kv,
        )

    def states(self, dtype: np.dtype | type = np.float32) -> Arrays:
        """Sinks (if any), window and scales before the first token."""
        heads = (self.batch, self.num_kv)
        sinks = [np.zeros((*heads, self.num_sinks, self.dim), dtype) for _ in range(2 * bool(self.num_sinks))]
        window = [np.zeros((*heads, self.window, self.dim), np.int8) for _ in range(2)]
        return [*sinks, *window, *(np.zeros((*heads, self.window), np.float16) for _ in range(2))]

    def tokens(self, random: np.random.Generator, num_tokens: int) -> Arrays:
        """q [B, Hq, T, D], k and v [B, Hkv, T, D]; rows of very different sizes."""
        shapes = [(self.batch, heads, num_tokens, self.dim) for heads in (self.num_q, self.num_kv, self.num_kv)]
        q, k, v = (random.standard_normal(shape) for shape in shapes)
        sizes = 2.0 ** random.integers(-3, 4, (2, *k.shape[:3], 1))
        return [x.astype(np.float32) for x in (2 * q, k * np.minimum(sizes[0], 2.0), v * sizes[1])]


class Operator(torch.nn.Module):
    """Rotation and sink attention of one layer with an INT8 window."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("frequency", torch.tensor([phase_frequency(float(f)) for f in case.inv_freq]).long())
        for i, name in enumerate(("affine_scale", "affine_bias")):
            values = None if case.pairs is None else torch.from_numpy(case.pairs[:1, :, i, None].copy())
            self.register_buffer(name, values)

    def forward(self, q, k, v, position, states, num_valid=None):
        case, dim = self.case, self.case.rotary_dim
        angles = (None, None)
        if dim:
            cos_sin = stream_angles(position, self.frequency, q.shape[2], 0)
            q, k = (
                torch.onnx.ops.rotary_embedding(
                    x,
                    *(c.to(x.dtype) for c in cos_sin),
                    interleaved=case.interleaved,
                    rotary_embedding_dim=dim if dim < case.dim else 0,
                )
                for x in (q, k)
            )
            behind = case.num_sinks + case.window - 1
            angles = tuple(c.to(q.dtype) for c in stream_angles(position, self.frequency, q.shape[2], behind))
        sinks = states[:2] if case.num_sinks else [None, None]
        out, sink_k, sink_v, *window, _ = sink_attention(
            q,
            k,
            v,
            *sinks,
            *states[-4:-2],
            position,
            *(angles if case.num_sinks else (None, None)),
            num_valid,
            case.dim**-0.5,
            case.softcap,
            case.interleaved,
            *states[-2:],
            affine_scale=self.affine_scale,
            affine_bias=self.affine_bias,
        )
        return [out, *([sink_k, sink_v] if case.num_sinks else []), *window]


def torch_form(case: Case, num_tokens: int) -> Run:
    operator = Operator(case)

    def run(tokens: Arrays, position: np.ndarray, states: Arrays, counts: np.ndarray | None) -> tuple:
        valid = None if num_tokens == 1 else torch.from_numpy(counts)
        with torch.no_grad():
            out, *after = operator(
                *map(torch.from_numpy, tokens), torch.from_numpy(position), [torch.from_numpy(s) for s in states], valid
            )
        return out.numpy(), [state.numpy() for state in after]

    return run


@functools.cache
def onnx_form(case: Case, num_tokens: int, dtype: np.dtype | type = np.float32) -> Run:
    """The operator as ONNX Runtime runs it, each state's input and output being one buffer."""
    tokens = [torch.from_numpy(x.astype(dtype)) for x in case.tokens(np.random.default_rng(0), num_tokens)]
    valid = [] if num_tokens == 1 else [torch.ones(case.batch, dtype=torch.int64)]
    states = [torch.from_numpy(state) for state in case.states(dtype)]
    arguments = (*tokens, torch.zeros(case.batch, dtype=torch.int64), states, *valid)
    model = convert(torch.export.export(Operator(case), arguments, strict=False))
    run_passes(model, ("fold_constants", "expand_attention"), PassContext(ONNX))
    common.NameFixPass()(model)
    assert all(node.domain == "" for node in model.graph)
    model.ir_version = ONNX.ir_version
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def run(tokens: Arrays, position: np.ndarray, states: Arrays, counts: np.ndarray | None) -> tuple:
        binding = session.io_binding()
        own = [state.copy() for state in states]
        arrays = [*(x.astype(dtype) for x in tokens), position, *own, *([] if num_tokens == 1 else [counts])]
        for name, array in zip(inputs, arrays, strict=True):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_output(outputs[0])
        for name, array in zip(outputs[1:], own, strict=True):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy(), own

    return run


def assert_stored_as_defined(case: Case, oracle: SinkAttentionOracle, states: Arrays, positions: np.ndarray) -> None:
    """Each row of the window is the right token's, rounded once: no entry more than half a unit (and float32) off."""
    ring = Ring(case.num_sinks, case.window)
    for stream, t in enumerate(positions):
        for slot in range(case.window):
            token = ring.token_in_slot(slot, int(t)) if t >= 0 else None
            if token is None:
                continue
            kept = oracle.streams[stream][token]
            exact = oracle.rotated(kept.k, token), kept.v
            for x, row, entries, scale in zip(
                exact, (kept.k_in_window, kept.v_in_window), states[-4:-2], states[-2:], strict=True
            ):
                stored, factor = entries[stream, :, slot], scale[stream, :, slot].astype(np.float64)
                np.testing.assert_allclose(factor, row.scale, rtol=2.0**-10)  # at most the next float16
                assert (factor == row.scale).mean() >= 0.5
                assert np.abs(stored - x / factor[:, None]).max() <= 0.5 + 1e-3
                assert np.abs(stored).max() <= 127


CASES = [
    Case(1, 4, 4, 16, 16, 4, 9),
    Case(2, 6, 2, 8, 8, 3, 7),
    Case(1, 9, 3, 64, 64, 4, 12),
    Case(3, 4, 1, 16, 4, 1, 5),
    Case(1, 4, 2, 16, 0, 0, 6),
    Case(2, 4, 2, 16, 8, 2, 1, softcap=3.0, interleaved=True),
    Case(1, 5, 5, 20, 20, 0, 4, softcap=2.0),
    Case(2, 6, 2, 8, 8, 3, 7, affine=True),
    Case(1, 3, 3, 16, 16, 2, 5, affine=True),
]
FORMS = pytest.mark.parametrize("form", [torch_form, onnx_form], ids=["torch", "onnx"])
TOLERANCE = {torch_form: 3e-5, onnx_form: 2e-4}
"""Largest errors of outputs of up to 25; an entry of the window that is rounded the wrong way costs 0.01 and more."""


@pytest.mark.parametrize("case", CASES, ids=str)
@FORMS
def test_steps_against_oracle(case: Case, form: Callable) -> None:
    oracle, plain, states, step = case.oracle(), case.oracle("fp"), case.states(), form(case, 1)
    random, gap = np.random.default_rng(7), 0.0
    for t in range(3 * (case.num_sinks + case.window) + 7):
        tokens, positions = case.tokens(random, 1), np.full(case.batch, t)
        want, exact = (o.step(*(x[:, :, 0] for x in tokens), affine=case.pairs) for o in (oracle, plain))
        gap = max(gap, np.abs(want - exact).max())
        out, states = step(tokens, positions, states, None)
        np.testing.assert_allclose(out[:, :, 0], want, atol=TOLERANCE[form], err_msg=f"t = {t}")
        assert_stored_as_defined(case, oracle, states, positions)
    assert gap > 100 * TOLERANCE[form]  # rounding shows: a window in floating point would not pass


CHUNKS = [
    *((case, min(case.window, 5)) for case in CASES if case.window > 1),
    (Case(2, 4, 2, 8, 8, 5, 6), 2),
    (Case(3, 2, 2, 8, 8, 1, 16), 16),
    (Case(2, 2, 1, 8, 8, 13, 5, interleaved=True), 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "num_tokens"), CHUNKS, ids=str)
@FORMS
def test_pieces_of_any_length_store_the_very_same_bits(case: Case, num_tokens: int, form: Callable) -> None:
    """Each stream takes 0 .. T tokens a chunk; a second one takes them one by one and must hold the same bytes."""
    oracle, chunk, step = case.oracle(), form(case, num_tokens), form(case, 1)
    states, one_by_one = case.states(), case.states()
    random, position = np.random.default_rng(3), np.zeros(case.batch, dtype=np.int64)
    while position.min() < 4 * case.window + case.num_sinks + 7:
        counts = random.integers(0, num_tokens + 1, case.batch)
        counts[0] = max(counts[0], 1)
        tokens = case.tokens(random, num_tokens)
        before = states
        out, states = chunk(tokens, position, states, counts)
        singles = np.zeros_like(out)
        for i in range(counts.max()):
            was = one_by_one
            single, one_by_one = step([x[:, :, i : i + 1].copy() for x in tokens], position + i, one_by_one, None)
            singles[:, :, i : i + 1] = single
            idle = np.flatnonzero(counts <= i)
            one_by_one = [new.copy() for new in one_by_one]
            for new, old in zip(one_by_one, was, strict=True):
                new[idle] = old[idle]
        for b in range(case.batch):
            for i in range(counts[b]):
                affine = None if case.pairs is None else case.pairs[b]
                want = oracle.step_stream(b, *(x[b, :, i] for x in tokens), affine=affine)
                at = f"stream {b}, t = {position[b]} + {i}"
                np.testing.assert_allclose(out[b, :, i], want, atol=TOLERANCE[onnx_form], err_msg=at)
                np.testing.assert_allclose(singles[b, :, i], want, atol=TOLERANCE[form], err_msg=at)
            if not counts[b]:
                assert all(np.array_equal(old[b], new[b]) for old, new in zip(before, states, strict=True))
        position = position + counts
        for got, wanted in zip(states, one_by_one, strict=True):
            assert got.tobytes() == wanted.tobytes()
    assert_stored_as_defined(case, oracle, states, position - 1)


HARD_ROWS = {
    "zeros": np.zeros(8),
    "smallest scale": np.full(8, 1e-6),
    "subnormal": np.full(8, 1e-41),
    "below the smallest scale": np.linspace(-9e-4, 9e-4, 8),
    "halves": np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]),
    "a scale that float16 rounds down": np.array([-127 * 1.00048, 127 * 1.00048, 1, 2, 3, 4, 5, 6]),
    "larger than float16": np.array([8.0e6, -8.0e6, 1e5, 1, 0, -1e5, 4e6, -4e6]),
    "clipped": np.array([1e9, -1e9, 1e6, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", HARD_ROWS)
@FORMS
def test_rows_that_are_hard_to_round(name: str, form: Callable) -> None:
    row = HARD_ROWS[name].astype(np.float32)
    want = Int8Row.of(row[None].astype(np.float64))
    case = Case(1, 1, 1, 8, 0, 0, 3)
    tokens = [np.ones((1, 1, 1, 8), np.float32), row.reshape(1, 1, 1, 8), row.reshape(1, 1, 1, 8)]
    out, states = form(case, 1)(tokens, np.zeros(1, dtype=np.int64), case.states(), None)
    for entries, scale in zip(states[:2], states[2:], strict=True):
        np.testing.assert_array_equal(entries[0, 0, 0], want.entries[0])
        assert scale[0, 0, 0] == want.scale[0] >= 2.0**-17
    np.testing.assert_allclose(out[0, 0, 0], want.values[0], rtol=2e-4, atol=1e-4 * np.abs(want.values).max())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6.5, 6.0))
def test_no_entry_is_further_off_than_half_a_step(seed: int, exponent: float) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 16)) * 10.0**exponent
    entries, scale = quantized(torch.from_numpy(x.astype(np.float32)))
    assert entries.abs().max() <= 127
    back = dequantized(entries, scale, torch.float64).numpy()
    assert (np.abs(back - x) <= scale.double().numpy()[:, None] * 0.501).all()
    assert scale.double().numpy().max() <= max(np.abs(x).max() / 127 * (1 + 2.0**-8), 2.0**-17)


@pytest.mark.parametrize("rotary_dim", [0, 16])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_half_precision_operator(rotary_dim: int, num_tokens: int) -> None:
    case = Case(2, 6, 2, 16, rotary_dim, 3, 7)
    oracle, states = case.oracle(), case.states(np.float16)
    run, random = onnx_form(case, num_tokens, np.float16), np.random.default_rng(1)
    for t in range(0, 40, num_tokens):
        tokens = [x.astype(np.float16).astype(np.float32) for x in case.tokens(random, num_tokens)]
        want = np.stack([oracle.step(*(x[:, :, i] for x in tokens)) for i in range(num_tokens)], axis=2)
        out, states = run(tokens, np.full(2, t), states, np.full(2, num_tokens))
        np.testing.assert_allclose(out, want, atol=0.02 * np.abs(want).max(), err_msg=f"t = {t}")
        assert [state.dtype.name for state in states] == ["float16"] * 2 + ["int8"] * 2 + ["float16"] * 2
        if not rotary_dim:  # else keys are rotated in half precision first
            assert_stored_as_defined(case, oracle, states, np.full(2, t + num_tokens - 1))


# --- bundles ---

CONFIG = ExportConfig(num_sink_tokens=4, window_size=12, batch=2, kv="int8")


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3", "gpt_neox", "phi3-partial", "smollm3", "gemma2"])
def test_families(name: str, tmp_path: Path) -> None:
    """Against an implementation that shares nothing with the graphs but the phases; fp is much further away."""
    model = tiny_model(name)
    ids = random_ids(CONFIG.batch, CONFIG.capacity + 5 * CONFIG.window_size)
    session = exported(model, tmp_path / "bundle", CONFIG)
    got = np.stack([session.step(column).copy() for column in ids.T], axis=1)
    session.reset()
    prefilled = session.prefill(ids).copy()
    wanted = {}
    for kv in ("int8", "fp"):
        with chunked_streaming(model, CONFIG.num_sink_tokens, CONFIG.window_size, kv) as stream:
            wanted[kv] = stream.feed(torch.from_numpy(ids)).numpy()

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        """Median over tokens: a last bit of float32 may round an entry of the window the other way."""
        return float(np.median(np.abs(a - b).max(axis=-1)) / b.std())

    assert distance(got, wanted["int8"]) < 2e-3
    assert distance(got, wanted["fp"]) > 8 * distance(got, wanted["int8"])
    assert np.abs(prefilled - got[:, -1]).max() < 0.05 * got.std()


def test_copies_and_saves_carry_the_scales(tmp_path: Path) -> None:
    session = exported(tiny_model("llama"), tmp_path / "bundle", CONFIG)
    ids = random_ids(2, 60)
    session.prefill(ids[:, :33])
    copy = session.copy_stream(0)
    assert copy.states["window_k.0"].dtype == np.int8
    assert copy.states["window_v_scale.1"].shape == (2, 12)
    session.save_state(tmp_path / "state")
    want = [session.step(ids[:, t]).copy() for t in range(33, 60)]
    session.reset()
    session.load_state(tmp_path / "state")
    for t in range(33, 60):
        np.testing.assert_array_equal(session.step(ids[:, t]), want[t - 33])
    session.place_stream(1, copy)  # moves to the other stream
    for t in range(33, 60):
        got = session.step(np.array([5, ids[0, t]]))
        np.testing.assert_array_equal(got[1], want[t - 33][0])


@pytest.mark.slow
def test_a_state_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = exported(model, tmp_path / "fp", dataclasses.replace(CONFIG, kv="fp"))
    small = exported(model, tmp_path / "int8", CONFIG)
    plain.save_state(tmp_path / "state")
    with pytest.raises(Exception, match="state"):
        small.load_state(tmp_path / "state")
    with pytest.raises(UsageError, match="another bundle"):
        small.place_stream(0, plain.copy_stream(0))


def test_long_run_writes_in_place_and_stays_finite(tmp_path: Path) -> None:
    session = exported(tiny_model("llama"), tmp_path / "bundle", dataclasses.replace(CONFIG, batch=1))
    addresses = {name: array.ctypes.data for name, array in session.buffers.items()}
    ids = random_ids(1, 400)
    for t in range(400):
        before = session.buffers["window_k.0"].copy()
        assert np.isfinite(session.step(ids[:, t])).all()
        changed = np.flatnonzero((session.buffers["window_k.0"] != before).any(axis=(0, 1, 3)))
        assert set(changed.tolist()) <= {(t - 4) % 12}  # one slot; nothing is ever rounded again
    assert addresses == {name: array.ctypes.data for name, array in session.buffers.items()}


@pytest.mark.slow
def test_manifest_has_the_window(tmp_path: Path) -> None:
    loaded = LoadedModel(tiny_model("llama"), None, "tiny")
    recipe = load_recipe("int8-channel")
    for name, config, facts_expected in (
        ("window", CONFIG, ("int8-window", "float", "int8")),
        ("both", dataclasses.replace(CONFIG, recipe=recipe), ("int8-channel", "int8", "int8")),
        ("weights", dataclasses.replace(CONFIG, recipe=recipe, kv=None), ("int8-channel", "int8", "fp")),
        (
            "its own",
            dataclasses.replace(CONFIG, recipe=recipe.with_kv("int8"), kv=None),
            ("int8-channel", "int8", "int8"),
        ),
    ):
        facts = export_loaded(loaded, tmp_path / name, config).quantization
        assert facts is not None
        assert (facts.recipe, facts.weights, facts.kv) == facts_expected
    assert export_loaded(loaded, tmp_path / "none", dataclasses.replace(CONFIG, kv=None)).quantization is None


@pytest.mark.slow
def test_state_is_smaller_and_inspect_shows_it(tmp_path: Path) -> None:
    model = tiny_model("llama")  # 2 layers, 2 key heads of 16
    config = ExportConfig(num_sink_tokens=4, window_size=64, kv="int8")
    sizes = {}
    for kv in ("fp", "int8"):
        loaded = LoadedModel(model, None, "tiny")
        manifest = export_loaded(loaded, tmp_path / kv, dataclasses.replace(config, kv=kv))
        sizes[kv] = manifest.state_bytes
    rows = 2 * 2 * 2  # layers, keys and values, heads
    assert sizes["fp"] == rows * (4 + 64) * 16 * 4
    assert sizes["int8"] == rows * (4 * 16 * 4 + 64 * (16 + 2))
    shown = run_cli("inspect", tmp_path / "int8")
    shown.succeeded()
    assert "float16, int8" in next(line for line in shown.out.splitlines() if line.startswith("window"))
    assert "float32" in next(line for line in shown.out.splitlines() if line.startswith("sink"))


def test_step_makes_nothing_of_the_windows_size_in_floating_point(tmp_path: Path) -> None:
    export_model(tiny_model("llama"), tmp_path / "b", num_sink_tokens=4, window_size=64, kv="int8")
    model = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False)
    window = {f"window_{x}.{layer}.next" for x in "kv" for layer in range(2)}
    readers = [node for node in model.graph.node if window & set(node.input)]
    assert sorted(node.op_type for node in readers) == ["MatMulInteger"] * 2 + ["Transpose"] * 2
    onnx.checker.check_model(tmp_path / "b" / "decode.onnx", full_check=True)
    onnx.checker.check_model(tmp_path / "b" / "prefill.onnx", full_check=True)


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"fp \| int8"):
        ExportConfig(kv="int4")
    with pytest.raises(UsageError, match="window_size"):
        ExportConfig(window_size=2**18 + 1, kv="int8")
    result = run_cli("export", "nowhere", "-o", "x", "--kv", "int3")
    assert result.code == 2


@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_chunked_streaming_is_the_same_in_any_pieces(chunk: int) -> None:
    ids = torch.from_numpy(random_ids(2, 50))
    results = []
    for length in (chunk, 7):
        with chunked_streaming(tiny_model("llama"), 3, 8, "int8") as stream:
            results.append(torch.cat([stream.feed(piece) for piece in ids.split(length, dim=1)], dim=1))
    assert float(((results[0] - results[1]).abs().amax(dim=-1) / results[1].std()).median()) < 1e-4


def test_session_type(tmp_path: Path) -> None:
    session = exported(tiny_model("llama"), tmp_path / "bundle", dataclasses.replace(CONFIG, batch=1, chunk_size=1))
    assert isinstance(session, Session)
    kinds = [state.kind for state in session.manifest.states if state.layer == 1]
    assert kinds == ["sink_k", "sink_v", "window_k", "window_v", "window_k_scale", "window_v_scale"]
