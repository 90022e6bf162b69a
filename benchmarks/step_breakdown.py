"""Where the time of a decode step on the CPU goes, by kind of node, and what the process keeps in memory.

    python benchmarks/step_breakdown.py BUNDLE [--steps 200] [--chunk] [--threads N] [--json FILE]

Two sessions as users have them take turns: one is timed, in the other ONNX Runtime's profiler records each node. All
figures are medians. What is left of the step beside the nodes is overhead: ONNX Runtime's and Python's own time between
them. Nodes take longer in a profiled step than in a plain one, so the overhead is too small here, or less than nothing
where nodes are short. --chunk: the same of a whole chunk of a prompt instead of a step, with a full cache.

Memory is that of the timed session after its prefill graph has run. The proportional size counts each page once, if no
other process has it mapped; `memory.py` measures it in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from harness import check_json, environment, peak_memory_mb, proportional_mb, table, where, write_json
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.timing import Stats
from sinkexport.util.node_fields import read_fields
from sinkrt import Session
from sinkrt.contract import Manifest, load_manifest

WARM_UP = 20


def measured(bundle: Path, manifest: Manifest, steps: int, threads: int, *, in_chunks: bool) -> dict[str, Any]:
    """Median milliseconds of plain steps, and of each node of profiled ones by its name and operator; memory in MB.

    A step is a chunk with `in_chunks`. The cache is full before the first that counts.
    """
    before_mb = proportional_mb()
    random = np.random.default_rng(0)
    size = manifest.stream.chunk_size if in_chunks else 1
    prompt = random.integers(0, manifest.model.vocab_size, manifest.stream.capacity).tolist()
    tokens = random.integers(0, manifest.model.vocab_size, (WARM_UP + steps, size))
    times_ms = []
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(Session.load(bundle, backend="ort", threads=threads))
        plain.prefill(prompt)
        memory = {"before": before_mb, "proportional": proportional_mb(), "resident": peak_memory_mb()}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with profiled_graphs(folder) as graphs:
            watched = stack.enter_context(Session.load(bundle, backend="ort", threads=threads))
        watched.prefill(prompt)
        for ids in tokens:
            start = time.perf_counter()
            feed(plain, ids)
            times_ms.append((time.perf_counter() - start) * 1e3)
            feed(watched, ids)
        files = [Path(graph.end_profiling()) for graph in graphs]
        nodes_ms = profiled_ms(files[1 if in_chunks else 0], steps)
    expected_mb = (manifest.weights_bytes + manifest.state_bytes) / 1e6
    return {
        "median_ms": Stats.of(times_ms[WARM_UP:]).median_ms,
        "nodes_ms": nodes_ms,
        "memory_mb": {**memory, "weights_and_states": expected_mb},
    }


def feed(session: Session, ids: np.ndarray) -> None:
    """ids: int64 [n], one token as a step, more as a chunk."""
    if ids.size == 1:
        session.step(ids)
    else:
        session.prefill(ids.tolist())


@contextlib.contextmanager
def profiled_graphs(folder: str) -> Iterator[list[ort.InferenceSession]]:
    """Yields: the graphs that are opened inside, the decode graph first, each with a profile in `folder`."""
    made: list[ort.InferenceSession] = []
    plain = ort.InferenceSession

    def opened(path: Path, options: ort.SessionOptions, **more: Any) -> ort.InferenceSession:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/{len(made)}"
        made.append(plain(path, options, **more))
        return made[-1]

    with mock.patch.object(ort, "InferenceSession", opened):
        yield made


def profiled_ms(profile: Path, steps: int) -> dict[tuple[str, str], float]:
    """Median milliseconds of each node of the last steps of a profile, by its name and operator."""
    times_us: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times_us[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    return {node: float(np.median(durations[-steps:])) / 1e3 for node, durations in times_us.items()}


def kinds(file: Path) -> dict[str, str]:
    """What each node of a graph is: its operator, and of matmuls of the CPU library their sizes."""
    found = {}
    for node in ir.load(file).graph:
        fields = read_fields(node)
        sizes = [str(fields[name]) for name in ("in_features", "out_features") if name in fields]
        gated = " gated" if fields.get("gated") else ""
        found[str(node.name)] = f"{node.op_type} {' x '.join(sizes)}{gated}".strip()
    return found


def report(times: dict[tuple[str, str], float], kind_of: dict[str, str], layers: int, step_ms: float) -> dict[str, Any]:
    """Nodes and milliseconds a step of each kind, the slowest first."""
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for (name, operator), ms in times.items():
        groups[kind_of.get(name, operator)].append(ms)
    rows = {kind: {"nodes": len(ms), "ms": sum(ms)} for kind, ms in groups.items()}
    ordered = dict(sorted(rows.items(), key=lambda row: -row[1]["ms"]))
    nodes_ms = sum(row["ms"] for row in rows.values())
    return {
        "kinds": ordered,
        "nodes": len(times),
        "nodes_a_layer": len(times) // layers,
        "nodes_ms": nodes_ms,
        "step_ms": step_ms,
        "overhead_ms": step_ms - nodes_ms,
    }


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    step_ms, memory = result["step_ms"], result["memory_mb"]
    rows = [
        [kind, str(row["nodes"]), f"{row['ms']:.3f}", f"{row['ms'] / step_ms:.1%}"]
        for kind, row in result["kinds"].items()
    ]
    rows.append(["between the nodes", "", f"{result['overhead_ms']:.3f}", f"{result['overhead_ms'] / step_ms:.1%}"])
    rows.append(["run", str(result["nodes"]), f"{step_ms:.3f}", ""])
    grown = memory["proportional"] - memory["before"]
    return "\n".join(
        [
            f"{result['model']}, {result['bundle']}, {result['graph']} graph: {result['nodes_a_layer']} nodes a layer",
            where(result["environment"]),
            "",
            table(["kind of node", "nodes", "ms a run", "share"], rows),
            "",
            f"memory: {memory['proportional']:.0f} MB, each page once, {memory['before']:.0f} MB of it before loading; "
            f"{grown:.0f} MB for {memory['weights_and_states']:.0f} MB of weights and states: "
            f"{grown / memory['weights_and_states']:.2f}; most resident {memory['resident']:.0f} MB",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--chunk", action="store_true", help="chunks of a prompt instead of steps")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    check_json(arguments.json)

    bundle, threads = arguments.bundle, arguments.threads
    found = environment(threads)
    manifest = load_manifest(bundle)
    role = "prefill" if arguments.chunk else "decode"
    if role not in manifest.graphs:
        parser.error(
            f"{bundle}: received a bundle without a prefill graph, expected one: export it with a larger --chunk"
        )
    found_ms = measured(bundle, manifest, arguments.steps, threads, in_chunks=arguments.chunk)
    kind_of = kinds(bundle / manifest.graphs[role].file)
    result = {
        **report(found_ms["nodes_ms"], kind_of, manifest.model.num_layers, found_ms["median_ms"]),
        "memory_mb": found_ms["memory_mb"],
        "environment": found,
        "model": manifest.model.name,
        "bundle": bundle.name,
        "graph": role,
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
