"""Streams on the CPU: all buffers of a run, poisoned and guarded, fed token by token or in chunks."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import torch

from tests.plugins.cpu.calls import Call, SinkAttentionParams
from tests.plugins.cpu.library import ISAS, library
from tests.plugins.gpu_buffers import Buffer
from tests.plugins.sink_attention_cases import FAR, positions
from tests.plugins.sink_attention_reference import QK_EPSILON, Case, Tokens, angles

WINDOW_TYPES = {"fp": (0, torch.float32), "fp16": (1, torch.float16), "int8": (2, torch.int8)}


def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Buffer:
    return Buffer(*shape, dtype=dtype, device="cpu")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays lie. is_packed: q, k and v are one array [B, T, (Hq + Hkv) * D + Hkv * Dv], tokens first."""

    tokens_first: bool = False
    is_packed: bool = False
    out_tokens_first: bool = False


@dataclasses.dataclass
class Streams:
    """One layer's states and buffers for runs of T = num_tokens tokens on `isa` and so many threads."""

    case: Case
    tokens: Tokens
    num_tokens: int
    isa: str
    threads: int = 2
    layout: Layout = Layout()
    bfloat16_chunks: bool = False
    reads_only: bool = False
    hands_out: bool = False
    calls: list[tuple[Call, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list, repr=False)
    """Whether to keep `records`: each run as a call with the arrays as they were, and the arrays that it changed."""
    records: bool = False

    def __post_init__(self) -> None:
        case, count, batch = self.case, self.num_tokens, self.case.batch
        self._positions = self.tokens.positions.tolist()
        window_type, element = WINDOW_TYPES[case.kv]
        self.states = {}
        for x, size in (("k", case.head_dim), ("v", case.value_size)):
            if case.num_sinks:
                self.states[f"sink_{x}"] = buffer(batch, case.num_kv_heads, case.num_sinks, size)
            rows = (batch, case.num_kv_heads, case.window_size)
            self.states[f"window_{x}"] = buffer(*rows, size, dtype=element)
            if case.kv == "int8":
                self.states[f"window_{x}_scale"] = buffer(*rows, dtype=torch.float16)
        self.inputs = {"position": buffer(batch, dtype=torch.int64), "num_valid": buffer(batch, dtype=torch.int64)}
        self._rows = self._token_arrays()
        constants = {}
        if case.rotation == "caller":
            for name in ("shift_cos", "shift_sin"):
                self.inputs[name] = buffer(batch, count, case.rotary_dim // 2)
        elif case.rotation == "kernel":
            constants["frequency"] = buffer(case.rotary_dim // 2, dtype=torch.int64)
            constants["frequency"].tensor.copy_(self.tokens.frequency)
        weights = {f"{x}_norm_weight": getattr(self.tokens, f"{x}_norm") for x in "qkv"}
        weights |= {f"{x}_turned_weight": getattr(self.tokens, f"{x}_turned") for x in "qk"}
        for name, weight in weights.items():
            if weight is not None:
                constants[name] = buffer(len(weight))
                constants[name].tensor.copy_(weight)
        heads = {name: getattr(self.tokens, name) for name in ("sink_logit", "sink_scale")}
        for name, values in (heads | {"alibi_slopes": self.tokens.slopes}).items():
            if values is not None:
                constants[name] = buffer(case.num_q_heads)
                constants[name].tensor.copy_(values)
        self.new = self._new_rows(element) if self.hands_out else {}
        self.out = buffer(*self._shape(case.num_q_heads, case.value_size, self.layout.out_tokens_first))
        every = {**self.states, **self.inputs, **constants, **self.new, "out": self.out}
        self._arrays = {name: one.tensor for name, one in every.items()}
        self._all = list(every.values())
        addresses = {name: one.address for name, one in every.items() if name != "qkv"}
        self._numbers = {
            "batch": batch,
            "num_tokens": count,
            "num_q_heads": case.num_q_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "value_dim": case.value_size,
            "num_sinks": case.num_sinks,
            "window_size": case.window_size,
            "window_type": window_type,
            "bfloat16_chunks": self.bfloat16_chunks,
            "tokens_first": self.layout.tokens_first or self.layout.is_packed,
            "row_width": self._width() if self.layout.is_packed else 0,
            "rope_scaling": case.rope_scaling,
            "rotary_dim": case.rotary_dim,
            "interleaved": case.interleaved,
            "scale": case.scale,
            "softcap": case.softcap,
            "gate_dim": case.gate_dim,
            "qk_norm_epsilon": QK_EPSILON,
            "qk_norm_of_rows": case.norm_of_rows,
            "v_norm_epsilon": QK_EPSILON,
            "reads_only": self.reads_only,
            "out_tokens_first": self.layout.out_tokens_first,
        }
        addresses |= {name: rows.data_ptr() for name, rows in self._rows.items()}
        self.params = SinkAttentionParams(**self._numbers, **addresses)
        functions = library()
        functions.sinkexport_cpu_sink_attention_problem.restype = ctypes.c_char_p
        problem = functions.sinkexport_cpu_sink_attention_problem(ctypes.byref(self.params))
        assert problem is None, problem.decode()

    def _new_rows(self, element: torch.dtype) -> dict[str, Buffer]:
        """Arrays for the rows that a run would write."""
        case, found = self.case, {}
        rows = (case.batch, case.num_kv_heads, self.num_tokens)
        for x, size in (("k", case.head_dim), ("v", case.value_size)):
            found[f"new_{x}"] = buffer(*rows, size, dtype=element)
            if case.kv == "int8":
                found[f"new_{x}_scale"] = buffer(*rows, dtype=torch.float16)
            if case.kv != "fp" and case.num_sinks:
                found[f"new_sink_{x}"] = buffer(*rows, size)
        return found

    def _width(self) -> int:
        case = self.case
        return (case.num_q_heads + case.num_kv_heads) * case.head_dim + case.num_kv_heads * case.value_size

    def _shape(self, heads: int, size: int, tokens_first: bool) -> tuple[int, ...]:
        batch, count = self.case.batch, self.num_tokens
        return (batch, count, heads, size) if tokens_first else (batch, heads, count, size)

    def _token_arrays(self) -> dict[str, torch.Tensor]:
        """Views [B, heads, T, size] of what comes with the tokens; their buffers are among the inputs."""
        case = self.case
        sizes = {
            "q": (case.num_q_heads, case.head_dim),
            "k": (case.num_kv_heads, case.head_dim),
            "v": (case.num_kv_heads, case.value_size),
        }
        tokens_first = self.layout.tokens_first or self.layout.is_packed
        views, at = {}, 0
        if self.layout.is_packed:
            self.inputs["qkv"] = buffer(case.batch, self.num_tokens, self._width())
        gate = {"gate": (case.num_q_heads, case.gate_dim)} if case.gate_dim else {}
        for name, (heads, size) in (sizes | gate).items():
            if self.layout.is_packed and name != "gate":
                part = self.inputs["qkv"].tensor[:, :, at : at + heads * size]
                views[name], at = part.unflatten(2, (heads, size)), at + heads * size
            else:
                self.inputs[name] = buffer(*self._shape(heads, size, tokens_first))
                views[name] = self.inputs[name].tensor
            if tokens_first:
                views[name] = views[name].transpose(1, 2)
        return views

    def run(self, starts: list[int], num_valid: list[int]) -> torch.Tensor:
        """One run from token starts[b] of stream b on, num_valid[b] of them, in poisoned buffers; [B, Hq, T, Dv]."""
        for one in (*self.inputs.values(), self.out):
            one.poison()
        positions = self.inputs["position"].tensor
        for b, (start, count) in enumerate(zip(starts, num_valid, strict=True)):
            positions[b] = self._positions[b][min(start, len(self._positions[b]) - 1)]
            self.inputs["num_valid"].tensor[b] = count
            for name, target in self._rows.items():
                target[b, :, :count] = getattr(self.tokens, name)[b, :, start : start + count]
        if self.case.rotation == "caller":
            shift = (positions[:, None] + torch.arange(self.num_tokens) - (self.case.capacity - 1)).clamp(min=0)
            angle = angles(shift, self.tokens.frequency)
            self.inputs["shift_cos"].tensor.copy_(angle.cos())
            self.inputs["shift_sin"].tensor.copy_(angle.sin())
        before = self._copies() if self.records else {}
        library().sinkexport_cpu_sink_attention(ctypes.byref(self.params), ISAS.index(self.isa), self.threads)
        if self.records:
            after = {name: array for name, array in self._copies().items() if name == "out" or name in self.states}
            self.calls.append((Call("sink_attention", self._numbers, before, self.isa), after))
        out = self.out.tensor.clone()
        return out.transpose(1, 2) if self.layout.out_tokens_first else out

    def _copies(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy().copy() for name, tensor in self._arrays.items()}

    def run_all(self, count: int) -> torch.Tensor:
        """All `count` tokens, T at a time where positions have no gap. Returns outputs [B, Hq, N, Dv]."""
        case, batch, size = self.case, self.case.batch, self.num_tokens
        outputs = torch.empty(batch, case.num_q_heads, count, case.value_size)
        for state in self.states.values():  # a far stream's window is valid from its jump on
            for b in range(batch):
                if FAR[b % len(FAR)]:
                    state.tensor[b].zero_()
        done, turn = [0] * batch, 0
        while min(done) < count:
            turn += 1
            valid = [min(size, (case.num_sinks if d < case.num_sinks else count) - d) for d in done]
            if turn % 5 == 1 and valid[1] < sum(valid):  # now and then the second stream idles
                valid[1] = 0
            out = self.run(done, valid)
            for b in range(batch):
                outputs[b, :, done[b] : done[b] + valid[b]] = out[b, :, : valid[b]]
                assert not out[b, :, valid[b] :].any()
                done[b] += valid[b]
        return outputs

    def check_guards(self) -> None:
        assert all(one.is_untouched_outside() for one in self._all)


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
