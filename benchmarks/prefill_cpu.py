"""Speed of taking in a prompt on the CPU: a bundle against its peers and against itself, token by token.

    python benchmarks/prefill_cpu.py BUNDLE --model MODEL [--tokens 1000] [--json FILE] [--peer-python PYTHON]

All decoders run in fp32 with the same number of threads, each in a process of its own, and take turns prompt by
prompt. The clock stops when the first new token is chosen; the table says whether all chose the same one, as they must
while the prompt fits the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import add_peer_options, check_json, environment, table, where, write_json
from peers import model_paths
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.timing import Ratio, Stats
from sinkrt.contract import load_manifest
from workers import Worker, packages, running

WARM_UP_TOKENS = 130
PAUSE_S = 0.2  # for the last decoder's threads to stop spinning
PEERS = "sinkexport-steps,genai,transformers,llamacpp"


def measure(workers: list[Worker], prompt: list[int], repeats: int) -> dict[str, tuple[list[float], int]]:
    """Milliseconds of each repeat, and the first new token, by name."""
    times_ms: dict[str, list[float]] = {worker.name: [] for worker in workers}
    first: dict[str, int] = {}
    for worker in workers:
        worker.prefill(prompt[:WARM_UP_TOKENS], len(prompt) + 1)
    for number in range(repeats):
        for worker in workers:
            print(f"{worker.name}: {number + 1} of {repeats}", file=sys.stderr)
            time.sleep(PAUSE_S)
            reply = worker.prefill(prompt, len(prompt) + 1)
            times_ms[worker.name] += reply.ms
            first[worker.name] = reply.tokens[0]
    return {name: (times_ms[name], first[name]) for name in times_ms}


def report(measured: dict[str, tuple[list[float], int]], num_tokens: int) -> dict[str, Any]:
    """Figures by decoder; "times_ours" is how many times as long it takes, compared turn by turn."""
    our_ms, our_token = measured["sinkexport"]
    return {
        name: {
            **dataclasses.asdict(Stats.of(times_ms)),
            "tokens_per_s": num_tokens * 1e3 / Stats.of(times_ms).median_ms,
            "times_ours": dataclasses.asdict(Ratio.of_turns([[ms] for ms in times_ms], [[ms] for ms in our_ms])),
            "same_token": token == our_token,
        }
        for name, (times_ms, token) in measured.items()
    }


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    rows = [
        [
            name,
            f"{c['median_ms']:,.0f}",
            f"{c['min_ms']:,.0f}",
            f"{c['tokens_per_s']:.1f}",
            f"{c['times_ours']['median']:.2f}",
            "yes" if c["same_token"] else "NO",
        ]
        for name, c in result["decoders"].items()
    ]
    return "\n".join(
        [
            f"{result['model']}, fp32, a prompt of {result['prompt_tokens']:,} tokens, chunks of "
            f"{result['chunk_size']}, batch 1, {result['repeats']} repeats in turns",
            where(result["environment"]),
            "",
            f"`{result['environment']['command']}`",
            "",
            table(["decoder", "ms median", "min", "tokens/s", "x ours", "same token"], rows),
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="what the bundle was exported from: folder or .gguf")
    parser.add_argument("--tokens", type=int, default=1_000, help="length of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    add_peer_options(parser, PEERS)
    arguments = parser.parse_args()
    check_json(arguments.json)

    manifest = load_manifest(arguments.bundle)
    stream = manifest.stream
    if stream.batch != 1 or manifest.weights_dtype != "float32":
        parser.error("the peers run in fp32 with batch 1: export the bundle so")
    if not WARM_UP_TOKENS <= arguments.tokens <= stream.capacity:
        parser.error(f"--tokens must be {WARM_UP_TOKENS} to {stream.capacity}, where all compute the same function")
    names = ["sinkexport", *(name for name in arguments.peers.split(",") if name)]
    cache = arguments.cache or arguments.bundle.parent / "peers"
    paths = model_paths(names, arguments.bundle, arguments.model, cache, arguments.peer_python)
    prompt = np.random.default_rng(0).integers(0, manifest.model.vocab_size, arguments.tokens).tolist()
    with running(
        paths, arguments.peer_python, threads=arguments.threads, capacity=stream.capacity, sinks=stream.num_sink_tokens
    ) as workers:
        found = environment(arguments.threads, packages(workers))  # before our own work adds to the load
        decoders = report(measure(workers, prompt, arguments.repeats), arguments.tokens)
    result = {
        "environment": found,
        "model": manifest.model.name,
        "prompt_tokens": arguments.tokens,
        "chunk_size": stream.chunk_size,
        "repeats": arguments.repeats,
        "decoders": decoders,
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
