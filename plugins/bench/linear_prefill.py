"""Time of Llama-2-7B's matmuls in a prompt, beside PyTorch's fp16 matmul (cuBLAS), and the tokens/s that they allow.

    python plugins/bench/linear_prefill.py build/plugins/libsinkexport_capi.so [--weights int8|half|int4-128|..]

Measured as plugins/bench/linear.py does, back to back. TFLOP/s: 2 M N K operations in that time. The last lines: tokens
a second of all 32 layers, if they had nothing but these matmuls to do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugins.bench import common, linear
from plugins.capi.kernels import Linear

# (K, N): q|k|v, o, gate|up, down
SHAPES = [(4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)]
NUM_LAYERS = 32
NUM_ROWS = [64, 128, 256, 512, 1024, 2048]
COLUMNS = ("M, K x N", "us", "p99 us", "TFLOP/s", "PyTorch us", "TFLOP/s", "faster")


def measure_all(library: Linear, weight_type: str, bandwidth: float) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    for num_rows in NUM_ROWS:
        layer_us = {weight_type: 0.0, "torch_fp16": 0.0}
        for num_inputs, num_outputs in SHAPES:
            result = linear.measure(library, weight_type, num_rows, num_inputs, num_outputs, bandwidth)
            operations = 2 * num_rows * num_inputs * num_outputs
            cells: list[Any] = [f"{num_rows}, {num_inputs} x {num_outputs}"]
            for name in layer_us:
                us = result[name]["median_us"]
                layer_us[name] += us
                cells += [f"{us:.1f}", f"{result[name]['p99_us']:.1f}", f"{operations / us / 1e6:.0f}"]
            del cells[5]
            ratio = result["torch_fp16"]["median_us"] / result[weight_type]["median_us"]
            yield result, [*cells, f"{ratio:.2f}"]
        rates = {name: num_rows / (NUM_LAYERS * us * 1e-6) for name, us in layer_us.items()}
        row = [f"{num_rows}, {NUM_LAYERS} layers, tokens/s", f"{rates[weight_type]:,.0f}", "", ""]
        faster = rates[weight_type] / rates["torch_fp16"]
        yield {"num_rows": num_rows, "tokens_per_s": rates}, [*row, f"{rates['torch_fp16']:,.0f}", "", f"{faster:.2f}"]


if __name__ == "__main__":
    common.run_linear(__doc__, Linear, "int8", COLUMNS, measure_all)
