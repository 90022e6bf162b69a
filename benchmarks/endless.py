"""Milliseconds a token and resident memory over a long stream: ours, llama.cpp with context shift, a growing cache.

    python benchmarks/endless.py BUNDLE --model MODEL.gguf --json benchmarks/results/endless.json \
        [--decoders sinkexport,llamacpp,transformers] [--tokens 1000000] [--seconds 600] [--threads N] [--again]

Each decoder runs alone, in a process of its own, and feeds itself its own greedy tokens, one by one, from an empty
cache. Its process ends after `--tokens` tokens or `--seconds` seconds of decoding, whichever comes first. For every
`--bucket` tokens it reports the median, the 99th percentile and the largest time, and the resident memory at the end.
Nothing is left out: spikes count.

The JSON file keeps what each decoder gave, with its machine. A decoder that is in the file is skipped, so that a run
that was interrupted goes on with the next decoder; `--again` measures it anew. No network is needed.
`benchmarks/plot_endless.py` draws the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import check_json, environment, table, write_json
from peers import float32_gguf, plain_folder
from sinkexport.bench.machine import physical_cores
from sinkrt.contract import load_manifest

HERE = Path(__file__).parent
DECODERS = ("sinkexport", "llamacpp", "transformers")
LOADING_S = 600  # beyond --seconds, for a decoder to load before its process is ended
COLUMNS = ("end", "median_ms", "p99_ms", "max_ms", "resident_mb")


def model_path(name: str, bundle: Path, model: Path, cache: Path) -> Path:
    """What a decoder loads; converted from `model` into `cache` if it is not there."""
    if name == "sinkexport":
        return bundle
    return float32_gguf(model, cache) if name == "llamacpp" else plain_folder(model, cache)


def measure(name: str, path: Path, arguments: argparse.Namespace, cache: tuple[int, int]) -> dict[str, Any]:
    """Run one decoder in its process until its limit. cache: sinks, capacity."""
    command = [sys.executable, str(HERE / "endless_worker.py"), name, str(path), f"--sinks={cache[0]}"]
    command += [f"--capacity={cache[1]}", f"--threads={arguments.threads}", f"--bucket={arguments.bucket}"]
    command += [f"--tokens={arguments.tokens}", f"--seconds={arguments.seconds}"]
    facts = environment(arguments.threads)
    facts["command"] = re.sub(r"(?:/[\w.+-]+)+/", "", facts["command"])  # names of files, wherever they lay
    threads = str(arguments.threads)
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    buckets: dict[str, list[float]] = {column: [] for column in COLUMNS}
    last: dict[str, Any] = {}
    deadline = time.monotonic() + arguments.seconds + LOADING_S
    assert worker.stdout is not None
    try:
        for line in worker.stdout:
            last = json.loads(line)
            for column in COLUMNS if "end" in last else ():
                buckets[column].append(last[column])
            if len(buckets["end"]) % 16 == 1 and "end" in last:
                print(f"{name}: {last['end']:,} tokens, {last['median_ms']:.1f} ms, {last['resident_mb']:,.0f} MB")
            if time.monotonic() > deadline:
                break
    finally:
        worker.kill()
        worker.wait()
    if "ended" not in last:
        raise SystemExit(f"{name}: its process ended after {int(max([0, *buckets['end']])):,} tokens; see above")
    return {**last, "environment": facts, "buckets": buckets}


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    rows = []
    for name, each in result["decoders"].items():
        buckets, whole = each["buckets"], each["whole"]
        rows.append(
            [
                name,
                f"{buckets['end'][-1]:,}",
                f"{buckets['median_ms'][0]:.1f}",
                f"{buckets['median_ms'][-1]:.1f}",
                f"{whole['p99_ms']:.1f}",
                f"{whole['max_ms']:.0f}",
                f"{buckets['resident_mb'][0]:,.0f}",
                f"{buckets['resident_mb'][-1]:,.0f}",
                each["ended"],
            ]
        )
    headers = ["decoder", "tokens", "ms first", "ms last", "p99", "max", "MB first", "MB last", "ended by"]
    return table(headers, rows, texts=(0, len(headers) - 1))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the .gguf file that the bundle was exported from")
    parser.add_argument("--decoders", default=",".join(DECODERS), help="comma-separated, in this order")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each decoder at most")
    parser.add_argument("--seconds", type=float, default=600.0, help="of decoding, for each decoder at most")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--bucket", type=int, default=256, help="tokens that share a figure")
    parser.add_argument("--cache", type=Path, help="folder for converted models; default: beside the bundle")
    parser.add_argument("--again", action="store_true", help="measure decoders that the file already has")
    parser.add_argument("--json", type=Path, required=True, help="the record, added to")
    arguments = parser.parse_args()
    check_json(arguments.json)
    manifest = load_manifest(arguments.bundle)
    if manifest.stream.batch != 1 or manifest.weights_dtype != "float32":
        parser.error("a bundle of fp32 and batch 1 is needed")
    names = arguments.decoders.split(",")
    if unknown := set(names) - set(DECODERS):
        parser.error(f"unknown decoders {sorted(unknown)}: choose from {', '.join(DECODERS)}")
    if min(arguments.tokens, arguments.seconds, arguments.bucket, arguments.threads) <= 0:
        parser.error("--tokens, --seconds, --bucket and --threads must be positive")

    cache = arguments.cache or arguments.bundle.parent / "peers"
    cache.mkdir(parents=True, exist_ok=True)
    stream = manifest.stream
    result = {
        "model": manifest.model.name,
        "dtype": manifest.weights_dtype,
        "cache": {"sinks": stream.num_sink_tokens, "window": stream.window_size},
        "decoders": {},
    }
    if arguments.json.exists() and arguments.json.stat().st_size:
        found = json.loads(arguments.json.read_text(encoding="utf-8"))
        if any(found[key] != result[key] for key in ("model", "dtype", "cache")):
            parser.error(f"'{arguments.json}' is of another model or cache: choose another name")
        result = found
    for name in names:
        if name in result["decoders"] and not arguments.again:
            print(f"{name}: in the file, skipped")
            continue
        path = model_path(name, arguments.bundle, arguments.model, cache)
        result["decoders"][name] = measure(name, path, arguments, (stream.num_sink_tokens, stream.capacity))
        write_json(arguments.json, result)
    print(show(result))


if __name__ == "__main__":
    main()
