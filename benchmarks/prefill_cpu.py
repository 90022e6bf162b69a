"""Speed of taking in a prompt on the CPU: bundles against their peers and against one of them, token by token.

    python benchmarks/prefill_cpu.py BUNDLE .. --model MODEL [--tokens 1000] [--json FILE] [--peer-python PYTHON]

All decoders run with the same number of threads, each in a process of its own, and take turns prompt by prompt. Each
turn has a prompt of its own, different from its first token on, since some decoders keep prefixes. The clock stops when
the first new token is chosen. The table says for how many prompts that was the first bundle's token. Decoders in fp32
must agree there while the prompt fits the cache; quantised weights may choose another one.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from decode_quantised import label as bundle_label
from harness import add_peer_options, check_json, environment, table, where, write_json
from peers import model_paths
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.timing import Ratio, Stats
from sinkrt.contract import Manifest, load_manifest
from workers import Worker, packages, running

WARM_UP_TOKENS = 130
PAUSE_S = 0.2  # for the last decoder's threads to stop spinning
PEERS = "sinkexport-steps,genai,transformers,llamacpp"
HEADERS = ("decoder", "ms median", "min", "tokens/s", "x first's time", "same token", "peak MB")


@dataclasses.dataclass
class Course:
    """What a worker has done: a time and the first new token for each prompt, as far as it reports tokens."""

    times_ms: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    peak_mb: float = 0.0


def measure(workers: list[Worker], prompts: list[list[int]], warm_up: list[int]) -> dict[str, Course]:
    """What each has done, by name. All see the same prompts; `warm_up` is fed once, untimed."""
    courses = {worker.name: Course() for worker in workers}
    for worker in workers:
        worker.prefill(warm_up, len(warm_up) + 1)
    for number, prompt in enumerate(prompts):
        for worker in workers:
            print(f"{worker.name}: {number + 1} of {len(prompts)}", file=sys.stderr)
            time.sleep(PAUSE_S)
            reply = worker.prefill(prompt, len(prompt) + 1)
            course = courses[worker.name]
            course.times_ms += reply.ms
            course.tokens += reply.tokens
            course.peak_mb = reply.peak_mb
    return courses


def report(courses: dict[str, Course], num_tokens: int) -> dict[str, Any]:
    """Figures by decoder; "times_ours" is how many times as long as the first it takes, compared turn by turn."""
    ours = next(iter(courses.values()))
    return {
        name: {
            **dataclasses.asdict(stats := Stats.of(course.times_ms)),
            "times_ms": course.times_ms,
            "tokens": course.tokens,
            "tokens_per_s": num_tokens * 1e3 / stats.median_ms,
            "times_ours": dataclasses.asdict(
                Ratio.of_turns([[ms] for ms in course.times_ms], [[ms] for ms in ours.times_ms])
            ),
            "same_tokens": sum(a == b for a, b in zip(course.tokens, ours.tokens, strict=True))
            if course.tokens
            else None,
            "peak_memory_mb": course.peak_mb,
        }
        for name, course in courses.items()
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
            "not reported" if c["same_tokens"] is None else f"{c['same_tokens']} of {result['repeats']}",
            f"{c['peak_memory_mb']:.0f}",
        ]
        for name, c in result["decoders"].items()
    ]
    return "\n".join(
        [
            f"{result['model']}, {result['repeats']} prompts of {result['prompt_tokens']:,} tokens in turns, batch 1",
            where(result["environment"]),
            "",
            f"`{result['environment']['command']}`",
            "",
            table(HEADERS, rows, texts=(0, 5)),
        ]
    )


def label(path: Path, manifest: Manifest) -> str:
    """A name for a decoder, also of several bundles of one recipe."""
    return f"{bundle_label(path, manifest)[:-1]}, chunks of {manifest.stream.chunk_size})"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--model", type=Path, required=True, help="what they were exported from: folder or .gguf")
    parser.add_argument("--tokens", type=int, default=1_000, help="length of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    add_peer_options(parser, PEERS)
    arguments = parser.parse_args()
    check_json(arguments.json)

    manifests = {label(path, manifest := load_manifest(path)): manifest for path in arguments.bundles}
    if len(manifests) < len(arguments.bundles):
        parser.error("two bundles have the same name and recipe")
    first = next(iter(manifests.values()))
    if any(m.stream.batch != 1 for m in manifests.values()):
        parser.error("bundles of one stream are compared: export with --batch 1")
    capacity = min(m.stream.capacity for m in manifests.values())
    if not WARM_UP_TOKENS <= arguments.tokens <= capacity:
        parser.error(f"--tokens must be {WARM_UP_TOKENS} to {capacity}, where all compute the same function")
    peers = [name for name in arguments.peers.split(",") if name]
    cache = arguments.cache or arguments.bundles[0].parent / "peers"
    paths = dict(zip(manifests, arguments.bundles, strict=True))
    paths |= model_paths(peers, arguments.bundles[0], arguments.model, cache, arguments.peer_python)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, first.model.vocab_size, arguments.tokens).tolist() for _ in range(arguments.repeats)]
    warm_up = random.integers(0, first.model.vocab_size, WARM_UP_TOKENS).tolist()
    sinks = first.stream.num_sink_tokens
    with running(paths, arguments.peer_python, threads=arguments.threads, capacity=capacity, sinks=sinks) as workers:
        found = environment(arguments.threads, packages(workers))  # before our own work adds to the load
        decoders = report(measure(workers, prompts, warm_up), arguments.tokens)
    result = {
        "environment": found,
        "model": first.model.name,
        "prompt_tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "decoders": decoders,
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
