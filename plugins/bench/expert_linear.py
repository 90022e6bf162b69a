"""Time of products by chosen matrices beside PyTorch's (cuBLAS over gathered weights), and of copying as many bytes.

    python plugins/bench/expert_linear.py build/plugins/libsinkexport_capi.so [--weights int8|half] [--json FILE]

Needs a GPU and PyTorch. Times as in linear.py, back to back; each launch has picks of its own, and the experts' weights
are beyond the L2 cache's reach. PyTorch, float16: the chosen weights are gathered, then multiplied as a batch; for 16
tokens and more every expert multiplies all tokens instead, whichever is the faster.

The floor is what our product must move (weights of the experts that are chosen, scales, inputs, outputs; mean of all
launches) / bandwidth of a large copy, read + written. GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugins.bench.gpu_timing import copy_bandwidth, times_us
from plugins.capi.header import DTYPES, WEIGHT_TYPES
from plugins.capi.kernels import ExpertLinear, ExpertLinearParams

# Experts, picks of a token, K, N: gate | up and down of Mixtral-8x7B and of Qwen3-30B-A3B
MIXTURES = [(8, 2, 4096, 28672), (8, 2, 14336, 4096), (128, 8, 2048, 1536), (128, 8, 768, 2048)]
NUM_TOKENS = [1, 4, 16, 64]
LAUNCHES = 16


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
    library: ExpertLinear, weight_type: str, mixture: tuple[int, ...], num_tokens: int, bandwidth: float
) -> dict[str, Any]:
    num_experts, num_chosen, num_inputs, num_outputs = mixture
    is_int8, num_picks = weight_type == "int8", num_tokens * num_chosen
    picks = picks_of(num_experts, num_chosen, num_tokens)
    x = torch.randn(num_picks, num_inputs, dtype=torch.float16, device="cuda")
    y = torch.empty(num_picks, num_outputs, dtype=torch.float16, device="cuda")
    half = torch.empty(num_experts, num_outputs, num_inputs, dtype=torch.float16, device="cuda").normal_(0, 0.01)
    weight = (half * 1000).round_().clamp_(-127, 127).to(torch.int8) if is_int8 else half
    scale = torch.rand(num_experts, num_outputs, device="cuda") * 1e-3 + 1e-4
    params = [
        ExpertLinearParams(
            num_experts,
            num_picks,
            num_picks,
            num_inputs,
            num_outputs,
            DTYPES["float16"],
            WEIGHT_TYPES[weight_type],
            row.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr() if is_int8 else 0,
            y.data_ptr(),
        )
        for row in picks
    ]
    if problem := library.problem(params[0]):
        raise ValueError(problem)

    def ours() -> None:
        for each in params:
            if error := library.launch(each, torch.cuda.current_stream().cuda_stream):
                raise RuntimeError(f"expert linear: received CUDA error {error}, expected 0; check the architecture")

    def gathered() -> None:
        for row in picks:
            torch.bmm(half.index_select(0, row), x[..., None])

    def every() -> None:
        for _ in picks:
            torch.matmul(x[:num_tokens], half.mT)

    times = times_us(ours, LAUNCHES)
    theirs = [statistics.median(times_us(gathered, LAUNCHES))] if num_tokens <= 16 else []
    theirs += [statistics.median(times_us(every, LAUNCHES))] if num_tokens >= 16 else []
    chosen = statistics.mean(len(row.unique()) for row in picks)
    num_bytes = chosen * num_outputs * (num_inputs * (1 if is_int8 else 2) + 4 * is_int8)
    num_bytes += 2 * num_picks * (num_inputs + num_outputs)
    return {
        "mixture": mixture,
        "num_tokens": num_tokens,
        "bytes": num_bytes,
        "floor_us": num_bytes / bandwidth * 1e6,
        "median_us": statistics.median(times),
        "p99_us": times[round(0.99 * (len(times) - 1))],
        "torch_us": min(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--weights", choices=list(WEIGHT_TYPES), default="half", help="of our product")
    parser.add_argument("--json", type=Path, help="all figures go there")
    arguments = parser.parse_args()
    library, bandwidth = ExpertLinear(arguments.library), copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {bandwidth / 1e9:,.0f} GB/s\n")
    print("| experts, K x N | tokens | MB | floor us | us | p99 us | of copy | PyTorch us | faster |")
    print("| --- " + "| ---: " * 8 + "|")
    results = []
    for mixture in MIXTURES:
        for num_tokens in NUM_TOKENS:
            found = measure(library, arguments.weights, mixture, num_tokens, bandwidth)
            results.append(found)
            experts, chosen, depth, width = mixture
            cells = [
                f"{chosen} of {experts}, {depth} x {width}",
                num_tokens,
                f"{found['bytes'] / 1e6:.1f}",
                f"{found['floor_us']:.1f}",
                f"{found['median_us']:.1f}",
                f"{found['p99_us']:.1f}",
                f"{100 * found['floor_us'] / found['median_us']:.0f}%",
                f"{found['torch_us']:.1f}",
                f"{found['torch_us'] / found['median_us']:.2f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if arguments.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
        arguments.json.write_text(json.dumps({**machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
