"""The torch form of the operator and its expansion in standard ONNX operators against the float64 oracle."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from sinkexport.graph.build import IR_VERSION, OPSET, _convert
from sinkexport.graph.passes.constants import fold_small_constants
from sinkexport.graph.passes.expand_operators import expand_operators
from sinkexport.model.attention import sink_attention, stream_angles
from sinkrt.ring import phase_frequency

from tests.reference.oracle import SinkAttentionOracle


class Operator(torch.nn.Module):
    """Rotation and sink attention of one layer, as a model's attention function calls them."""

    def __init__(self, inv_freq: np.ndarray, capacity: int, scale: float, softcap: float, interleaved: bool) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.tensor([phase_frequency(float(f)) for f in inv_freq]))
        self.capacity, self.scale, self.softcap, self.interleaved = capacity, scale, softcap, interleaved

    def forward(self, q, k, v, position, states):
        dim = 2 * self.frequency.shape[0]
        partial = dim if dim < q.shape[-1] else 0
        cos, sin = stream_angles(position, self.frequency, 0)
        shift = stream_angles(position, self.frequency, self.capacity - 1)
        q, k = (
            torch.onnx.ops.rotary_embedding(x, cos, sin, interleaved=self.interleaved, rotary_embedding_dim=partial)
            for x in (q, k)
        )
        sinks = states[:2] if len(states) == 4 else [None, None]
        angles = shift if len(states) == 4 else (None, None)
        out = sink_attention(
            q, k, v, *sinks, *states[-2:], position, *angles, self.scale, self.softcap, self.interleaved
        )
        return [out[0], *(out[1:] if len(states) == 4 else out[3:])]


CASES = [
    # (B, Hq, Hkv, D, rotary_dim, S, W, softcap, interleaved)
    (1, 4, 4, 16, 16, 4, 9, 0.0, False),
    (2, 6, 2, 8, 8, 3, 7, 0.0, False),
    (1, 9, 3, 64, 64, 4, 12, 0.0, False),
    (3, 4, 1, 16, 4, 1, 5, 0.0, False),
    (1, 4, 2, 16, 16, 0, 6, 0.0, False),
    (2, 4, 2, 16, 8, 2, 1, 3.0, True),
    (1, 5, 5, 20, 20, 5, 4, 2.0, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_against_oracle(case: tuple, form: str) -> None:
    batch, num_q, num_kv, dim, rotary_dim, num_sinks, window, softcap, interleaved = case
    capacity, scale = num_sinks + window, dim**-0.5
    inv_freq = 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    oracle = SinkAttentionOracle(
        batch=batch, num_sink_tokens=num_sinks, window_size=window, inv_freq=inv_freq, interleaved=interleaved,
        scale=scale, softcap=softcap,
    )  # fmt: skip
    operator = Operator(inv_freq, capacity, scale, softcap, interleaved)
    shapes = [(batch, num_kv, num_sinks, dim)] * 2 * bool(num_sinks) + [(batch, num_kv, window, dim)] * 2
    states = [torch.zeros(shape) for shape in shapes]
    step = operator if form == "torch" else _onnx_step(operator, case, states)
    random = np.random.default_rng(7)
    for t in range(3 * capacity + 7):
        q, k, v = (
            2 * random.standard_normal((batch, heads, 1, dim)).astype(np.float32) for heads in (num_q, num_kv, num_kv)
        )
        want = oracle.step(q[:, :, 0], k[:, :, 0], v[:, :, 0])
        position = torch.full((batch,), t)
        with torch.no_grad():
            out, *states = step(*(torch.from_numpy(x) for x in (q, k, v)), position, states)
        np.testing.assert_allclose(np.asarray(out)[:, :, 0], want, atol=2e-5, err_msg=f"t = {t}")


def _onnx_step(operator: Operator, case: tuple, states: list[torch.Tensor]):
    batch, num_q, num_kv, dim, *_ = case
    q, k, v = torch.zeros(batch, num_q, 1, dim), torch.zeros(batch, num_kv, 1, dim), torch.zeros(batch, num_kv, 1, dim)
    program = torch.export.export(operator, (q, k, v, torch.zeros(batch, dtype=torch.int64), states), strict=False)
    model = _convert(program)
    fold_small_constants(model)
    expand_operators(model)
    common.NameFixPass()(model)
    assert all(node.domain == "" for node in model.graph)
    assert model.opset_imports == {"": OPSET}
    model.ir_version = IR_VERSION
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [value.name for value in session.get_inputs()]

    def step(q, k, v, position, states):
        feeds = dict(zip(names, (x.numpy() for x in (q, k, v, position, *states)), strict=True))
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return step
