"""Time of what a decoder layer has beside attention: four matmuls with the norms, the gate and the residuals.

    python plugins/bench/decoder_layer.py build/plugins/libsinkexport_capi.so [--weights int8|..] [--tokens 1,4]

Needs a GPU and PyTorch. apart: a launch for each norm (with the addition before it) and gate, as nodes of their own.
fused: four launches. Both run from a CUDA graph over as many layers as are beyond the L2 cache's reach, each with
weights of its own, launches one after the other; a figure is the median of replays, microseconds a layer. Floor: all
weights and scales / bandwidth of a large copy in the same run, read + written. GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugins.bench import common
from plugins.capi.header import DTYPES
from plugins.capi.kernels import GatedActivation, GatedActivationParams, Linear, LinearParams, RmsNorm, RmsNormParams

# Hidden size, outputs of q|k|v, inputs of the matmul after attention, width of the feed-forward block
SHAPES = {
    "SmolLM2-135M": (576, 960, 576, 1536),
    "Qwen3-0.6B": (1024, 4096, 2048, 3072),
    "Llama-3.2-1B": (2048, 3072, 2048, 8192),
    "Llama-2-7B": (4096, 12288, 4096, 11008),
}
NUM_ROWS = (1, 4, 8, 16)
BEYOND_L2_BYTES = 400_000_000
EPSILON = 1e-5


class Libraries:
    """The three kernels, and memory that launches share."""

    def __init__(self, path: Path) -> None:
        self.linear, self.norm, self.gate = Linear(path), RmsNorm(path), GatedActivation(path)
        self.workspace = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def matmul(self, weights: common.Weights, x: torch.Tensor, y: torch.Tensor, num_outputs: int, **more: Any) -> None:
        """One launch. more: fields of LinearParams."""
        params = LinearParams(
            num_rows=x.shape[0],
            num_inputs=x.shape[1],
            num_outputs=num_outputs,
            dtype=DTYPES["float16"],
            x=x.data_ptr(),
            y=y.data_ptr(),
            constant_weight=True,
            **weights.fields,
            **more,
        )
        common.check(self.linear, params)
        common.launch(self.linear, params, self.workspace.data_ptr())

    def normed(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, total: torch.Tensor
    ) -> torch.Tensor:
        """A norm of x + residual, which goes to `total`."""
        y = torch.empty_like(x)
        common.launch(
            self.norm,
            RmsNormParams(
                num_rows=x.shape[0],
                row_length=x.shape[1],
                dtype=DTYPES["float16"],
                epsilon=EPSILON,
                x=x.data_ptr(),
                weight=weight.data_ptr(),
                residual=residual.data_ptr(),
                y=y.data_ptr(),
                sum=total.data_ptr(),
            ),
        )
        return y

    def gated(self, both: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of rows gate | up."""
        width = both.shape[1] // 2
        y = torch.empty(both.shape[0], width, dtype=both.dtype, device="cuda")
        common.launch(
            self.gate,
            GatedActivationParams(
                num_rows=both.shape[0],
                width=width,
                row_stride=2 * width,
                dtype=DTYPES["float16"],
                gate=both.data_ptr(),
                up=both.data_ptr() + 2 * width,
                out=y.data_ptr(),
            ),
        )
        return y


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of a layer: q|k|v, after attention, gate|up, down, and two norms."""

    matrices: tuple[common.Weights, ...]
    norms: tuple[torch.Tensor, torch.Tensor]


def random_layer(form: str, hidden: int, qkv: int, attended: int, width: int) -> Layer:
    sizes = ((qkv, hidden), (hidden, attended), (2 * width, hidden), (hidden, width))
    matrices = tuple(common.random_weights(form, *size) for size in sizes)
    norms = tuple(torch.rand(hidden, dtype=torch.float16, device="cuda") + 0.5 for _ in range(2))
    return Layer(matrices, norms)  # type: ignore[arg-type]


def steps(
    libraries: Libraries, layers: list[Layer], num_rows: int, shape: tuple[int, ...]
) -> dict[str, Callable[[], None]]:
    """All layers, with launches apart and fused."""
    hidden, qkv, attended, width = shape
    half = {"dtype": torch.float16, "device": "cuda"}
    h, other, added = (torch.randn(num_rows, hidden, **half) for _ in range(3))
    heads, out = torch.empty(num_rows, qkv, **half), torch.randn(num_rows, attended, **half)
    both, acted = torch.empty(num_rows, 2 * width, **half), torch.empty(num_rows, width, **half)

    def apart() -> None:
        for layer in layers:
            first, second, third, fourth = layer.matrices
            libraries.matmul(first, libraries.normed(added, layer.norms[0], h, other), heads, qkv)
            libraries.matmul(second, out, added, hidden)
            libraries.matmul(third, libraries.normed(added, layer.norms[1], other, h), both, 2 * width)
            libraries.matmul(fourth, libraries.gated(both), added, hidden)

    def fused() -> None:
        for layer in layers:
            first, second, third, fourth = layer.matrices
            norms = [{"norm_weight": norm.data_ptr(), "norm_epsilon": EPSILON} for norm in layer.norms]
            libraries.matmul(first, h, heads, qkv, **norms[0])
            libraries.matmul(second, out, other, hidden, residual=h.data_ptr())
            libraries.matmul(third, other, acted, 2 * width, is_gated=True, **norms[1])
            libraries.matmul(fourth, acted, h, hidden, residual=other.data_ptr())

    return {"apart": apart, "fused": fused}


def main() -> None:
    """Print a table, a row for each shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--weights", choices=common.WEIGHTS, default="int8")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, NUM_ROWS)), help="M, one or more")
    parser.add_argument("--json", type=Path, help="all figures go there")
    arguments = parser.parse_args()
    libraries, found = Libraries(arguments.library), common.machine()
    common.print_machine(found)
    print("| layer | M | MB | floor us | apart us | of copy | fused us | of copy |")
    print("| --- " + "| ---: " * 7 + "|")
    results = []
    for name in arguments.shapes.split(","):
        shape = SHAPES[name]
        first = random_layer(arguments.weights, *shape)
        num_bytes = sum(matrix.bytes_of_matrix for matrix in first.matrices)
        count = max(4, -(-BEYOND_L2_BYTES // num_bytes))
        layers = [first, *(random_layer(arguments.weights, *shape) for _ in range(count - 1))]
        floor = num_bytes / found["copy_bytes_per_s"] * 1e6
        for num_rows in map(int, arguments.tokens.split(",")):
            times = {
                way: statistics.median(common.times_us(run, count))
                for way, run in steps(libraries, layers, num_rows, shape).items()
            }
            results.append({"shape": name, "num_rows": num_rows, "bytes": num_bytes, "floor_us": floor, **times})
            shares = [f"{us:.1f} | {100 * floor / us:.0f}%" for us in times.values()]
            print(f"| {name} | {num_rows} | {num_bytes / 1e6:.1f} | {floor:.1f} | {' | '.join(shares)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "weights": arguments.weights, "results": results}, indent=1))


if __name__ == "__main__":
    main()
