"""Where the time of a decode step on the CPU goes, by kind of node, and what the process keeps in memory.

    python benchmarks/step_breakdown.py BUNDLE [--steps 200] [--threads N] [--json FILE]

The step is timed first, in a session as users have it. ONNX Runtime's profiler then records each node of as many
steps. What is left of the step beside the nodes is overhead: ONNX Runtime's and Python's own time between them. A
profiled step takes longer than a plain one, so the overhead is rather too small here. Memory is that of the first
session after its prefill graph has run. The proportional size counts each page once, if no other process has it mapped;
`memory.py` measures it in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from harness import check_json, environment, peak_memory_mb, proportional_mb, table, where, write_json
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.timing import Stats
from sinkrt import Session
from sinkrt.backends.cpu_library import checked_library
from sinkrt.backends.ort_graph import HostDevice
from sinkrt.contract import Manifest, TensorSpec, load_manifest

WARM_UP = 20


def timed_steps(bundle: Path, steps: int, threads: int) -> dict[str, Any]:
    """Times of plain steps after a prompt that fills the cache but for them; memory in MB."""
    before_mb = proportional_mb()
    manifest = load_manifest(bundle)
    random = np.random.default_rng(0)
    prompt = random.integers(0, manifest.model.vocab_size, max(1, manifest.stream.capacity - steps - WARM_UP))
    times_ms = []
    with Session.load(bundle, backend="ort", threads=threads) as session:
        ids = np.array([session.prefill(prompt.tolist())[0].argmax()], np.int64)  # [B=1]
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            ids[0] = session.step(ids)[0].argmax()
            times_ms.append((time.perf_counter() - start) * 1e3)
        memory = {"before": before_mb, "proportional": proportional_mb(), "resident": peak_memory_mb()}
    expected_mb = (manifest.weights_bytes + manifest.state_bytes) / 1e6
    return {
        "median_ms": Stats.of(times_ms[WARM_UP:]).median_ms,
        "memory_mb": {**memory, "weights_and_states": expected_mb},
    }


def profiled_ms(bundle: Path, manifest: Manifest, steps: int, threads: int) -> dict[tuple[str, str], float]:
    """Milliseconds a step of each node of the decode graph, the mean over the steps, by its name and operator."""
    graph = manifest.graphs["decode"]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if manifest.target == "cpu":
        options.register_custom_ops_library(str(checked_library()))
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/steps"
        session = ort.InferenceSession(bundle / graph.file, options, providers=["CPUExecutionProvider"])
        binding, device = session.io_binding(), HostDevice()
        arrays = {spec.name: device.zeros(spec) for spec in (*graph.inputs, *graph.outputs)}
        arrays["position"].flat[-1] = manifest.stream.capacity
        states = [(state, device.zeros(TensorSpec(state.input, state.shape, state.dtype))) for state in manifest.states]
        for spec in graph.inputs:
            device.bind(binding.bind_input, spec.name, arrays[spec.name])
        for spec in graph.outputs:
            device.bind(binding.bind_output, spec.name, arrays[spec.name])
        for state, array in states:
            device.bind(binding.bind_input, state.input, array)
            device.bind(binding.bind_output, state.output, array)
        for _ in range(WARM_UP + steps):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times_us: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times_us[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    return {node: float(np.mean(durations[-steps:])) / 1e3 for node, durations in times_us.items()}


def kinds(file: Path) -> dict[str, str]:
    """What each node of a graph is: its operator, and of matmuls of the CPU library their sizes."""
    found = {}
    for node in onnx.load(str(file), load_external_data=False).graph.node:
        fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        sizes = [str(fields[name]) for name in ("in_features", "out_features") if name in fields]
        gated = " gated" if fields.get("gated") else ""
        found[node.name] = f"{node.op_type} {' x '.join(sizes)}{gated}".strip()
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
    rows.append(["step", str(result["nodes"]), f"{step_ms:.3f}", ""])
    grown = memory["proportional"] - memory["before"]
    return "\n".join(
        [
            f"{result['model']}, {result['bundle']}: {result['nodes_a_layer']} nodes a layer",
            where(result["environment"]),
            "",
            table(["kind of node", "nodes", "ms a step", "share"], rows),
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
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    check_json(arguments.json)

    bundle, threads = arguments.bundle, arguments.threads
    found = environment(threads)
    timed = timed_steps(bundle, arguments.steps, threads)
    manifest = load_manifest(bundle)
    times = profiled_ms(bundle, manifest, arguments.steps, threads)
    kind_of = kinds(bundle / manifest.graphs["decode"].file)
    result = {
        **report(times, kind_of, manifest.model.num_layers, timed["median_ms"]),
        "memory_mb": timed["memory_mb"],
        "environment": found,
        "model": manifest.model.name,
        "bundle": bundle.name,
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
