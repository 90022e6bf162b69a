"""Decode time of a bundle on the CPU against its peers and the memory's own limit, before and past the window's end.

    python benchmarks/decode_cpu.py BUNDLE --model MODEL [--threads N] [--json FILE] [--peer-python PYTHON]

All decoders decode greedily, in fp32, from the same prompt, with the same number of threads, each in a process of
its own; they take turns of `--turn` steps (A B C A B C ..), so that whatever else the machine does hits all of them.

1. Inside: the prompt is as long as leaves every timed token inside the cache of C tokens. Until it is full all
   decoders compute the same function, and the table says how many of their tokens agree.
2. Across: each gets a cache of C tokens, a prompt of C - 2 and four steps. Who stops, says so.
3. Far: the same with a prompt of `--far` tokens, and for those who need it a larger cache.

The floor is (weight bytes that a step must read + state bytes) / measured read bandwidth of the same threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import add_peer_options, check_json, environment, table, where, write_json
from peers import model_paths
from sinkexport.bench.machine import ReadProbe, physical_cores
from sinkexport.bench.step_bytes import weight_bytes_per_step
from sinkexport.bench.timing import Stats
from sinkrt.contract import Manifest, load_manifest
from workers import DecoderError, Worker, packages, running

WARM_UP = 3  # untimed steps at the start of each turn: caches and clocks belong to the decoder again
PAUSE_S = 0.2  # between turns, for the last decoder's threads to stop spinning
ACROSS = 2  # tokens before and after the end of the cache
SLOW = {"recompute"}  # a step of these takes seconds: one a turn, without warm-up
PEERS = "genai,transformers,recompute,llamacpp"

# What a decoder's tokens depend on once the cache is full; whether it goes on at all, and how fast, is measured.
PAST = {
    "sinkexport": "exact: first S and last W tokens",
    "genai": "all tokens, in a buffer whose size is given beforehand",
    "transformers": "all tokens, in a cache that grows",
    "recompute": "exact: last C tokens",
    "llamacpp": "half the window forgotten at a time, kept keys re-rotated",
}


@dataclasses.dataclass
class Course:
    """What a worker has done in one stream. Times in ms."""

    times_ms: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    peak_mb: float = 0.0

    def turn(self, worker: Worker, count: int) -> None:
        """Warm-up steps, then `count` timed ones."""
        if worker.name in SLOW:
            count = 1
        else:
            self.tokens += worker.steps(WARM_UP).tokens
        reply = worker.steps(count)
        self.times_ms += reply.ms
        self.tokens += reply.tokens
        self.peak_mb = reply.peak_mb


def measure(
    workers: list[Worker], prompt: list[int], limit: int, *, turns: int, turn: int, threads: int
) -> tuple[dict[str, Course], dict[int, list[float]]]:
    """Prefill all, then let them take turns.

    Returns: courses by name, and GB/s by number of threads, one figure a turn. The memory has its turn as well, because
    on a shared machine its bandwidth changes from minute to minute, and a floor is one only for what ran at that time.
    """
    probes = {n: ReadProbe(n) for n in sorted({1, threads})}
    bandwidth: dict[int, list[float]] = {n: [] for n in probes}
    courses = {worker.name: Course() for worker in workers}
    for worker in workers:
        print(f"{worker.name}: prefill of {len(prompt)} tokens", file=sys.stderr)
        courses[worker.name].tokens += worker.prefill(prompt, limit).tokens
    for number in range(turns):
        print(f"turn {number + 1} of {turns}", file=sys.stderr)
        for worker in workers:
            time.sleep(PAUSE_S)
            courses[worker.name].turn(worker, turn)
        time.sleep(PAUSE_S)
        for n, probe in probes.items():
            bandwidth[n].append(probe.gb_per_s(repeats=3))
    return courses, bandwidth


def cross(workers: list[Worker], prompt: list[int], capacity: int) -> dict[str, str | None]:
    """Take each over the end of a cache of `capacity` tokens; what it said if it stopped."""
    stopped: dict[str, str | None] = {}
    for worker in workers:
        print(f"{worker.name}: over the end of the cache", file=sys.stderr)
        stopped[worker.name] = None
        try:
            worker.prefill(prompt[: capacity - ACROSS], capacity)
            worker.steps(2 * ACROSS)
        except DecoderError as error:
            stopped[worker.name] = str(error)
    return stopped


def agreement(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first one that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def report(
    inside: dict[str, Course],
    far: dict[str, Course],
    stopped: dict[str, str | None],
    bandwidth: dict[int, list[float]],
    manifest: Manifest,
    weights: int,
    *,
    threads: int,
) -> dict[str, Any]:
    """All figures, ready for JSON. weights: bytes of them that a step reads."""
    floor_ms = (weights + manifest.state_bytes) / statistics.median(bandwidth[threads]) / 1e6
    ours = inside["sinkexport"]
    decoders = {}
    for name, course in inside.items():
        stats = Stats.of(course.times_ms)
        decoders[name] = {
            **dataclasses.asdict(stats),
            "tokens_per_s": 1e3 / stats.median_ms,
            "ratio_to_floor": stats.median_ms / floor_ms,
            "times_ours": stats.median_ms / Stats.of(ours.times_ms).median_ms,
            "peak_memory_mb": course.peak_mb,
            "same_tokens": agreement(ours.tokens, course.tokens),
            "tokens": len(course.tokens),
            "past_window": PAST[name],
            "stopped": stopped[name],
        }
        if name in far:
            there = Stats.of(far[name].times_ms)
            decoders[name]["far"] = {
                **dataclasses.asdict(there),
                "ratio_to_inside": there.median_ms / stats.median_ms,
                "peak_memory_mb": far[name].peak_mb,
            }
    return {
        "model": manifest.model.name,
        "cache": {"sinks": manifest.stream.num_sink_tokens, "window": manifest.stream.window_size},
        "bandwidth_gb_per_s": {
            str(n): {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for n, each in bandwidth.items()
        },
        "bytes_per_step": {"weights": weights, "states": manifest.state_bytes},
        "floor_ms": floor_ms,
        "decoders": decoders,
    }


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    inside, far = result["context_tokens"], result["far_tokens"]
    bandwidth = ", ".join(
        f"{each['median']:.1f} GB/s ({each['min']:.1f} to {each['max']:.1f}) with {n} thread{'s' * (n != '1')}"
        for n, each in result["bandwidth_gb_per_s"].items()
    )
    size = result["bytes_per_step"]
    rows = []
    for name, c in result["decoders"].items():
        there = c.get("far")
        past = c["past_window"] + (f'; stops at its end: "{c["stopped"]}"' if c["stopped"] else "; goes on")
        rows.append(
            [
                name,
                f"{c['median_ms']:.1f}",
                f"{c['p99_ms']:.1f}",
                f"{c['tokens_per_s']:.1f}",
                f"{c['ratio_to_floor']:.2f}",
                f"{c['peak_memory_mb']:,.0f}",
                f"{c['same_tokens']} of {c['tokens']}",
                *([f"{there['median_ms']:.1f}", f"{there['peak_memory_mb']:,.0f}"] if there else ["", ""]),
                past,
            ]
        )
    rows.append(["floor", f"{result['floor_ms']:.1f}", "", f"{1e3 / result['floor_ms']:.1f}", "1.00", *[""] * 5])
    headers = [
        "decoder",
        "ms median",
        "p99",
        "tokens/s",
        "x floor",
        "peak MB",
        "same tokens",
        f"ms at {far[0]:,}",
        f"peak MB at {far[0]:,}",
        "past the window",
    ]
    return "\n".join(
        [
            f"{result['model']}, fp32, S={result['cache']['sinks']} W={result['cache']['window']}, "
            f"context {inside[0]:,} to {inside[1]:,} tokens, then from {far[0]:,} on, batch 1",
            where(result["environment"]),
            f"memory reads {bandwidth}; a step reads {size['weights'] / 1e6:.0f} MB of weights and "
            f"{size['states'] / 1e6:.0f} MB of state",
            "",
            f"`{result['environment']['command']}`",
            "",
            table(headers, rows, texts=(0, len(headers) - 1)),
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="what the bundle was exported from: folder or .gguf")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=16, help="timed steps in a turn")
    parser.add_argument("--context", type=int, help="prompt length; default: as long as stays inside the cache")
    parser.add_argument("--far", type=int, help="prompt length past the window, 0 for none; default: four times C")
    parser.add_argument("--far-turns", type=int, default=4)
    add_peer_options(parser, PEERS)
    arguments = parser.parse_args()
    check_json(arguments.json)

    manifest = load_manifest(arguments.bundle)
    if manifest.stream.batch != 1 or manifest.weights_dtype != "float32":
        parser.error("the peers run in fp32 with batch 1: export the bundle so")
    capacity = manifest.stream.capacity
    new_tokens = 1 + arguments.turns * (WARM_UP + arguments.turn)
    context = capacity - new_tokens if arguments.context is None else arguments.context
    if context < 1 or capacity <= ACROSS:
        parser.error(f"{new_tokens} tokens do not fit a cache of {capacity}: pass --context")
    far_context = 4 * capacity if arguments.far is None else arguments.far
    far_limit = far_context + 1 + arguments.far_turns * (WARM_UP + arguments.turn)

    names = ["sinkexport", *(name for name in arguments.peers.split(",") if name)]
    if unknown := set(names) - set(PAST):
        parser.error(f"unknown peers {sorted(unknown)}: choose from {PEERS}")
    cache = arguments.cache or arguments.bundle.parent / "peers"
    paths = model_paths(names, arguments.bundle, arguments.model, cache, arguments.peer_python)
    prompt = np.random.default_rng(0).integers(0, manifest.model.vocab_size, max(capacity, far_context)).tolist()
    threads = arguments.threads
    with running(
        paths, arguments.peer_python, threads=threads, capacity=capacity, sinks=manifest.stream.num_sink_tokens
    ) as workers:
        found = environment(threads, packages(workers))  # before our own work adds to the load
        inside, bandwidth = measure(
            workers, prompt[:context], context + new_tokens, turns=arguments.turns, turn=arguments.turn, threads=threads
        )
        stopped = cross(workers, prompt, capacity)
        far: dict[str, Course] = {}
        if far_context:
            far, _ = measure(
                workers,
                prompt[:far_context],
                far_limit,
                turns=arguments.far_turns,
                turn=arguments.turn,
                threads=threads,
            )
    weights = weight_bytes_per_step(arguments.bundle, manifest)
    result = report(inside, far, stopped, bandwidth, manifest, weights, threads=threads) | {
        "environment": found,
        "context_tokens": [context, context + new_tokens],
        "far_tokens": [far_context, far_limit],
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
