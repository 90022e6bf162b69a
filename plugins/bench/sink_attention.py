"""Fused sink attention beside PyTorch on one GPU: a step over a full cache, times with CUDA events.

    python plugins/bench/sink_attention.py --library build/plugins/libsinkexport_capi.so [--json FILE] [--quick]

Each figure is the median of replays of a CUDA graph that runs every one of several sets of buffers once, more than the
L2 holds together; p99 is of replays as well. The floor is the bytes of the cache, once, at the bandwidth of a large
device-to-device copy (bytes read and written) measured in the same run. GB = 1e9 bytes.

unfused: what PyTorch does without a kernel for it: write k and v at the slot, turn the query back for the sinks, two
matmuls, cat, softmax, two matmuls (no copy of the cache, no repeated heads).
SDPA: scaled_dot_product_attention's flash backend over a dense cache of the same length; writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[2]))
from plugins.bench import common
from plugins.capi.header import DTYPES
from plugins.capi.kernels import SinkAttention, SinkAttentionParams

NUM_SINKS = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step of B streams over a full cache of C tokens, float16."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    capacity: int
    head_dim: int
    note: str = ""

    def cache_bytes(self, is_int8: bool) -> int:
        """K and V, scales included, sinks in float16."""
        rows = 2 * self.batch * self.num_kv_heads
        window = self.head_dim + 2 if is_int8 else 2 * self.head_dim
        return rows * ((self.capacity - NUM_SINKS) * window + NUM_SINKS * 2 * self.head_dim)

    def __str__(self) -> str:
        return f"B{self.batch} {self.num_q_heads}/{self.num_kv_heads} C{self.capacity} D{self.head_dim}"


SHAPES = (
    Shape(1, 32, 32, 1024, 128, "Llama-2-7B"),
    Shape(1, 32, 8, 1024, 128, "Llama-3-8B"),
    Shape(1, 32, 8, 4096, 128),
    Shape(1, 32, 8, 16384, 128),
    Shape(1, 32, 8, 65536, 128),
    Shape(4, 32, 32, 4096, 128),
    Shape(16, 32, 8, 4096, 128),
    Shape(64, 32, 8, 4096, 128),
    Shape(64, 32, 8, 1024, 128),
    Shape(32, 32, 8, 4096, 64),
    Shape(16, 32, 32, 2048, 80),
    Shape(16, 32, 32, 2048, 96),
    Shape(16, 8, 4, 4096, 256),
    Shape(16, 64, 4, 4096, 128),
)
QUICK = SHAPES[:2] + SHAPES[6:7]


def sets_past_l2(num_bytes: int) -> int:
    """Sets of buffers that hold four L2 caches together."""
    l2_bytes: int = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-4 * l2_bytes // num_bytes))


def time_us(runs: list[Callable[[], Any]]) -> dict[str, float]:
    """Median and p99 of one run, in microseconds, all runs being in one graph that is replayed."""

    def all_runs() -> None:
        for run in runs:
            run()

    return common.stats(common.times_us(all_runs, len(runs)))


class Fused:
    """One set of the kernel's buffers, at a position far past the capacity."""

    def __init__(self, library: SinkAttention, shape: Shape, is_int8: bool, workspace: torch.Tensor | None) -> None:
        b, h, d, window = shape.batch, shape.num_kv_heads, shape.head_dim, shape.capacity - NUM_SINKS

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.float16)

        def rows() -> torch.Tensor:
            if is_int8:
                return torch.randint(-127, 128, (b, h, window, d), device="cuda", dtype=torch.int8)
            return normal(b, h, window, d)

        half = d // 2
        self.tensors = {
            "q": normal(b, shape.num_q_heads, 1, d),
            "k": normal(b, h, 1, d),
            "v": normal(b, h, 1, d),
            "out": normal(b, shape.num_q_heads, 1, d),
            "sink_k": normal(b, h, NUM_SINKS, d),
            "sink_v": normal(b, h, NUM_SINKS, d),
            "window_k": rows(),
            "window_v": rows(),
            "position": torch.tensor([[1 << 4, 1234]] * b, device="cuda", dtype=torch.int32),
            "shift_cos": torch.rand(b, 1, half, device="cuda"),
            "shift_sin": torch.rand(b, 1, half, device="cuda"),
        }
        if is_int8:
            for name in ("window_k_scale", "window_v_scale"):
                self.tensors[name] = torch.rand(b, h, window, device="cuda").half() / 64
        self.params = SinkAttentionParams(
            batch=b,
            num_tokens=1,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=h,
            head_dim=d,
            num_sinks=NUM_SINKS,
            window_size=window,
            dtype=DTYPES["float16"],
            int8_window=is_int8,
            settled_states=True,  # launches go round several sets
            rotary_dim=d,
            scale=d**-0.5,
            **{name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )
        common.check(library, self.params)
        self.library = library
        if workspace is None:
            workspace = torch.empty(library.workspace_bytes(self.params) + 16, dtype=torch.uint8, device="cuda")
        self.workspace = workspace

    def __call__(self) -> None:
        common.launch(self.library, self.params, self.workspace.data_ptr())


class Unfused:
    """The same step by PyTorch's operators, float16."""

    def __init__(self, fused: Fused, shape: Shape) -> None:
        self.t, self.shape = fused.tensors, shape
        self.slot = torch.tensor([17], device="cuda")

    def __call__(self) -> torch.Tensor:
        t, shape, d = self.t, self.shape, self.shape.head_dim
        t["window_k"].index_copy_(2, self.slot, t["k"])
        t["window_v"].index_copy_(2, self.slot, t["v"])
        cos, sin = t["shift_cos"][:, None].half(), t["shift_sin"][:, None].half()  # [B, 1, 1, D/2]
        first, second = t["q"].chunk(2, dim=-1)
        q_sink = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
        grouped = (shape.batch, shape.num_kv_heads, shape.num_q_heads // shape.num_kv_heads, d)
        logits = torch.cat((q_sink.view(grouped) @ t["sink_k"].mT, t["q"].view(grouped) @ t["window_k"].mT), dim=-1) * (
            d**-0.5
        )  # [B, Hkv, G, C]
        weights = logits.softmax(-1, dtype=torch.float32).half()
        out = weights[..., :NUM_SINKS] @ t["sink_v"] + weights[..., NUM_SINKS:] @ t["window_v"]
        return out.view(shape.batch, shape.num_q_heads, 1, d)


class Sdpa:
    """PyTorch's flash attention over a dense cache."""

    def __init__(self, shape: Shape) -> None:
        def normal(heads: int, count: int) -> torch.Tensor:
            return torch.randn(shape.batch, heads, count, shape.head_dim, device="cuda", dtype=torch.float16)

        self.q, self.k, self.v = (
            normal(shape.num_q_heads, 1),
            *(normal(shape.num_kv_heads, shape.capacity) for _ in range(2)),
        )

    def __call__(self) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            self.q, self.k, self.v, enable_gqa=self.q.shape[1] != self.k.shape[1]
        )


def fused_runs(library: SinkAttention, shape: Shape, is_int8: bool) -> list[Fused]:
    runs: list[Fused] = []
    for _ in range(sets_past_l2(shape.cache_bytes(is_int8))):
        runs.append(Fused(library, shape, is_int8, runs[0].workspace if runs else None))
    return runs


def measure(library: SinkAttention, shape: Shape, bandwidth: float) -> dict[str, Any]:
    """All figures of one shape."""
    row: dict[str, Any] = {"shape": str(shape), "note": shape.note}
    runs = fused_runs(library, shape, is_int8=False)
    count = len(runs)
    for name, is_int8 in (("fp16", False), ("int8", True)):
        if is_int8:
            runs = []
            torch.cuda.empty_cache()
            runs = fused_runs(library, shape, is_int8=True)
        times = time_us(list(runs))
        num_bytes = shape.cache_bytes(is_int8)
        row[name] = {
            "bytes": num_bytes,
            "floor_us": num_bytes / bandwidth * 1e6,
            "us": times["median_us"],
            "p99_us": times["p99_us"],
            "share": num_bytes / bandwidth * 1e6 / times["median_us"],
        }
        if not is_int8:
            row["unfused_us"] = time_us([Unfused(run, shape) for run in runs])["median_us"]
    runs = []
    torch.cuda.empty_cache()
    dense = [Sdpa(shape) for _ in range(count)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        row["sdpa_us"] = time_us(list(dense))["median_us"]
    del dense
    torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    args = parser.parse_args()
    library = SinkAttention(args.library)
    machine = common.machine()
    common.print_machine(machine)
    print(f"{'shape':26} {'kv':4}" + "".join(f" {x:>8}" for x in ("MB", "floor us", "us", "p99 us")), end="")
    print(f" {'share':>6} {'unfused':>8} {'SDPA':>8}")
    rows = []
    for shape in QUICK if args.quick else SHAPES:
        row = measure(library, shape, machine["copy_bytes_per_s"])
        rows.append(row)
        for kv in ("fp16", "int8"):
            one = row[kv]
            print(
                f"{row['shape']:26} {kv:4} {one['bytes'] / 1e6:8.1f} {one['floor_us']:8.1f} {one['us']:8.1f} "
                f"{one['p99_us']:8.1f} {one['share']:6.1%} {row['unfused_us']:8.1f} {row['sdpa_us']:8.1f}",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps({**machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
