"""Decode time of a bundle on the CPU against onnxruntime-genai, transformers and the memory's own limit.

    python benchmarks/decode_cpu.py BUNDLE --model MODEL [--threads N] [--json FILE] [--peer-python PYTHON]

All contenders decode greedily, in fp32, from the same prompt, with the same number of threads, each in a process of
its own; they take turns of `--turn` steps (A B C A B C ..), so that whatever else the machine does hits all of them.
The prompt is as long as leaves every timed token inside the cache: until the window is full all contenders compute
the same function, and the table says how many of their tokens agree.

The floor is (weight bytes that a step must read + state bytes) / measured read bandwidth of the same threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bandwidth import ReadProbe
from harness import Stats, environment, table, write_json
from peers import genai_folder, plain_folder
from sinkrt.contract import Manifest, load_manifest

HERE = Path(__file__).parent
WARM_UP = 3  # untimed steps at the start of each turn: caches and clocks belong to the contender again
PAUSE_S = 0.2  # between turns, for the last contender's threads to stop spinning
ITEM_BYTES = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}


class Worker:
    """A contender's process."""

    def __init__(self, name: str, kind: str, path: Path, *, python: str, threads: int, max_length: int) -> None:
        self.name = name
        self.times_ms: list[float] = []
        self.tokens: list[int] = []
        self.peak_mb = 0.0
        command = [python, str(HERE / "decode_worker.py"), kind, str(path), f"--threads={threads}"]
        self._process = subprocess.Popen(
            [*command, f"--max-length={max_length}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._reply()

    def prefill(self, ids: list[int]) -> None:
        """Start the stream."""
        self.tokens += self._ask(op="prefill", ids=ids)["tokens"]

    def turn(self, count: int) -> None:
        """Warm-up steps, then `count` timed ones."""
        self.tokens += self._ask(op="steps", count=WARM_UP)["tokens"]
        reply = self._ask(op="steps", count=count)
        self.times_ms += reply["ms"]
        self.tokens += reply["tokens"]
        self.peak_mb = reply["peak_mb"]

    def close(self) -> None:
        """Let the process end; kill it if it does not."""
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with exit code {self._process.wait()}; see above")
        return dict(json.loads(line))


def weight_bytes_per_step(graph: Path) -> int:
    """Bytes of weights that one decode step has to read.

    Every initializer once, but of a table that is only gathered from (an untied embedding) just the rows: nothing.
    """
    model = onnx.load(graph, load_external_data=False)
    read_whole = {
        name
        for node in model.graph.node
        for i, name in enumerate(node.input)
        if not (node.op_type == "Gather" and i == 0)
    }
    return sum(
        int(np.prod(tensor.dims)) * ITEM_BYTES.get(tensor.data_type, 0)
        for tensor in model.graph.initializer
        if tensor.name in read_whole
    )


def measure(workers: list[Worker], prompt: list[int], *, turns: int, turn: int, threads: int) -> dict[int, list[float]]:
    """Prefill all, then let them take turns.

    Returns: GB/s by number of threads, one figure a turn. The memory has its turn as well, because on a shared machine
    its bandwidth changes from minute to minute, and a floor is one only for what ran at the same time.
    """
    probes = {n: ReadProbe(n) for n in sorted({1, threads})}
    bandwidth: dict[int, list[float]] = {n: [] for n in probes}
    for worker in workers:
        print(f"{worker.name}: prefill of {len(prompt)} tokens", file=sys.stderr)
        worker.prefill(prompt)
    for number in range(turns):
        print(f"turn {number + 1} of {turns}", file=sys.stderr)
        for worker in workers:
            time.sleep(PAUSE_S)
            worker.turn(turn)
        time.sleep(PAUSE_S)
        for n, probe in probes.items():
            bandwidth[n].append(probe.gb_per_s(repeats=3))
    return bandwidth


def agreement(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first one that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def report(
    workers: list[Worker],
    bandwidth: dict[int, list[float]],
    manifest: Manifest,
    weights: int,
    *,
    threads: int,
    context: tuple[int, int],
) -> dict[str, Any]:
    """All figures, ready for JSON. weights: bytes of them that a step reads."""
    floor_ms = (weights + manifest.state_bytes) / statistics.median(bandwidth[threads]) / 1e6
    ours = workers[0]
    contenders = {}
    for worker in workers:
        stats = Stats.of(worker.times_ms)
        contenders[worker.name] = {
            **dataclasses.asdict(stats),
            "tokens_per_s": 1e3 / stats.median_ms,
            "ratio_to_floor": stats.median_ms / floor_ms,
            "times_ours": stats.median_ms / Stats.of(ours.times_ms).median_ms,
            "peak_memory_mb": worker.peak_mb,
            "same_tokens": agreement(ours.tokens, worker.tokens),
            "tokens": len(worker.tokens),
        }
    return {
        "environment": environment(threads),
        "model": manifest.model.name,
        "cache": {"sinks": manifest.stream.num_sink_tokens, "window": manifest.stream.window_size},
        "context_tokens": list(context),
        "bandwidth_gb_per_s": {
            str(n): {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for n, each in bandwidth.items()
        },
        "bytes_per_step": {"weights": weights, "states": manifest.state_bytes},
        "floor_ms": floor_ms,
        "contenders": contenders,
    }


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    facts, context = result["environment"], result["context_tokens"]
    bandwidth = ", ".join(
        f"{each['median']:.1f} GB/s ({each['min']:.1f} to {each['max']:.1f}) with {n} thread{'s' * (n != '1')}"
        for n, each in result["bandwidth_gb_per_s"].items()
    )
    size = result["bytes_per_step"]
    rows = [
        [
            name,
            f"{c['median_ms']:.1f}",
            f"{c['p99_ms']:.1f}",
            f"{c['tokens_per_s']:.1f}",
            f"{c['ratio_to_floor']:.2f}",
            f"{c['times_ours']:.2f}",
            f"{c['peak_memory_mb']:.0f}",
            f"{c['same_tokens']} of {c['tokens']}",
        ]
        for name, c in result["contenders"].items()
    ]
    rows.append(["floor", f"{result['floor_ms']:.1f}", "", f"{1e3 / result['floor_ms']:.1f}", "1.00", "", "", ""])
    return "\n".join(
        [
            f"{result['model']}, fp32, S={result['cache']['sinks']} W={result['cache']['window']}, "
            f"context {context[0]} to {context[1]} tokens, batch 1",
            f"{facts['cpu']}, {facts['logical_cpus']} CPUs, {facts['threads']} threads, commit {facts['commit']}",
            f"read bandwidth: {bandwidth}",
            f"a step reads {size['weights'] / 1e6:.0f} MB of weights and {size['states'] / 1e6:.0f} MB of states",
            "",
            table(
                ["contender", "median ms", "p99 ms", "tokens/s", "x floor", "x ours", "peak MB", "same tokens"], rows
            ),
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="what the bundle was exported from: folder or .gguf")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=16, help="timed steps in a turn")
    parser.add_argument("--context", type=int, help="prompt length; default: as long as stays inside the cache")
    parser.add_argument("--peers", default="genai,transformers", help="comma-separated; empty for none")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of an environment with the peers")
    parser.add_argument("--cache", type=Path, help="folder for converted models; default: beside the bundle")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()

    manifest = load_manifest(arguments.bundle)
    if manifest.stream.batch != 1 or manifest.weights_dtype != "float32":
        parser.error("the peers run in fp32 with batch 1: export the bundle so")
    new_tokens = 1 + arguments.turns * (WARM_UP + arguments.turn)
    context = manifest.stream.capacity - new_tokens if arguments.context is None else arguments.context
    if context < 1:
        parser.error(f"{new_tokens} tokens do not fit a cache of {manifest.stream.capacity}: pass --context")
    cache = arguments.cache or arguments.bundle.parent / "peers"
    cache.mkdir(parents=True, exist_ok=True)

    peers = [name for name in arguments.peers.split(",") if name]
    plain = plain_folder(arguments.model, cache) if peers else None
    paths = {"sinkexport": arguments.bundle}
    for name in peers:
        assert plain is not None
        paths[name] = genai_folder(plain, cache, arguments.peer_python) if name == "genai" else plain
    prompt = np.random.default_rng(0).integers(0, manifest.model.vocab_size, context).tolist()

    workers: list[Worker] = []
    try:
        for name, path in paths.items():
            python = sys.executable if name == "sinkexport" else arguments.peer_python
            workers.append(
                Worker(name, name, path, python=python, threads=arguments.threads, max_length=context + new_tokens)
            )
        bandwidth = measure(
            workers, prompt, turns=arguments.turns, turn=arguments.turn, threads=arguments.threads
        )
    finally:
        for worker in workers:
            worker.close()
    result = report(
        workers,
        bandwidth,
        manifest,
        weight_bytes_per_step(arguments.bundle / manifest.graphs["decode"].file),
        threads=arguments.threads,
        context=(context, context + new_tokens),
    )
    print(show(result))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
