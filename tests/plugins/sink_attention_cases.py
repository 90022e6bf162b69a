"""Cases of sink attention that the kernels of GPUs and of CPUs are tried with, and where their streams are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.plugins.sink_attention_reference import Case

FAR = (0, 2**33 + 12345, 10**6, 2**46)
"""How far beyond its usual position a stream's first token after the sinks is."""

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


def mixed_case(
    number: int,
    heads: Sequence[tuple[int, int]],
    head_dim: int,
    dtype: torch.dtype,
    kv: str,
    value_dim: int = 0,
    qk_norm: bool = False,
) -> Case:
    """A case with combinations of the rest that `number` chooses: over many, all of each list appear often.

    qk_norm: cases with a sink logit and a gate have norms of queries and keys too.
    """
    num_q_heads, num_kv_heads = heads[number % len(heads)]
    num_sinks, window = GEOMETRIES[(number + number // 7) % len(GEOMETRIES)]
    extras = dict(EXTRAS[(number + number // 6) % len(EXTRAS)])
    if not num_sinks:
        extras.pop("sink_scale", None)
    if "rotary_dim" in extras:
        extras["rotary_dim"] = max(int(head_dim * extras["rotary_dim"]) // 2 * 2, 2)
    if extras.get("gate_dim") == "D":
        extras["gate_dim"] = value_dim or head_dim
        extras["qk_norm"] = qk_norm
    return Case(num_q_heads, num_kv_heads, head_dim, num_sinks, window, dtype, kv=kv, value_dim=value_dim, **extras)


def positions(case: Case, count: int, device: str = "cpu") -> torch.Tensor:
    """int64 [B, N]: each stream has its own place after the sinks, the first one the usual."""
    index = torch.arange(count, device=device).expand(case.batch, -1)
    # Multiples of W and others: rings are cut at different slots.
    far = torch.tensor([FAR[b % len(FAR)] + b * 7 * (b % len(FAR) > 0) for b in range(case.batch)], device=device)
    return torch.where(index < case.num_sinks, index, index + far[:, None])


def is_comparable(case: Case, count: int, device: str = "cpu") -> torch.Tensor:
    """bool [B, N]: far streams have jumped there, so their outputs count once the window was filled again."""
    index = torch.arange(count, device=device).expand(case.batch, -1)
    is_near = torch.tensor([FAR[b % len(FAR)] == 0 for b in range(case.batch)], device=device)
    return is_near[:, None] | (index < case.num_sinks) | (index >= case.capacity - 1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; NaN if any is."""
    return float((got.double() - want).norm() / want.norm())
