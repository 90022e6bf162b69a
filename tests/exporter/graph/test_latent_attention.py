"""The operator over a latent cache, whose rows are keys and values at once, against the float64 oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from sinkexport.graph.convert import convert
from sinkexport.graph.graph_pass import PassContext, run_passes
from sinkexport.model.attention import sink_attention, stream_angles
from sinkexport.targets import ONNX, TENSORRT_NATIVE, Target
from sinkrt.ring import phase_frequency

from tests.reference.oracle import SinkAttentionOracle

Arrays = list[np.ndarray]
Run = Callable[[np.ndarray, np.ndarray, np.ndarray, Arrays, np.ndarray | None], tuple[np.ndarray, Arrays]]


@dataclasses.dataclass(frozen=True)
class Case:
    """B, H, rotary and latent part of a row, S, W."""

    batch: int
    num_heads: int
    rotary_dim: int
    latent_dim: int
    num_sinks: int
    window: int
    kv: str = "fp"
    softcap: float = 0.0
    interleaved: bool = False

    @property
    def row_dim(self) -> int:
        return self.rotary_dim + self.latent_dim

    @property
    def inv_freq(self) -> np.ndarray:
        return 10000.0 ** (-np.arange(0, self.rotary_dim, 2) / max(self.rotary_dim, 1))

    def oracle(self) -> SinkAttentionOracle:
        return SinkAttentionOracle(
            batch=self.batch,
            num_sink_tokens=self.num_sinks,
            window_size=self.window,
            inv_freq=self.inv_freq,
            interleaved=self.interleaved,
            scale=0.2,
            softcap=self.softcap,
            kv=self.kv,
            is_latent=True,
        )

    def states(self) -> Arrays:
        """Sinks (if any), window and its scales (if INT8) before the first token."""
        is_int8 = self.kv == "int8"
        rows = (self.batch, 1)
        sinks = [np.zeros((*rows, self.num_sinks, self.row_dim), np.float32)] if self.num_sinks else []
        window = np.zeros((*rows, self.window, self.row_dim), np.int8 if is_int8 else np.float32)
        return [*sinks, window, *(np.zeros((*rows, self.window), np.float16) for _ in range(2 * is_int8))]

    def tokens(self, random: np.random.Generator, num_tokens: int) -> Arrays:
        """q [B, H, T, R + L], row [B, 1, T, R + L]."""
        shapes = [(self.batch, heads, num_tokens, self.row_dim) for heads in (self.num_heads, 1)]
        q, row = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
        row[..., : self.rotary_dim] *= 3
        return [q, row]


class Operator(torch.nn.Module):
    """Rotation and attention of one layer with a latent cache."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("frequency", torch.tensor([phase_frequency(float(f)) for f in case.inv_freq]).long())

    def forward(self, q, row, position, states, num_valid=None):
        case, angles = self.case, (None, None)
        if case.rotary_dim:
            own = stream_angles(position, self.frequency, q.shape[2], 0)
            q, row = (
                torch.onnx.ops.rotary_embedding(
                    x, *own, interleaved=case.interleaved, rotary_embedding_dim=case.rotary_dim
                )
                for x in (q, row)
            )
            if case.num_sinks:
                angles = stream_angles(position, self.frequency, q.shape[2], case.num_sinks + case.window - 1)
        sink, (window, *scales) = (states[0], states[1:]) if case.num_sinks else (None, states)
        out, sink_k, _, window_k, _, *scales_after, _ = sink_attention(
            q,
            row,
            None,
            sink,
            None,
            window,
            None,
            position,
            *angles,
            num_valid,
            0.2,
            case.softcap,
            case.interleaved,
            *scales,
            latent_dim=case.latent_dim,
        )
        return [out, *([sink_k] if case.num_sinks else []), window_k, *(scales_after if scales else [])]


def torch_form(case: Case, _num_tokens: int) -> Run:
    operator = Operator(case)

    def run(q, row, position, states, counts):
        tensors = [torch.from_numpy(x) for x in (q, row, position)]
        valid = None if counts is None else torch.from_numpy(counts)
        with torch.no_grad():
            out, *after = operator(*tensors, [torch.from_numpy(x) for x in states], valid)
        return out.numpy(), [x.numpy() for x in after]

    return run


def onnx_form(target: Target, case: Case, num_tokens: int) -> Run:
    model = converted(target, case, num_tokens)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(q, row, position, states, counts):
        values = [q, row, position, *states, *([] if counts is None else [counts])]
        out, *after = session.run(None, dict(zip(names, values, strict=True)))
        return out, after

    return run


def converted(target: Target, case: Case, num_tokens: int) -> onnx.ModelProto:
    q, row = case.tokens(np.random.default_rng(0), num_tokens)
    position = torch.zeros(case.batch, dtype=torch.int64)
    valid = () if num_tokens == 1 else (torch.ones_like(position),)
    arguments = (torch.from_numpy(q), torch.from_numpy(row), position, [torch.from_numpy(x) for x in case.states()])
    with torch.no_grad():
        program = torch.export.export(Operator(case), (*arguments, *valid), strict=False)
    model = convert(program)
    run_passes(model, ("fold_constants", "expand_attention"), PassContext(target))
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return ir.to_proto(model)


CASES = [
    Case(1, 6, 4, 12, 2, 7),
    Case(3, 6, 4, 12, 3, 5, interleaved=True),
    Case(2, 3, 2, 6, 1, 4, softcap=3.0),  # few query heads: a matmul each
    Case(2, 8, 0, 10, 2, 6),  # no positions
    Case(2, 5, 6, 9, 0, 6),  # no sinks
    Case(2, 6, 4, 12, 2, 7, kv="int8"),
    Case(1, 3, 2, 6, 0, 5, kv="int8"),
]
FORMS = {
    "torch": torch_form,
    "onnx": lambda *a: onnx_form(ONNX, *a),
    "tensorrt-native": lambda *a: onnx_form(TENSORRT_NATIVE, *a),
}


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, id=f"{case}-{form}")
        for case in CASES
        for form in FORMS
        if (case.kv, form) != ("int8", "tensorrt-native")  # it has no INT8 window
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_against_oracle(case: Case, num_tokens: int, form: str) -> None:
    """Single tokens and chunks, some of them not counted, past three wraps of the window."""
    run, random, oracle = FORMS[form](case, num_tokens), np.random.default_rng(1), case.oracle()
    states, position = case.states(), np.zeros(case.batch, np.int64)
    while position.min() < case.num_sinks + 4 * case.window:
        q, row = case.tokens(random, num_tokens)
        counts = None if num_tokens == 1 else random.integers(0, num_tokens + 1, case.batch)
        out, states = run(q, row, position, states, counts)
        valid = np.ones(case.batch, np.int64) if counts is None else counts
        for stream, count in enumerate(valid):
            for i in range(count):
                latent = row[stream, :, i, case.rotary_dim :]
                wanted = oracle.step_stream(stream, q[stream, :, i], row[stream, :, i], latent)
                np.testing.assert_allclose(out[stream, :, i], wanted, rtol=0, atol=3e-5)
        position = position + valid


@pytest.mark.parametrize("kv", ["fp", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_window_is_written_once_and_never_copied(num_tokens: int, kv: str) -> None:
    """One TensorScatter a state; in a step nothing but it and matmuls makes or reads something of the window's size."""
    case = Case(1, 6, 4, 12, 2, 7, kv=kv)
    graph = converted(ONNX, case, num_tokens).graph
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert len(scatters) == len(case.states()) - 1
    if num_tokens == 1:
        (window,) = (node.output[0] for node in scatters if node.input[0] == graph.input[4].name)
        readers = [node.op_type for node in graph.node if window in node.input]
        assert (
            sorted(readers)
            == {
                "fp": ["MatMul", "MatMul"],
                "int8": ["MatMulInteger", "Transpose"],  # one byte an entry is turned, see int8_step.py
            }[kv]
        )
