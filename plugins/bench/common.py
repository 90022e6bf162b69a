"""What the benchmarks here share: launches, their time in a CUDA graph, what the memory can do, and reports.

Needs a GPU and PyTorch.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from plugins.capi.header import WEIGHT_TYPES
from plugins.capi.library import Launcher

REPLAYS, WARM_UP = 60, 10
WEIGHTS = ("int8", "half", *(f"int4-{block}{zeros}" for block in (32, 64, 128) for zeros in ("", "z")))
"""Forms of weights: INT4 ones in blocks of so many inputs, z: with zero points."""

COPY_BYTES = 1 << 30


def times_us(run: Callable[[], Any], launches: int) -> list[float]:
    """One figure a replay of a graph of `launches`: microseconds a launch."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(WARM_UP):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) * 1000 / launches for start, end in marks)


def copy_bandwidth() -> float:
    """Bytes read + written in a second by a device-to-device copy: the faster of the driver's and of a kernel."""
    source = torch.randint(-(2**62), 2**62, (COPY_BYTES // 8,), device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    best_us = min(statistics.median(times_us(way, 1)) for way in ways)
    return 2 * COPY_BYTES / (best_us * 1e-6)


def stats(times: list[float]) -> dict[str, float]:
    """Median and p99 of what ``times_us`` gives."""
    return {"median_us": statistics.median(times), "p99_us": times[round(0.99 * (len(times) - 1))]}


def check(library: Launcher[Any], params: ctypes.Structure) -> None:
    """Raises: ValueError with what is wrong with the parameters."""
    if problem := library.problem(params):
        raise ValueError(problem)


def launch(library: Any, params: ctypes.Structure, *workspace: int) -> None:
    """Launch on PyTorch's current stream. library: a Launcher, or one with a workspace.

    Raises:
        RuntimeError: CUDA could not.
    """
    if error := library.launch(params, *workspace, torch.cuda.current_stream().cuda_stream):
        raise RuntimeError(f"{library.NAME}: received CUDA error {error}, expected 0; check the GPU's architecture")


def machine() -> dict[str, Any]:
    """What was measured on, the bandwidth of a copy in the same run included."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": copy_bandwidth(),
    }


def print_machine(found: dict[str, Any]) -> None:
    print(f"{found['device']}, PyTorch {found['torch']}, copy {found['copy_bytes_per_s'] / 1e9:,.0f} GB/s\n")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Random weights of ours, [N, K] with what comes before.

    fields: of the kernel's parameters. kept: the tensors whose addresses they have. bytes_of_matrix: with scales.
    """

    fields: dict[str, int]
    kept: tuple[torch.Tensor, ...]
    bytes_of_matrix: int


def random_weights(form: str, *shape: int) -> Weights:
    """Weights of one of the forms `WEIGHTS`; padding of INT4 tiles counts as bytes."""
    kind, _, block = form.partition("-")
    *leading, num_outputs, num_inputs = shape
    fields = {"weight_type": WEIGHT_TYPES[kind]}
    if kind == "half":
        parts = {"weight": torch.empty(shape, dtype=torch.float16, device="cuda").normal_(0, 0.01)}
    elif kind == "int8":
        parts = {
            "weight": torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda"),
            "scale": torch.rand(*leading, num_outputs, device="cuda") * 1e-3 + 1e-4,
        }
    else:
        fields["block_size"] = size = int(block.removesuffix("z"))
        tiles, count = -(-num_outputs // 16), -(-num_inputs // size)
        whole = (*leading, tiles, -(-num_inputs // 64), 512)
        parts = {
            "weight": torch.randint(0, 256, whole, dtype=torch.uint8, device="cuda"),
            "block_scale": (torch.rand(*leading, tiles, count, 16, device="cuda") * 1e-2 + 1e-3).half(),
        }
        if block.endswith("z"):
            parts["zero_points"] = torch.randint(0, 16, (*leading, tiles, count, 16), dtype=torch.uint8, device="cuda")
    fields |= {name: part.data_ptr() for name, part in parts.items()}
    total = sum(part.numel() * part.element_size() for part in parts.values())
    return Weights(fields, tuple(parts.values()), total // math.prod(leading))


def run_linear(
    doc: str | None,
    interface: type[Launcher[Any]],
    default_weights: str,
    columns: tuple[str, ...],
    measure: Callable[[Any, str, float], Iterable[tuple[dict[str, Any], list[Any]]]],
) -> None:
    """The command line of a benchmark of matmuls: a row of a table for each result, and all of them as JSON.

    measure(library, type of weights, bytes a second of a copy): results and the cells of their rows.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default=default_weights, help="of our matmul")
    parser.add_argument("--json", type=Path, help="all figures go there")
    arguments = parser.parse_args()
    library, found = interface(arguments.library), machine()
    print_machine(found)
    print("| " + " | ".join(columns) + " |")
    print("| --- " + "| ---: " * (len(columns) - 1) + "|")
    results = []
    for result, cells in measure(library, arguments.weights, found["copy_bytes_per_s"]):
        results.append(result)
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "results": results}, indent=1))
