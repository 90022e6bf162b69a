"""llama.cpp past its context, token by token beside a bundle: does it go on, how exactly, and at what price?

    python benchmarks/context_shift.py BUNDLE --model MODEL.gguf [--tokens 1024] [--json FILE]

llama.cpp can be made to do what a bundle does: evict the oldest token after the sinks before each step
(`llama_memory_seq_rm`, `llama_memory_seq_add`). Its keys are stored rotated, so each such step rotates every kept key
once more, in the type of the cache. Both get the same ids and equal fp32 weights; the difference of their logits is
llama.cpp's rounding, since a bundle never rotates a stored key again. A second llama.cpp keeps its cache in F16, which
is its default. Both run in this process, where llama.cpp's threads spin into the bundle's time, so only llama.cpp is
timed.

"drift" is the largest difference of a logit at that step, as a share of the standard deviation of the logits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from baselines import LlamaCpp, Setup
from harness import check_json, environment, table, where, write_json
from peers import llama_gguf
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.timing import Stats
from sinkrt import Session
from sinkrt.contract import load_manifest

CACHE_TYPES = {"F32": 0, "F16": 1}  # ggml's numbers
LOOKS = 8  # rows of the table


def compare(bundle: Path, gguf: Path, cache_type: str, num_tokens: int, threads: int) -> dict[str, Any]:
    """Fill both caches, then `num_tokens` steps past their end."""
    stream = load_manifest(bundle).stream
    setup = Setup(str(gguf), threads, stream.capacity, stream.num_sink_tokens)
    with Session.load(bundle, threads=threads) as session:
        ids = np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, stream.capacity + num_tokens)
        session.prefill(ids[: stream.capacity])
        peer = LlamaCpp(setup, CACHE_TYPES[cache_type], shift=1)
        peer.prefill(ids[: stream.capacity].tolist(), 0)
        drift, times_ms = [_difference(session.logits[0], peer.logits())], []
        same = 0
        for token in ids[stream.capacity :].tolist():
            ours = session.step([token])[0]
            start = time.perf_counter()
            peer.step(token)
            times_ms.append((time.perf_counter() - start) * 1e3)
            theirs = peer.logits()
            drift.append(_difference(ours, theirs))
            same += int(ours.argmax() == theirs.argmax())
    return {
        "drift": drift,
        "same_top_token": same / num_tokens,
        "llamacpp_ms": Stats.of(times_ms).median_ms,
    }


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    count, by_type = result["tokens"], result["cache_types"]
    looks = sorted({round(i * count / (LOOKS - 1)) for i in range(LOOKS)})
    rows = [[f"{look:,}", *(f"{each['drift'][look]:.1e}" for each in by_type.values())] for look in looks]
    rows += [
        ["same top token", *(f"{each['same_top_token']:.1%}" for each in by_type.values())],
        ["llama.cpp, ms a step", *(f"{each['llamacpp_ms']:.1f}" for each in by_type.values())],
    ]
    return "\n".join(
        [
            f"{result['model']}, fp32 weights, S={result['cache']['sinks']} W={result['cache']['window']}",
            where(result["environment"]),
            "",
            f"`{result['environment']['command']}`",
            "",
            table(["tokens past the window", *(f"drift, {name} cache" for name in by_type)], rows),
        ]
    )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the .gguf file that the bundle was exported from")
    parser.add_argument("--tokens", type=int, default=1024, help="steps past the end of the cache")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--cache", type=Path, help="folder for the F32 file; default: beside the bundle")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    check_json(arguments.json)
    manifest = load_manifest(arguments.bundle)
    if manifest.stream.batch != 1 or manifest.weights_dtype != "float32":
        parser.error("a bundle of fp32 and batch 1 is needed")
    if arguments.tokens < 1:
        parser.error("--tokens must be at least 1")
    cache = arguments.cache or arguments.bundle.parent / "peers"
    cache.mkdir(parents=True, exist_ok=True)
    gguf = llama_gguf(arguments.model, cache)
    result = {
        "environment": environment(arguments.threads),
        "model": manifest.model.name,
        "cache": {"sinks": manifest.stream.num_sink_tokens, "window": manifest.stream.window_size},
        "tokens": arguments.tokens,
        "cache_types": {
            name: compare(arguments.bundle, gguf, name, arguments.tokens, arguments.threads) for name in CACHE_TYPES
        },
    }
    print(show(result))
    write_json(arguments.json, result)


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of a logit as a share of the logits' spread."""
    return float(np.abs(ours - theirs).max() / ours.std())


if __name__ == "__main__":
    main()
