"""Time of the linear beside PyTorch's fp16 product (cuBLAS) and the time of copying as many bytes.

    python plugins/bench/linear.py build/plugins/libsinkexport_capi.so [--weights int8|half] [--json FILE]

Needs a GPU and PyTorch. Both contenders run from CUDA graphs over as many sets of weights as are beyond the L2 cache's
reach, so that every weight comes from memory; a sample is one replay, timed with CUDA events.

back to back: launches follow each other. From compute capability 9.0 on our kernel's first weights, which are said to
    be constant, are on their way before the launch ahead of it has ended; PyTorch's are not.
alone: a kernel that does next to nothing stands before each launch, and its own time is taken off. What a launch costs
    between other kernels, its start and its end included.

The floor is all bytes that our product must move (weights, scales, inputs, outputs) / bandwidth of a large copy, read +
written. GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugins.bench.gpu_timing import copy_bandwidth, times_us
from plugins.capi.header import DTYPES, WEIGHT_TYPES
from plugins.capi.kernels import Linear, LinearParams

# (K, N): Llama-2-7B's attention, up and down; Llama-3-8B's down and lm_head, Llama-2-7B's; SmolLM2-135M's up
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (14336, 4096), (4096, 128256), (4096, 32000), (576, 1536)]
NUM_ROWS = [1, 4, 16, 64, 256]
BEYOND_L2_BYTES = 400_000_000  # of weights in turn: eight times the largest L2 here


def stats(samples: list[float]) -> dict[str, float]:
    return {"median_us": statistics.median(samples), "p99_us": samples[round(0.99 * (len(samples) - 1))]}


def contender(launch: Callable[[int], Any], sets: int) -> dict[str, Any]:
    """`launch(i)` uses the i-th set of weights."""
    spacer = torch.zeros(8, device="cuda")

    def back_to_back() -> None:
        for i in range(sets):
            launch(i)

    def spaced() -> None:
        for i in range(sets):
            spacer.add_(1)
            launch(i)

    def spacers() -> None:
        for _ in range(sets):
            spacer.add_(1)

    alone = statistics.median(times_us(spaced, sets)) - statistics.median(times_us(spacers, sets))
    return {**stats(times_us(back_to_back, sets)), "alone_us": alone}


def measure(
    library: Linear, weight_type: str, num_rows: int, num_inputs: int, num_outputs: int, bandwidth: float
) -> dict[str, Any]:
    is_int8 = weight_type == "int8"
    num_weight_bytes = num_inputs * num_outputs * (1 if is_int8 else 2)
    sets = max(2, -(-BEYOND_L2_BYTES // num_weight_bytes))
    x = torch.randn(num_rows, num_inputs, dtype=torch.float16, device="cuda")
    y = torch.empty(num_rows, num_outputs, dtype=torch.float16, device="cuda")
    scale = torch.rand(num_outputs, device="cuda") * 1e-3 + 1e-4
    size = (num_outputs, num_inputs)
    weights = [torch.randint(-128, 128, size, dtype=torch.int8, device="cuda") for _ in range(sets)]
    # Twice the bytes of an INT8 one each.
    halves = [weight.half().mul_(2e-4) for weight in weights[: max(2, -(-sets // 2)) if is_int8 else sets]]
    if not is_int8:
        weights = halves
    params = [
        LinearParams(
            num_rows,
            num_inputs,
            num_outputs,
            DTYPES["float16"],
            x.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr() if is_int8 else 0,
            0,
            y.data_ptr(),
            True,
            WEIGHT_TYPES[weight_type],
        )
        for weight in weights
    ]
    workspace = torch.empty(max(16, library.workspace_bytes(params[0])), dtype=torch.uint8, device="cuda")
    if problem := library.problem(params[0]):
        raise ValueError(problem)

    def launch(i: int) -> None:
        if error := library.launch(params[i], workspace.data_ptr(), torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"linear: received CUDA error {error}, expected 0; check the GPU's architecture")

    ours = contender(launch, sets)
    theirs = contender(lambda i: torch.nn.functional.linear(x, halves[i]), len(halves))
    num_bytes = num_weight_bytes + 4 * num_outputs * is_int8 + 2 * num_rows * (num_inputs + num_outputs)
    return {
        "num_inputs": num_inputs,
        "num_outputs": num_outputs,
        "num_rows": num_rows,
        "bytes": num_bytes,
        "floor_us": num_bytes / bandwidth * 1e6,
        weight_type: ours,
        "torch_fp16": theirs,
    }


def row(result: dict[str, Any], weight_type: str) -> str:
    ours, theirs, floor = result[weight_type], result["torch_fp16"], result["floor_us"]
    cells = [
        f"{result['num_inputs']} x {result['num_outputs']}",
        result["num_rows"],
        f"{floor:.1f}",
        f"{ours['median_us']:.1f}",
        f"{ours['p99_us']:.1f}",
        f"{result['bytes'] / ours['median_us'] / 1000:,.0f}",
        f"{100 * floor / ours['median_us']:.0f}%",
        f"{ours['alone_us']:.1f}",
        f"{100 * floor / ours['alone_us']:.0f}%",
        f"{theirs['median_us']:.1f}",
        f"{theirs['p99_us']:.1f}",
        f"{theirs['alone_us']:.1f}",
        f"{theirs['median_us'] / ours['median_us']:.2f}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--weights", choices=list(WEIGHT_TYPES), default="int8", help="of our product")
    parser.add_argument("--json", type=Path, help="all figures go there")
    arguments = parser.parse_args()
    library, bandwidth = Linear(arguments.library), copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {bandwidth / 1e9:,.0f} GB/s\n")
    print(
        "| K x N | M | floor us | us | p99 us | GB/s | of copy | alone us | of copy | PyTorch us | p99 us | alone us "
        "| faster |"
    )
    print("| --- " + "| ---: " * 12 + "|")
    results = []
    for num_inputs, num_outputs in SHAPES:
        for num_rows in NUM_ROWS:
            results.append(measure(library, arguments.weights, num_rows, num_inputs, num_outputs, bandwidth))
            print(row(results[-1], arguments.weights), flush=True)
    if arguments.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
        arguments.json.write_text(json.dumps({**machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
