"""Time of the linear beside PyTorch's fp16 matmul (cuBLAS) and the time of copying as many bytes.

    python plugins/bench/linear.py build/plugins/libsinkexport_capi.so [--weights int8|half|int4-128|..] [--json FILE]

Needs a GPU and PyTorch. Ours and the baseline run from CUDA graphs over as many sets of weights as are beyond the L2
cache's reach, so that every weight comes from memory; a sample is one replay, timed with CUDA events.

back to back: launches follow each other. From compute capability 9.0 on our kernel's first weights, which are said to
    be constant, are on their way before the launch ahead of it has ended; PyTorch's are not.
alone: a kernel that does next to nothing stands before each launch, and its own time is taken off. What a launch costs
    between other kernels, its start and its end included.

The floor is all bytes that our matmul must move (weights, scales, inputs, outputs) / bandwidth of a large copy, read +
written. GB = 1e9 bytes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugins.bench import common
from plugins.capi.header import DTYPES
from plugins.capi.kernels import Linear, LinearParams

# (K, N): Llama-2-7B's attention, up and down; Llama-3-8B's down and lm_head, Llama-2-7B's; SmolLM2-135M's up
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (14336, 4096), (4096, 128256), (4096, 32000), (576, 1536)]
NUM_ROWS = [1, 4, 16, 64, 256]
COLUMNS = (
    *("K x N", "M", "floor us", "us", "p99 us", "GB/s", "of copy", "alone us", "of copy"),
    *("PyTorch us", "p99 us", "alone us", "faster"),
)
BEYOND_L2_BYTES = 400_000_000  # of weights in turn: eight times the largest L2 here


def times(launch: Callable[[int], Any], sets: int) -> dict[str, Any]:
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

    alone = statistics.median(common.times_us(spaced, sets)) - statistics.median(common.times_us(spacers, sets))
    return {**common.stats(common.times_us(back_to_back, sets)), "alone_us": alone}


def measure(
    library: Linear, weight_type: str, num_rows: int, num_inputs: int, num_outputs: int, bandwidth: float
) -> dict[str, Any]:
    one = common.random_weights(weight_type, num_outputs, num_inputs)
    sets = max(2, -(-BEYOND_L2_BYTES // one.bytes_of_matrix))
    x = torch.randn(num_rows, num_inputs, dtype=torch.float16, device="cuda")
    y = torch.empty(num_rows, num_outputs, dtype=torch.float16, device="cuda")
    weights = [one, *(common.random_weights(weight_type, num_outputs, num_inputs) for _ in range(sets - 1))]
    num_halves = max(2, -(-BEYOND_L2_BYTES // (2 * num_inputs * num_outputs)))
    halves = [
        torch.empty(num_outputs, num_inputs, dtype=torch.float16, device="cuda").normal_(0, 0.01)
        for _ in range(num_halves)
    ]
    params = [
        LinearParams(
            num_rows=num_rows,
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            dtype=DTYPES["float16"],
            x=x.data_ptr(),
            y=y.data_ptr(),
            constant_weight=True,
            **weight.fields,
        )
        for weight in weights
    ]
    workspace = torch.empty(max(16, library.workspace_bytes(params[0])), dtype=torch.uint8, device="cuda")
    common.check(library, params[0])
    ours = times(lambda i: common.launch(library, params[i], workspace.data_ptr()), sets)
    theirs = times(lambda i: torch.nn.functional.linear(x, halves[i]), len(halves))
    num_bytes = one.bytes_of_matrix + 2 * num_rows * (num_inputs + num_outputs)
    return {
        "num_inputs": num_inputs,
        "num_outputs": num_outputs,
        "num_rows": num_rows,
        "bytes": num_bytes,
        "floor_us": num_bytes / bandwidth * 1e6,
        weight_type: ours,
        "torch_fp16": theirs,
    }


def cells(result: dict[str, Any], weight_type: str) -> list[Any]:
    ours, theirs, floor = result[weight_type], result["torch_fp16"], result["floor_us"]
    return [
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


def measure_all(library: Linear, weight_type: str, bandwidth: float) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    for num_inputs, num_outputs in SHAPES:
        for num_rows in NUM_ROWS:
            result = measure(library, weight_type, num_rows, num_inputs, num_outputs, bandwidth)
            yield result, cells(result, weight_type)


if __name__ == "__main__":
    common.run_linear(__doc__, Linear, "int8", COLUMNS, measure_all)
