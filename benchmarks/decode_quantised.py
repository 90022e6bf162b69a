"""Decode time of quantised bundles against floating point and peers' quantised models, with the bytes behind it.

    python benchmarks/decode_quantised.py BUNDLE .. --model MODEL [--peers LIST] [--threads N] [--json FILE]
                                          [--peer-python PYTHON]

The first BUNDLE is what the others are compared with: floating point. All decoders decode greedily from the same
prompt with the same number of threads, each in a process of its own, and take turns of `--turn` steps, as in
decode_cpu.py; every timed token is inside the cache of the first bundle. Models differ here, so tokens do too: what
quantisation costs is the matter of quantisation.py.

A step has to read all weights once, an embedding table that is only gathered from excepted, and all keys and values.
The floor is that over the read bandwidth that the machine had in the same turns. What fits the processor's caches can
be below it. For peers the cache counts as if it were as long as the first bundle's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from decode_cpu import WARM_UP, Course, measure
from harness import add_peer_options, check_json, environment, table, where, write_json
from peers import LLAMA_TYPES, model_paths
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.step_bytes import weight_bytes_of_file, weight_bytes_per_step
from sinkexport.bench.timing import Stats
from sinkrt.contract import Manifest, load_manifest
from workers import kind_of, packages, running

PEERS = "genai:int4,genai:fp32,xllamacpp,openvino"
HEADERS = ("decoder", "cache", "MB a step", "ms median", "p99", "tokens/s", "GB/s", "x floor", "speed-up", "peak MB")
PEER_CACHES = {
    "genai": ("float32", 4),
    "llamacpp": ("float32", 4),
    "xllamacpp": ("float16", 2),
    "openvino": ("uint8", 1),
}
"""Type of each peer's keys and values, as it is run here, and its bytes an element."""


def weights_read(name: str, path: Path) -> int:
    """Bytes of weights that a step of a decoder reads. A GGUF file has little else."""
    if kind_of(name) == "sinkexport":
        return weight_bytes_per_step(path, load_manifest(path))
    return weight_bytes_of_file(path / "model.onnx") if path.is_dir() else path.stat().st_size


def caches(manifests: dict[str, Manifest], peers: list[str]) -> dict[str, tuple[str, int]]:
    """Type and bytes of each decoder's keys and values."""
    found = {
        name: ("int8" if m.quantization is not None and m.quantization.kv == "int8" else m.weights_dtype, m.state_bytes)
        for name, m in manifests.items()
    }
    first_bytes = next(iter(manifests.values())).state_bytes  # of the first, which is float32
    for name in peers:
        dtype, element = PEER_CACHES[kind_of(name)]
        found[name] = (dtype, first_bytes * element // 4)
    return found


def report(
    courses: dict[str, Course], bandwidth: list[float], weights: dict[str, int], caches: dict[str, tuple[str, int]]
) -> dict[str, Any]:
    """All figures, ready for JSON. weights: bytes that a step reads. caches: as of `caches`."""
    gb_per_s = statistics.median(bandwidth)
    first = Stats.of(next(iter(courses.values())).times_ms).median_ms
    decoders = {}
    for name, course in courses.items():
        stats = Stats.of(course.times_ms)
        dtype, cache_bytes = caches[name]
        step_bytes = weights[name] + cache_bytes
        decoders[name] = {
            **dataclasses.asdict(stats),
            "tokens_per_s": 1e3 / stats.median_ms,
            "weights_bytes": weights[name],
            "cache_bytes": cache_bytes,
            "cache": dtype,
            "gb_per_s": step_bytes / stats.median_ms / 1e6,
            "ratio_to_floor": stats.median_ms / (step_bytes / gb_per_s / 1e6),
            "speed_up": first / stats.median_ms,
            "peak_memory_mb": course.peak_mb,
        }
    spread = {"median": gb_per_s, "min": min(bandwidth), "max": max(bandwidth)}
    return {"bandwidth_gb_per_s": spread, "decoders": decoders}


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    rows = [
        [
            name,
            c["cache"],
            f"{(c['weights_bytes'] + c['cache_bytes']) / 1e6:.0f}",
            f"{c['median_ms']:.2f}",
            f"{c['p99_ms']:.1f}",
            f"{c['tokens_per_s']:.0f}",
            f"{c['gb_per_s']:.1f}",
            f"{c['ratio_to_floor']:.2f}",
            f"{c['speed_up']:.2f}",
            f"{c['peak_memory_mb']:.0f}",
        ]
        for name, c in result["decoders"].items()
    ]
    bandwidth, cache = result["bandwidth_gb_per_s"], result["cache"]
    start, end = result["context_tokens"]
    return "\n".join(
        [
            f"{result['model']}, S={cache['sinks']} W={cache['window']}, context {start:,} to {end:,} tokens, batch 1",
            where(result["environment"]),
            f"memory reads {bandwidth['median']:.1f} GB/s ({bandwidth['min']:.1f} to {bandwidth['max']:.1f})",
            "",
            f"`{result['environment']['command']}`",
            "",
            table(HEADERS, rows, texts=(0, 1)),
        ]
    )


def label(path: Path, manifest: Manifest) -> str:
    """A name for a decoder, also of several bundles of one recipe."""
    recipe = manifest.weights_dtype if manifest.quantization is None else manifest.quantization.recipe
    return f"sinkexport:{path.name} ({manifest.target}, {recipe})"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--model", type=Path, required=True, help="what they were exported from: folder or .gguf")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=16, help="timed steps in a turn")
    add_peer_options(parser, PEERS, f"genai has fp32, int4; llamacpp F32, {', '.join(LLAMA_TYPES)}")
    arguments = parser.parse_args()
    check_json(arguments.json)

    manifests = {label(path, manifest := load_manifest(path)): manifest for path in arguments.bundles}
    if len(manifests) < len(arguments.bundles):
        parser.error("two bundles have the same name and recipe")
    stream = next(iter(manifests.values())).stream
    if any(m.stream.batch != 1 for m in manifests.values()):
        parser.error("bundles of one stream are compared: export with --batch 1")
    new_tokens = 1 + arguments.turns * (WARM_UP + arguments.turn)
    context = stream.capacity - new_tokens
    if context < 1:
        parser.error(f"{new_tokens} tokens do not fit a cache of {stream.capacity}: lower --turns or --turn")
    peers = [name for name in arguments.peers.split(",") if name]
    cache = arguments.cache or arguments.bundles[0].parent / "peers"
    paths = dict(zip(manifests, arguments.bundles, strict=True))
    paths |= model_paths(peers, arguments.bundles[0], arguments.model, cache, arguments.peer_python)
    vocab_size = next(iter(manifests.values())).model.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocab_size, context).tolist()
    threads = arguments.threads
    with running(
        paths, arguments.peer_python, threads=threads, capacity=stream.capacity, sinks=stream.num_sink_tokens
    ) as workers:
        found = environment(threads, packages(workers))  # before our own work adds to the load
        courses, bandwidth = measure(
            workers, prompt, stream.capacity, turns=arguments.turns, turn=arguments.turn, threads=threads
        )
    weights = {name: weights_read(name, path) for name, path in paths.items()}
    result = report(courses, bandwidth[threads], weights, caches(manifests, peers)) | {
        "model": next(iter(manifests.values())).model.name,
        "cache": {"sinks": stream.num_sink_tokens, "window": stream.window_size},
        "environment": found,
        "context_tokens": [context, stream.capacity],
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
