"""What SinkAttention nodes of a bundle for the CPU library must give, from the tokens that they were fed: float64.

Rings of a bundle are not looked at: every layer's tokens are kept here, as the oracle does. The bound on an error is
what rounding can add up to: of float32 operations, or of both matmuls' operands to bfloat16 where a chunk may do so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from tests.exporter.graph.shown_bundle import Shown
from tests.plugins.sink_attention_reference import Case, Tokens, attention

FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-9
"""Largest relative error of a rounding."""
SLACK = 16
"""Roundings of a key, a query and a weight besides those of sums: norms, angles, rotation, softcap, 2^x."""


@dataclasses.dataclass
class Read:
    """Inputs of a node by name; q, k, v float64 [1, H, n, D] after their norms, for tokens that count."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    extras: dict[str, np.ndarray]
    states: list[np.ndarray]
    state_name: str
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class NodeCase(Case):
    """A node's case. logit_scale: the factor on q . k. turned_size: what weights make of a query's length, at most."""

    logit_scale: float = 1.0
    turned_size: float = 1.0

    @property
    def scale(self) -> float:
        return self.logit_scale


class AttentionJudge:
    """Attention of all layers of one stream."""

    def __init__(self, *, rounds_chunks: bool) -> None:
        self._rounds_chunks = rounds_chunks
        self._tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def judged(self, node: Shown) -> float:
        """The largest error of the next run of a node as a share of what it may be. Nodes come in the graph's order."""
        read, fields = read_node(node), node.fields
        before = self._tokens.get(read.state_name)
        if read.k is None or read.v is None:  # another node has added these tokens
            assert before is not None
            k, v = before
        else:
            k, v = (
                torch.cat((old, new), 2)
                for old, new in zip(before or (read.k[:, :, :0], read.v[:, :, :0]), (read.k, read.v), strict=True)
            )
            if not fields["reads_only"]:
                self._tokens[read.state_name] = k, v
        case, tokens = _problem(read, fields, k, v)
        last = slice(k.shape[2] - read.q.shape[2], k.shape[2])
        want = attention(case, tokens, torch.float64, last)
        sizes = attention(case, dataclasses.replace(tokens, v=v.abs()), torch.float64, last)
        rounds = BFLOAT16 if self._rounds_chunks and fields["bfloat16_chunks"] and read.num_tokens > 1 else FLOAT32
        off = _bound(case, read.q, k, rounds)[..., None] * sizes + 1e-30
        got = _heads_first(node.outputs[0], case, fields)
        assert not got[:, :, read.q.shape[2] :].any(), "rows without a token"
        got = got[:, :, : read.q.shape[2]]
        assert torch.isfinite(got).all(), node.name
        return float(((got - want).abs() / off).max())


def _bound(case: NodeCase, q: torch.Tensor, k: torch.Tensor, rounds: float) -> torch.Tensor:
    """Largest error of an output beside the sum of |weight * value|, [1, Hq, n]."""
    group = case.num_q_heads // case.num_kv_heads
    longest = k.norm(dim=-1).amax(-1).repeat_interleave(group, dim=1)[..., None]  # [1, Hq, 1]
    size = q.norm(dim=-1) * longest * case.scale * case.rope_scaling**2
    size = size * case.turned_size
    sums = FLOAT32 * (case.head_dim + SLACK)
    logits = size * (2 * rounds + sums)  # of keys and queries, and the sum
    weights = 2 * rounds + FLOAT32 * (k.shape[2] + SLACK)  # of weights and values, and the sums
    return torch.expm1(2 * logits) * (1 + weights) + 2 * weights


def read_node(node: Shown) -> Read:
    """Read a node's inputs in their documented order (plugins/README.md)."""
    fields, inputs = node.fields, list(node.inputs)
    width, names = fields["packed_width"], list(node.input_names)
    q = inputs.pop(0)
    takes_keys = not fields["reads_only"] or q.shape[1 if width else 2] > 1
    k, v = (inputs.pop(0), inputs.pop(0)) if takes_keys and not width else (None, None)
    position = inputs.pop(0)
    assert position.shape == (1,)
    at = names.index(names[len(names) - len(inputs)])
    states = [inputs.pop(0) for _ in range(2 + 2 * fields["int8_window"] + 2 * (fields["num_sinks"] > 0))]
    wanted = {
        "frequency": fields["rotary_dim"] > 0,
        "num_valid": fields["has_num_valid"],
        **{name: fields[f"has_{name}"] for name in ("alibi", "sink_logit", "sink_scale", "gate")},
        **dict.fromkeys(("q_norm", "k_norm"), fields["qk_norm"] > 0),
        "v_norm": fields["has_v_norm"],
        **{name: fields["turned_weights"] > i for i, name in enumerate(("q_turned", "k_turned"))},
    }
    wanted["k_norm"] = wanted["k_norm"] and takes_keys
    extras = {name: inputs.pop(0) for name, is_there in wanted.items() if is_there}
    assert not inputs
    heads, _, dim = states[0].shape[1:]
    if width:
        row, tokens = heads * dim, q.shape[1]
        parts = np.split(q[0], [width, width + row], axis=-1)
        split = [part.reshape(1, tokens, -1, d).swapaxes(1, 2) for part, d in zip(parts, _dims(states), strict=False)]
        q, k, v = split if takes_keys else (split[0], None, None)
    count = int(extras["num_valid"][0]) if "num_valid" in extras else q.shape[2]
    return Read(
        q=_normed(q[:, :, :count], extras.get("q_norm"), fields["qk_norm_epsilon"]),
        k=None if k is None else _normed(k[:, :, :count], extras.get("k_norm"), fields["qk_norm_epsilon"]),
        v=None if v is None else _normed(v[:, :, :count], extras.get("v_norm"), fields["v_norm_epsilon"]),
        extras=extras,
        states=states,
        state_name=names[at].removesuffix(".next"),
        num_tokens=q.shape[2],
    )


def _dims(states: list[np.ndarray]) -> tuple[int, int, int]:
    """Sizes of heads of queries, keys and values."""
    dim, value_dim = states[0].shape[3], states[1].shape[3]
    return dim, dim, value_dim


def _normed(x: np.ndarray, weight: np.ndarray | None, epsilon: float) -> torch.Tensor:
    """Rows [1, H, n, D] by an RMS norm of each head, or of all heads of a token where the weight is of all of them."""
    rows = torch.from_numpy(np.array(x)).double()
    if weight is None:
        return rows
    scale, heads = torch.from_numpy(np.array(weight)).double(), rows.shape[1]
    if len(scale) == rows.shape[3]:
        return rows / (rows.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale
    mean = rows.square().mean((1, 3), keepdim=True)
    return rows / (mean + epsilon).sqrt() * scale.reshape(heads, 1, -1)


def _problem(read: Read, fields: dict[str, Any], k: torch.Tensor, v: torch.Tensor) -> tuple[NodeCase, Tokens]:
    """The same for the reference: all tokens so far, queries of the last ones."""
    count, extras = k.shape[2], {name: torch.from_numpy(np.array(one)) for name, one in read.extras.items()}
    q = torch.zeros(1, read.q.shape[1], count, read.q.shape[3], dtype=torch.float64)
    q[:, :, count - read.q.shape[2] :] = read.q
    gate = extras.get("gate")
    if gate is not None:
        gate = gate.reshape(1, q.shape[1], -1, gate.shape[-1] if gate.dim() == 4 else 1).double()
        padding = torch.zeros(1, q.shape[1], count - read.q.shape[2], gate.shape[3], dtype=torch.float64)
        gate = torch.cat((padding, gate[:, :, : read.q.shape[2]]), 2)
    turned = [float(extras[name].abs().max()) for name in ("q_turned", "k_turned") if name in extras]
    case = NodeCase(
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        num_sinks=fields["num_sinks"],
        window_size=read.states[0].shape[2],
        dtype=torch.float64,
        kv="int8" if fields["int8_window"] else "fp" if read.states[0].dtype == np.float32 else "fp16",
        rotation="kernel" if fields["rotary_dim"] else "none",
        rotary_dim=fields["rotary_dim"],
        interleaved=bool(fields["interleaved"]),
        rope_scaling=fields["rope_scaling"],
        softcap=fields["softcap"],
        batch=1,
        value_dim=v.shape[3],
        turned_weights=fields["turned_weights"],
        logit_scale=fields["scale"],
        turned_size=float(np.prod(turned)),
    )
    tokens = Tokens(
        q=q,
        k=k,
        v=v,
        positions=torch.arange(count)[None],
        frequency=extras.get("frequency", torch.zeros(0, dtype=torch.int64)),
        gate=gate,
        slopes=extras.get("alibi"),
        sink_logit=extras.get("sink_logit"),
        sink_scale=extras.get("sink_scale"),
        q_turned=extras.get("q_turned"),
        k_turned=extras.get("k_turned"),
    )
    return case, tokens


def _heads_first(out: np.ndarray, case: Case, fields: dict[str, Any]) -> torch.Tensor:
    """Results [1, Hq, T, Dv] in float64."""
    values = torch.from_numpy(np.array(out)).double()
    if fields["packed_width"]:
        return values.reshape(1, values.shape[1], case.num_q_heads, case.value_size).transpose(1, 2)
    return values
