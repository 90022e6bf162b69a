"""Streams on a GPU: all buffers of a launch, poisoned and guarded, fed token by token or in chunks."""

from __future__ import annotations

import dataclasses

import torch

from plugins.capi.header import DTYPES
from plugins.capi.kernels import SinkAttention, SinkAttentionParams, StreamAngles, StreamAnglesParams
from tests.plugins.gpu_buffers import Buffer
from tests.plugins.sink_attention_reference import Case, Tokens


@dataclasses.dataclass
class Streams:
    """One layer's states and buffers for runs of T = num_tokens tokens.

    is_packed: q, k and v are one array. is_settled: steps may read states before earlier kernels have ended.
    """

    library: SinkAttention
    case: Case
    tokens: Tokens
    num_tokens: int
    is_packed: bool = False
    is_settled: bool = True

    def __post_init__(self) -> None:
        case, count, batch = self.case, self.num_tokens, self.case.batch
        self._positions = self.tokens.positions.tolist()
        half = case.dtype
        q, kv = (batch, case.num_q_heads, count, case.head_dim), (batch, case.num_kv_heads, count, case.head_dim)
        window, sinks = (batch, case.num_kv_heads, case.window_size), (batch, case.num_kv_heads, case.num_sinks)
        element = torch.int8 if case.kv == "int8" else half
        self.states = {}
        for x in "kv":
            if case.num_sinks:
                self.states[f"sink_{x}"] = Buffer(*sinks, case.head_dim, dtype=half)
            self.states[f"window_{x}"] = Buffer(*window, case.head_dim, dtype=element)
            if case.kv == "int8":
                self.states[f"window_{x}_scale"] = Buffer(*window, dtype=torch.float16)
        if self.is_packed:
            counts = (case.num_q_heads, case.num_kv_heads, case.num_kv_heads)
            parts = {"qkv": Buffer(batch, sum(counts), count, case.head_dim, dtype=half)}
            views = parts["qkv"].tensor.split(counts, dim=1)
        else:
            parts = {"q": Buffer(*q, dtype=half), "k": Buffer(*kv, dtype=half), "v": Buffer(*kv, dtype=half)}
            views = tuple(part.tensor for part in parts.values())
        self._rows = dict(zip("qkv", views, strict=True))
        self.inputs = {
            **parts,
            "position": Buffer(batch, 2, dtype=torch.int32),
            "num_valid": Buffer(batch, dtype=torch.int32),
        }
        constants = {}
        if case.rotation == "caller":
            for name in ("shift_cos", "shift_sin"):
                self.inputs[name] = Buffer(batch, count, case.rotary_dim // 2, dtype=torch.float32)
        if case.rotation != "none":
            self.frequency = Buffer(case.rotary_dim // 2, dtype=torch.int32)
            self.frequency.tensor.copy_(
                torch.where(self.tokens.frequency >= 2**31, self.tokens.frequency - 2**32, self.tokens.frequency)
            )
            if case.rotation == "kernel":
                constants["frequency"] = self.frequency
        if case.gate_dim:
            self.inputs["gate"] = Buffer(batch, case.num_q_heads, count, case.gate_dim, dtype=half)
        for name, values in (
            ("alibi_slopes", self.tokens.slopes),
            ("sink_logit", self.tokens.sink_logit),
            ("sink_scale", self.tokens.sink_scale),
        ):
            if values is not None:
                constants[name] = Buffer(case.num_q_heads, dtype=torch.float32)
                constants[name].tensor.copy_(values)
        self.out = Buffer(*q, dtype=half)
        buffers = {**self.states, **self.inputs, **constants, "out": self.out}
        self.params = SinkAttentionParams(
            batch=batch,
            num_tokens=count,
            num_q_heads=case.num_q_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            num_sinks=case.num_sinks,
            window_size=case.window_size,
            dtype=DTYPES[str(half).removeprefix("torch.")],
            int8_window=case.kv == "int8",
            settled_states=self.is_settled,
            rope_scaling=case.rope_scaling,
            rotary_dim=case.rotary_dim,
            interleaved=case.interleaved,
            scale=case.scale,
            softcap=case.softcap,
            gate_dim=case.gate_dim,
            stream_rows=sum(counts) if self.is_packed else 0,
            **{name: buffer.tensor.data_ptr() for name, buffer in buffers.items() if name != "qkv"}
            | {name: rows.data_ptr() for name, rows in self._rows.items()},
        )
        assert self.library.problem(self.params) is None, self.library.problem(self.params)
        self.workspace = Buffer(self.library.workspace_bytes(self.params), dtype=torch.uint8)
        self._all = [*buffers.values(), self.workspace]

    def fill(self, starts: list[int], num_valid: list[int]) -> None:
        """Inputs of the next run: from token starts[b] of stream b on, num_valid[b] of them, then poison."""
        for buffer in self.inputs.values():
            buffer.poison()
        for b, (start, count) in enumerate(zip(starts, num_valid, strict=True)):
            position = self._positions[b][min(start, len(self._positions[b]) - 1)]
            self.inputs["position"].tensor[b, 0] = position >> 16
            self.inputs["position"].tensor[b, 1] = position & 0xFFFF
            self.inputs["num_valid"].tensor[b] = count
            rows = self._rows | ({"gate": self.inputs["gate"].tensor} if "gate" in self.inputs else {})
            for name, target in rows.items():
                target[b, :, :count] = getattr(self.tokens, name)[b, :, start : start + count]

    def launch(self) -> None:
        """On the current stream, the angles of the shift beforehand if the caller rotates."""
        stream = torch.cuda.current_stream().cuda_stream
        if self.case.rotation == "caller":
            angles = StreamAnglesParams(
                batch=self.case.batch,
                num_tokens=self.num_tokens,
                num_frequencies=self.case.rotary_dim // 2,
                behind=self.case.capacity - 1,
                position=self.inputs["position"].tensor.data_ptr(),
                frequency=self.frequency.tensor.data_ptr(),
                cos=self.inputs["shift_cos"].tensor.data_ptr(),
                sin=self.inputs["shift_sin"].tensor.data_ptr(),
            )
            assert StreamAngles(self.library.path).launch(angles, stream) == 0
        assert self.library.launch(self.params, self.workspace.tensor.data_ptr(), stream) == 0

    def run(self, starts: list[int], num_valid: list[int]) -> torch.Tensor:
        """One run on poisoned outputs and workspace; [B, Hq, T, D]."""
        self.fill(starts, num_valid)
        self.out.poison()
        self.workspace.poison()
        self.launch()
        return self.out.tensor.clone()

    def check_guards(self) -> None:
        assert all(buffer.is_untouched_outside() for buffer in self._all)


def expected_states(case: Case, tokens: Tokens, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """States after all tokens, of poison where nothing was written. k, v: rows as stored, before any rounding to int8.

    int8 rows are float32 arithmetic here, as in exporter/sinkexport/model/int8_rows.py.
    """
    device = str(tokens.positions.device)
    batch, heads, count = tokens.positions.shape[0], case.num_kv_heads, tokens.positions.shape[1]
    states = {}
    for x, rows in (("k", k), ("v", v)):
        element = {"int8": torch.int8, "fp16": torch.float16}.get(case.kv, case.dtype)
        size = rows.shape[-1]
        window = Buffer(batch, heads, case.window_size, size, dtype=element, device=device).tensor
        sinks = Buffer(batch, heads, case.num_sinks, size, dtype=case.dtype, device=device).tensor
        scales = Buffer(batch, heads, case.window_size, dtype=torch.float16, device=device).tensor
        sinks.copy_(rows[:, :, : case.num_sinks])
        for b in range(batch):
            kept = slice(max(case.num_sinks, count - case.window_size), count)
            slots = (tokens.positions[b, kept] - case.num_sinks) % case.window_size
            last = rows[b, :, kept]
            if case.kv == "int8":
                last = last.float()
                scale = (last.abs().amax(-1) / 127).clamp(2.0**-17, 65504.0).half()
                scales[b][:, slots] = scale
                last = (last / scale.float()[..., None]).round().clamp(-127, 127)
            window[b][:, slots] = last.to(element)
        states[f"window_{x}"] = window
        if case.num_sinks:
            states[f"sink_{x}"] = sinks
        if case.kv == "int8":
            states[f"window_{x}_scale"] = scales
    return states
