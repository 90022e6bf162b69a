"""Runs a bundle of the plugin form without TensorRT: ONNX's reference evaluator, the plugins in NumPy.

SinkAttention is the float64 oracle, which keeps tokens of its own and knows nothing of rings; its states pass through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from sinkrt import Session
from sinkrt.contract import RECURRENT_KINDS, Manifest
from sinkrt.ring import TURN

from tests.plugins import int4_layout
from tests.reference.layers import gated_activation, rms_norm
from tests.reference.oracle import SinkAttentionOracle

DOMAIN = "ai.sinkexport"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class PluginBundle:
    """Steps and chunks of the bundle in `folder`, all streams at one position."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.position = 0
        self._oracles: dict[str, SinkAttentionOracle] = {}
        operators = [
            _attention(self._oracles, manifest),
            Int8Linear,
            Int4Linear,
            HalfLinear,
            Int8ExpertLinear,
            Int4ExpertLinear,
            HalfExpertLinear,
            Int8Rows,
            Int4Rows,
            RmsNorm,
            GatedActivation,
            QuantizeLinear,
            DequantizeLinear,
        ]
        self._graphs = {
            role: ReferenceEvaluator(onnx.load(folder / graph.file), new_ops=operators)
            for role, graph in manifest.graphs.items()
        }
        self._states = {state.input: np.zeros(state.shape, state.dtype) for state in manifest.states}

    def step(self, ids: np.ndarray) -> np.ndarray:
        """ids [B] -> logits [B, vocab]."""
        words = np.tile([self.position >> 16, self.position & 0xFFFF], (len(ids), 1)).astype(np.int32)
        logits = self._run("decode", {"ids": ids[:, None].astype(np.int32), "position": words})
        self.position += 1
        return logits

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """ids [N] of the only stream -> logits [1, vocab]."""
        chunk, logits = self.manifest.stream.chunk_size, None
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            words = np.array([[self.position >> 16, self.position & 0xFFFF]], np.int32)
            padded = np.pad(part, (0, chunk - len(part)))[None].astype(np.int32)
            count = np.array([len(part)], np.int32)
            logits = self._run("prefill", {"ids": padded, "position": words, "num_valid": count})
            self.position += len(part)
        assert logits is not None
        return logits

    def _run(self, role: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        recurrent = [state for state in self.manifest.states if state.kind in RECURRENT_KINDS]
        names = ["logits", *(state.output for state in recurrent)]
        logits, *after = self._graphs[role].run(names, {**inputs, **self._states})
        self._states.update({state.input: value for state, value in zip(recurrent, after, strict=True)})
        return logits


def errors_against(folder: Path, manifest: Manifest, reference: Path, vocab_size: int) -> np.ndarray:
    """Relative errors of the plugin bundle in `folder` against ONNX Runtime: chunks, then steps past two wraps."""
    ids = np.random.default_rng(1).integers(0, vocab_size, 34)
    under_test = PluginBundle(folder, manifest)
    with Session.load(reference) as session:
        pairs = [(under_test.prefill(ids[:10]), session.prefill(ids[None, :10]).copy())]
        pairs += [(under_test.step(ids[t : t + 1]), session.step(ids[t : t + 1]).copy()) for t in range(10, len(ids))]
    return np.array([np.linalg.norm(got - want) / np.linalg.norm(want) for got, want in pairs])


def _attention(oracles: dict[str, SinkAttentionOracle], manifest: Manifest) -> type[OpRun]:
    class SinkAttention(OpRun):
        op_domain = DOMAIN

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
            if not (width := attributes["packed_width"]):
                return self._unpacked(*inputs, **attributes)
            packed, _, window_k = inputs[:3]
            (batch, num_kv_heads, _, head_dim), kv_width = window_k.shape, window_k.shape[1] * window_k.shape[3]
            assert packed.shape == (batch, 1, width + 2 * kv_width)
            q = packed[..., :width].reshape(batch, -1, 1, head_dim)
            k, v = (
                packed[..., at : at + kv_width].reshape(batch, num_kv_heads, 1, head_dim)
                for at in (width, width + kv_width)
            )
            out, *states = self._unpacked(q, k, v, *inputs[1:], **attributes)
            return (out.reshape(batch, 1, width), *states)

        def _unpacked(self, q: Any, k: Any, v: Any, position: Any, *rest: Any, **attributes: Any) -> tuple[Any, ...]:
            num_states = 2 + 2 * attributes["int8_window"] + 2 * (attributes["num_sinks"] > 0)
            states, extras = rest[:num_states], list(rest[num_states:])
            frequency = extras.pop(0) if attributes["rotary_dim"] else np.zeros(0, np.int32)
            counts = extras.pop(0) if attributes["has_num_valid"] else np.full(len(q), q.shape[2])
            slopes, sink_logit, sink_scale, gate = (
                extras.pop(0) if attributes[f"has_{name}"] else None
                for name in ("alibi", "sink_logit", "sink_scale", "gate")
            )
            assert not extras
            for values in (slopes, sink_logit, sink_scale):
                assert values is None or (values.shape, values.dtype) == (q.shape[1:2], np.float32)
            assert gate is None or (gate.dtype == q.dtype and gate.shape in (q.shape, (*q.shape[:3], 1)))
            assert position.shape == (len(q), 2)
            assert frequency.size * 2 == attributes["rotary_dim"]
            layer = self.onnx_node.input[2 if attributes["packed_width"] else 4]
            if layer not in oracles:
                oracles[layer] = SinkAttentionOracle(
                    batch=len(q),
                    num_sink_tokens=attributes["num_sinks"],
                    window_size=states[0].shape[2],
                    inv_freq=frequency.view(np.uint32) * (2 * np.pi / TURN),
                    interleaved=bool(attributes["interleaved"]),
                    attention_scaling=attributes["rope_scaling"],
                    scale=attributes["scale"],
                    softcap=attributes["softcap"],
                    kv="int8" if attributes["int8_window"] else "fp",
                    alibi_slopes=slopes,
                    sink_logit=sink_logit,
                    sink_scale=sink_scale,
                )
            out = np.zeros_like(q)
            for stream, count in enumerate(counts):
                for i in range(count):
                    out[stream, :, i] = oracles[layer].step_stream(
                        stream,
                        q[stream, :, i],
                        k[stream, :, i],
                        v[stream, :, i],
                        None if gate is None else gate[stream, :, i],
                    )
            return (out, *states)

    return SinkAttention


def _linear(x: np.ndarray, rows: np.ndarray, rest: list[Any], attributes: dict[str, Any]) -> tuple[np.ndarray]:
    """What matmuls of all weights have in common. rows: float64 [N, K]; rest: inputs after the weights, all taken."""
    assert x.dtype == np.float16
    assert rows.shape == (attributes["num_outputs"], x.shape[-1])
    taken = x.astype(np.float64)
    if attributes["norm"]:
        weight = rest.pop(0)
        assert (weight.dtype, weight.shape) == ((np.float16, np.float32)[attributes["norm"] - 1], x.shape[-1:])
        taken = normalised(x, weight, attributes["norm_epsilon"]).astype(np.float64)
    else:
        assert attributes["norm_epsilon"] == 0.0
    y = taken @ rows.T
    if attributes["has_bias"]:
        bias = rest.pop(0)
        assert (bias.dtype, bias.shape) == (x.dtype, y.shape[-1:])
        y = y + bias
    if attributes["has_residual"]:
        residual = rest.pop(0)
        assert (residual.dtype, residual.shape, attributes["gate"]) == (x.dtype, y.shape, 0)
        y = y + residual
    assert not rest
    if attributes["gate"]:
        width = attributes["num_outputs"] // 2
        assert width % 16 == 0
        y = gated_activation(y[..., :width], y[..., width:], ACTIVATIONS[attributes["gate"] - 1])
    return (y.astype(x.dtype),)


class Int8Linear(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, scale: Any, *more: Any, **attributes: Any) -> tuple[Any]:
        assert weight.shape == (attributes["num_outputs"], x.shape[-1] // 4)
        return _linear(x, weight.view(np.int8).astype(np.float64) * scale[:, None], list(more), attributes)


def _int4(
    weight: np.ndarray, scale: np.ndarray, rest: list[Any], attributes: dict[str, Any], shape: tuple[int, int]
) -> np.ndarray:
    """float64 [.., N, K] of INT4 weights; takes the zero points out of `rest` if there are any."""
    zeros = rest.pop(0) if attributes["has_zero_points"] else None
    assert (weight.dtype, scale.dtype) == (np.int32, np.float16)
    parts = [torch.from_numpy(np.array(part).view(np.uint8)) for part in (weight, *([] if zeros is None else [zeros]))]
    scales = torch.from_numpy(np.array(scale))
    return int4_layout.dense(parts[0], scales, *(parts[1:] or [None]), shape, attributes["block_size"]).numpy()


class Int4Linear(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, scale: Any, *more: Any, **attributes: Any) -> tuple[Any]:
        rest = list(more)
        rows = _int4(weight, scale, rest, attributes, (attributes["num_outputs"], x.shape[-1]))
        return _linear(x, rows, rest, attributes)


class HalfLinear(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, *more: Any, **attributes: Any) -> tuple[Any]:
        assert weight.dtype == np.float16
        return _linear(x, weight.astype(np.float64), list(more), attributes)


def _by_experts(x: np.ndarray, matrices: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """x [R, K], matrices [E, N, K], picks [P] -> [P, N], float64."""
    assert x.dtype == np.float16
    assert picks.dtype == np.int32
    assert len(picks) % len(x) == 0
    rows = np.repeat(x.astype(np.float64), len(picks) // len(x), axis=0)
    return np.stack([matrices[pick].astype(np.float64) @ row for pick, row in zip(picks, rows, strict=True)])


class HalfExpertLinear(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, picks: Any, **attributes: Any) -> tuple[Any]:
        assert weight.shape[1:] == (attributes["num_outputs"], x.shape[1])
        assert weight.dtype == np.float16
        return (_by_experts(x, weight, picks).astype(np.float16),)


class Int8ExpertLinear(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, scale: Any, picks: Any, **attributes: Any) -> tuple[Any]:
        assert weight.shape == (*scale.shape, x.shape[1] // 4)
        assert scale.shape[1] == attributes["num_outputs"]
        assert (weight.dtype, scale.dtype) == (np.int32, np.float32)
        return ((_by_experts(x, weight.view(np.int8), picks) * scale[picks]).astype(np.float16),)


class Int4ExpertLinear(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, scale: Any, *more: Any, **attributes: Any) -> tuple[Any]:
        rest = list(more)
        matrices = _int4(weight, scale, rest, attributes, (attributes["num_outputs"], x.shape[1]))
        (picks,) = rest
        return (_by_experts(x, matrices, picks).astype(np.float16),)


class Int4Rows(OpRun):
    op_domain = DOMAIN

    def _run(self, ids: Any, table: Any, scale: Any, *more: Any, **attributes: Any) -> tuple[Any]:
        rest = list(more)
        rows = _int4(table, scale, rest, attributes, (attributes["num_rows"], attributes["row_length"]))
        assert not rest
        return (rows[ids].astype(np.float16),)


class Int8Rows(OpRun):
    op_domain = DOMAIN

    def _run(self, ids: Any, table: Any, scale: Any, **attributes: Any) -> tuple[Any]:
        assert table.shape[1] * 4 == attributes["row_length"]
        return ((table[ids].view(np.int8).astype(np.float64) * scale[ids][..., None]).astype(np.float16),)


def normalised(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """A norm of float16 rows, rounded before it is multiplied by weights of float16, else once."""
    normal = rms_norm(x, np.ones(1), epsilon)
    if weight.dtype == np.float16:
        normal = normal.astype(np.float16).astype(np.float64)
    return (normal * weight).astype(np.float16)


class RmsNorm(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Any, weight: Any, residual: Any = None, **attributes: Any) -> tuple[Any, ...]:
        assert (residual is not None) == attributes["has_residual"]
        assert weight.dtype == (np.float32 if attributes["float_weight"] else np.float16)
        assert weight.shape == x.shape[-1:]
        total = x if residual is None else (x.astype(np.float64) + residual).astype(np.float16)
        out = normalised(total, weight, attributes["epsilon"])
        return (out,) if residual is None else (out, total)


class GatedActivation(OpRun):
    op_domain = DOMAIN

    def _run(self, gate: Any, up: Any = None, **attributes: Any) -> tuple[Any]:
        width = attributes["width"]
        assert gate.shape[-1] == (2 * width if attributes["is_merged"] else width)
        if attributes["is_merged"]:
            assert up is None
            gate, up = gate[..., :width], gate[..., width:]
        kind = ACTIVATIONS[attributes["activation"]]
        return (gated_activation(gate, up, kind).astype(np.float16),)


# ONNX's evaluator has the next two from opset 19 on.


class QuantizeLinear(OpRun):
    def _run(self, x: Any, scale: Any, zero: Any, **_: Any) -> tuple[Any]:
        assert (x.dtype, scale.dtype, zero.dtype) == (np.float32, np.float32, np.int8)
        return (np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8),)


class DequantizeLinear(OpRun):
    def _run(self, x: Any, scale: Any, zero: Any, axis: int | None = None, **_: Any) -> tuple[Any]:
        assert (scale.dtype, zero.dtype, scale.shape) == (np.float32, np.int8, zero.shape)
        assert not zero.any()
        along = [-1 if i == (1 if axis is None else axis) else 1 for i in range(x.ndim)]
        return (x.astype(np.float32) * (scale.reshape(along) if scale.ndim else scale),)
