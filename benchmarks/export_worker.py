"""One export in a process of its own: its time without the imports, and its peak memory, as one JSON line.

    python benchmarks/export_worker.py sinkexport|genai FOLDER OUT fp32|VARIANT [--watch]

VARIANT is a recipe that needs no calibration, or a precision of onnxruntime-genai's builder.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness import peak_memory_mb, proportional_mb

CHECKS = ("weights", "check")
"""Steps of an export that compare the finished bundle with the model's file and with the model."""


SAMPLE_S = 0.05
"""Seconds between two looks at the memory. A look takes about 10 ms."""


class MemoryWatch(threading.Thread):
    """The most memory, in MB, with each page of a file counted once however often it is mapped (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_mb = 0.0
        self._is_done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._is_done.wait(SAMPLE_S):
            self.most_mb = max(self.most_mb, proportional_mb())

    def stop(self) -> float:
        """End the watch. Returns: `most_mb`."""
        self._is_done.set()
        self.join()
        return self.most_mb


def run_sinkexport(folder: str, out: str, variant: str, *, watches: bool = False) -> dict[str, float]:
    """Seconds to load and to export, of these the checks', and those that writing as many bytes takes.

    watches: look at the memory meanwhile, which takes time; `start_mb` is there before the model.
    """
    from sinkexport.config import ExportConfig
    from sinkexport.pipeline.export import export_loaded
    from sinkexport.quant.recipe import load_recipe
    from sinkexport.sources import load_model

    config = ExportConfig(recipe=None if variant == "fp32" else load_recipe(variant))
    start_mb, start = proportional_mb(), time.perf_counter()
    loaded = load_model(folder, "float32")
    load_s = time.perf_counter() - start
    weight_bytes = sum(p.nbytes for p in loaded.model.parameters())
    watch = MemoryWatch() if watches else None
    begun: list[tuple[str, float]] = [("start", time.perf_counter())]

    def note(step: str, _done: int, _total: int) -> None:
        if step != begun[-1][0]:
            begun.append((step, time.perf_counter()))

    export_loaded(loaded, Path(out), config, report=note)
    steps: dict[str, float] = {}
    for (step, start), (_, end) in itertools.pairwise(begun):
        steps[step] = steps.get(step, 0.0) + end - start
    print({step: round(seconds, 2) for step, seconds in steps.items()}, file=sys.stderr)
    memory = {"start_mb": start_mb} | ({} if watch is None else {"proportional_mb": watch.stop()})
    total, checks = sum(steps.values()), sum(steps.get(step, 0.0) for step in CHECKS)
    times = {
        "load_s": load_s,
        "export_s": total,
        "checks_s": checks,
        "floor_s": write_s(Path(out).parent, weight_bytes),
    }
    return {**times, **memory, "weight_bytes": weight_bytes}


def write_s(folder: Path, num_bytes: int) -> float:
    """Seconds to bring bytes to the disk: no exporter can be faster."""
    block = os.urandom(2**20)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(num_bytes // len(block) + 1):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def run_genai(folder: str, out: str, variant: str) -> dict[str, float]:
    """Seconds of onnxruntime-genai's builder for the CPU; it loads the model itself."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        options = parse_extra_options(None, folder, out, variant, "cpu", cache, [])
        create_model(None, folder, out, variant, "cpu", cache, **options)
        return {"export_s": time.perf_counter() - start}


def main() -> None:
    """Run one export and print what it took."""
    kind, folder, out, variant, *options = sys.argv[1:]
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # both exporters may print
    if kind == "sinkexport":
        result = run_sinkexport(folder, out, variant, watches="--watch" in options)
    else:
        result = run_genai(folder, out, variant)
    result["peak_mb"] = peak_memory_mb()
    print(json.dumps(result), file=reply, flush=True)


if __name__ == "__main__":
    main()
