"""Time of matmuls by chosen matrices beside PyTorch's (cuBLAS over gathered weights), and of copying as many bytes.

    python plugins/bench/expert_linear.py build/plugins/libsinkexport_capi.so [--weights half|int4-128|..]

Needs a GPU and PyTorch. Times as in linear.py, back to back; each launch has picks of its own, and the experts' weights
are beyond the L2 cache's reach. PyTorch, float16: the chosen weights are gathered, then multiplied as a batch; for 16
tokens and more every expert multiplies all tokens instead, whichever is the faster.

The floor is what our matmul must move (weights of the experts that are chosen, scales, inputs, outputs; mean of all
launches) / bandwidth of a large copy, read + written. GB = 1e9 bytes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugins.bench import common
from plugins.capi.header import DTYPES
from plugins.capi.kernels import ExpertLinear, ExpertLinearParams

# Experts, picks of a token, K, N: gate | up and down of Mixtral-8x7B and of Qwen3-30B-A3B
MOES = [(8, 2, 4096, 28672), (8, 2, 14336, 4096), (128, 8, 2048, 1536), (128, 8, 768, 2048)]
NUM_TOKENS = [1, 4, 16, 64]
LAUNCHES = 16
COLUMNS = ("experts, K x N", "tokens", "MB", "floor us", "us", "p99 us", "of copy", "PyTorch us", "faster")


def picks_of(num_experts: int, num_chosen: int, num_tokens: int) -> torch.Tensor:
    """int32 [LAUNCHES, tokens * chosen]. Tokens in a row choose different experts for as long as there are some."""
    orders: list[torch.Tensor] = []
    while sum(map(len, orders)) < LAUNCHES * num_tokens * num_chosen:
        orders.append(torch.randperm(num_experts))
    picks = torch.cat(orders)[: LAUNCHES * num_tokens * num_chosen]
    padded = torch.zeros(LAUNCHES, -(-num_tokens * num_chosen // 4) * 4, dtype=torch.int32)  # rows of whole 16 bytes
    padded[:, : num_tokens * num_chosen] = picks.view(LAUNCHES, -1)
    return padded.cuda()[:, : num_tokens * num_chosen]


def measure(
    library: ExpertLinear, weight_type: str, moe: tuple[int, ...], num_tokens: int, bandwidth: float
) -> dict[str, Any]:
    num_experts, num_chosen, num_inputs, num_outputs = moe
    num_picks = num_tokens * num_chosen
    picks = picks_of(num_experts, num_chosen, num_tokens)
    x = torch.randn(num_picks, num_inputs, dtype=torch.float16, device="cuda")
    y = torch.empty(num_picks, num_outputs, dtype=torch.float16, device="cuda")
    half = torch.empty(num_experts, num_outputs, num_inputs, dtype=torch.float16, device="cuda").normal_(0, 0.01)
    weights = common.random_weights(weight_type, num_experts, num_outputs, num_inputs)
    params = [
        ExpertLinearParams(
            num_experts=num_experts,
            num_picks=num_picks,
            num_rows=num_picks,
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            dtype=DTYPES["float16"],
            picks=row.data_ptr(),
            x=x.data_ptr(),
            y=y.data_ptr(),
            **weights.fields,
        )
        for row in picks
    ]
    common.check(library, params[0])

    def ours() -> None:
        for each in params:
            common.launch(library, each)

    def gathered() -> None:
        for row in picks:
            torch.bmm(half.index_select(0, row), x[..., None])

    def every() -> None:
        for _ in picks:
            torch.matmul(x[:num_tokens], half.mT)

    times = common.times_us(ours, LAUNCHES)
    theirs = [statistics.median(common.times_us(gathered, LAUNCHES))] if num_tokens <= 16 else []
    theirs += [statistics.median(common.times_us(every, LAUNCHES))] if num_tokens >= 16 else []
    chosen = statistics.mean(len(row.unique()) for row in picks)
    num_bytes = chosen * weights.bytes_of_matrix + 2 * num_picks * (num_inputs + num_outputs)
    return {
        "moe": moe,
        "num_tokens": num_tokens,
        "bytes": num_bytes,
        "floor_us": num_bytes / bandwidth * 1e6,
        **common.stats(times),
        "torch_us": min(theirs),
    }


def cells(result: dict[str, Any]) -> list[Any]:
    num_experts, num_chosen, num_inputs, num_outputs = result["moe"]
    return [
        f"{num_chosen} of {num_experts}, {num_inputs} x {num_outputs}",
        result["num_tokens"],
        f"{result['bytes'] / 1e6:.1f}",
        f"{result['floor_us']:.1f}",
        f"{result['median_us']:.1f}",
        f"{result['p99_us']:.1f}",
        f"{100 * result['floor_us'] / result['median_us']:.0f}%",
        f"{result['torch_us']:.1f}",
        f"{result['torch_us'] / result['median_us']:.2f}",
    ]


def measure_all(
    library: ExpertLinear, weight_type: str, bandwidth: float
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    for moe in MOES:
        for num_tokens in NUM_TOKENS:
            result = measure(library, weight_type, moe, num_tokens, bandwidth)
            yield result, cells(result)


if __name__ == "__main__":
    common.run_linear(__doc__, ExpertLinear, "half", COLUMNS, measure_all)
