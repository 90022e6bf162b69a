"""The C++ runtime on a GPU, end to end: parity, endurance, speed against the floor and against others, faults.

    python benchmarks/gpu/e2e.py --tensorrt DIR --tools DIR --plugin FILE --work DIR --out DIR \
        [--model MODEL.gguf --references DIR] [--cases DIR] [--parts smollm2,shape8,..] [--seconds N]

--tensorrt: folder of libnvinfer and its parser. --tools: where benchmarks/gpu/CMakeLists.txt was built. --plugin:
libsinkexport_plugin.so for that TensorRT. --work: bundles are kept there, and used again by a second call.
--references: fp16.npz, int8.npz, int8-kv8.npz of reference.py; --cases: what cases.py made.

Each step has a time limit of its own and may fail without stopping the rest. --out gets a log for each step,
results.json after each step, and table.md, which is printed at the end. Parts, in the order in which they are run:

cases        the plugin's cases (cases.py)
smollm2      exports with --model, engines, 500 greedy tokens and logits against the references
soak         100,000 tokens: memory, latency, allocations; tokens a round trip; sampling; faults
shape8       Llama-2-7B's shapes, 8 of its 32 layers, with each of --recipes: decode against the floor
peers8       transformers, recomputation and, with --onnxruntime-gpu, that for the same
shape32      all 32 layers
peers32      peers for them

Parts of one machine's GPUs may run side by side: a process for each, with CUDA_VISIBLE_DEVICES and its own --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from decode_shapes import LARGEST_WINDOW, SHAPE_RECIPES, make_shape, peers, shape
from reference import compare
from steps import Bench, StepError

HERE = Path(__file__).parent
PARTS = ("cases", "smollm2", "soak", "shape8", "peers8", "shape32", "peers32")
RECIPES = {  # bundles of --model: options of 'sinkexport export'
    "fp16": [],
    "int8": ["--recipe", "int8-channel"],
    "int8-kv8": ["--recipe", "int8-channel", "--kv", "int8"],
}


# --- a real model -----------------------------------------------------------------------------------------------------


def export_model(bench: Bench, name: str) -> Path:
    """A bundle of --model with the plugin."""
    bundle = bench.work / f"smollm2-{name}"
    if not (bundle / "manifest.json").is_file():
        command = [
            sys.executable,
            "-m",
            "sinkexport.cli",
            "export",
            bench.arguments.model,
            "-o",
            bundle,
            "--target",
            "tensorrt",
            "--dtype",
            "fp16",
            *RECIPES[name],
        ]
        bench.run(f"export {name}", command, 240, gpu_environment=False)
    return bundle


def smollm2(bench: Bench, exports: dict[str, Future[Path]]) -> None:
    """Tokens and logits against ONNX Runtime's."""
    for name in RECIPES:
        title = f"smollm2 {name}"
        with bench.step(title):
            bundle = exports[name].result()
            bench.build(title, bundle, 240)
            with np.load(bench.arguments.references / f"{name}.npz") as file:
                want = dict(file)
            scratch = Path(tempfile.mkdtemp(dir=bench.work))
            want["prompt"].astype(np.int32).tofile(scratch / "prompt")
            count = len(want["tokens"])
            generated = bench.probe(
                f"{title} generate", "generate", bundle, scratch / "prompt", scratch / "tokens", count, 16
            )
            tokens = np.fromfile(scratch / "tokens", np.int32)
            np.concatenate([want["prompt"], want["tokens"]])[:-1].astype(np.int32).tofile(scratch / "fed")
            bench.probe(f"{title} replay", "replay", bundle, scratch / "fed", scratch / "logits", len(want["prompt"]))
            logits = np.fromfile(scratch / "logits", np.float32).reshape(count, -1)
            bench.found(title, **compare(logits, tokens, want), **generated)
            shutil.rmtree(scratch)


def soak(bench: Bench) -> None:
    """Endurance, allocations, round trips, sampling, faults: of the fp16 bundle, which `smollm2` has built."""
    bundle = bench.work / "smollm2-fp16"
    with bench.step("faults at load"):
        faults_at_load(bench, bundle)
    with bench.step("faults"):
        bench.found("faults", **bench.probe("faults", "faults", bundle))
    with bench.step("allocations"):
        bench.found("allocations", **bench.probe("allocations", "soak", bundle, 10_000, 1))
    for at_once in (1, 4, 16, 64):
        for name in RECIPES:
            if (bench.work / f"smollm2-{name}/engines/decode.engine").is_file():
                with bench.step(f"{at_once} at once {name}"):
                    bench.found(
                        f"{at_once} at once {name}",
                        **bench.probe(f"round trips {name}", "soak", bench.work / f"smollm2-{name}", 3200, at_once),
                    )
    with bench.step("logits to the host"):
        bench.found("logits to the host", **bench.probe("logits", "soak", bundle, 3000, 1, "logits"))
    with bench.step("sampling"):
        prompt = bench.work / "prompt.bin"
        np.arange(1, 40, dtype=np.int32).tofile(prompt)
        bench.found("sampling", **bench.probe("sampling", "sampling", bundle, prompt, 300))
    with bench.step("soak"):
        bench.found("soak", **bench.probe("soak", "soak", bundle, 100_000, 16, limit_s=200))


def faults_at_load(bench: Bench, bundle: Path) -> None:
    """Bundles that are broken in one way each: exit code 2 and one line."""
    engine = bundle / "engines/decode.engine"
    size = engine.stat().st_size

    def truncated(copy: Path) -> None:
        (copy / "engines/decode.engine").unlink()
        with engine.open("rb") as source, (copy / "engines/decode.engine").open("wb") as target:
            target.write(source.read(size // 2))

    def damaged_but_consistent(copy: Path) -> None:
        truncated(copy)
        edit(copy, bytes=size // 2)

    def edit(copy: Path, **facts: Any) -> None:
        raw = json.loads((copy / "manifest.json").read_text())
        raw["engines"]["decode"].update(facts)
        (copy / "manifest.json").unlink()
        (copy / "manifest.json").write_text(json.dumps(raw, indent=1, sort_keys=True))

    def plugin(content: bytes | None) -> Any:
        def change(copy: Path) -> None:
            (copy / "engines/libsinkexport_plugin.so").unlink()
            if content is not None:
                (copy / "engines/libsinkexport_plugin.so").write_bytes(content)

        return change

    broken: dict[str, Any] = {
        "no plugin": plugin(None),
        "plugin is no library": plugin(b"nothing"),
        "truncated engine": truncated,
        "truncated engine, manifest says so": damaged_but_consistent,
        "another GPU": lambda copy: edit(copy, compute_capability="8.7"),
        "another TensorRT": lambda copy: edit(copy, version="8.4.1.5"),
        "no engine": lambda copy: (copy / "engines/decode.engine").unlink(),
    }
    for name, change in broken.items():
        copy = Path(tempfile.mkdtemp(dir=bench.work)) / "bundle"
        shutil.copytree(bundle, copy, copy_function=os.link)
        change(copy)
        done = subprocess.run(
            [bench.arguments.tools / "probe", "load", copy],
            capture_output=True,
            text=True,
            check=False,
            env=bench.environment,
            timeout=60,
        )
        lines = done.stderr.strip().splitlines()
        bench.found("faults at load", **{name: {"exit": done.returncode, "lines": len(lines), "says": lines[-1:]}})
        shutil.rmtree(copy.parent)


# --- all of it --------------------------------------------------------------------------------------------------------


def cases(bench: Bench) -> None:
    """cases.py, as a step."""
    with bench.step("cases"):
        build = [] if bench.arguments.tactic_sources is None else ["--tactic-sources", bench.arguments.tactic_sources]
        tools = Path(tempfile.mkdtemp(dir=bench.work))
        for name in ("sinkrt_build", "probe", "run_engine"):
            (tools / name).symlink_to(bench.tool(name).absolute())
        copy = bench.work / "cases"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bench.arguments.cases, copy)
        failure = None
        try:
            bench.run(
                "cases",
                [
                    sys.executable,
                    HERE / "cases.py",
                    "check",
                    copy,
                    "--tools",
                    tools,
                    "--plugin",
                    bench.arguments.plugin,
                    "--timeout",
                    240,
                    "--",
                    *build,
                ],
                900,
            )
        except StepError as error:  # exit code 1: a case failed, and its row says why
            failure = error
        lines = (bench.out / "cases.log").read_text().split("\n")
        rows = [json.loads(line) for line in lines if line.startswith('{"case"')]
        if not rows and failure is not None:
            raise failure
        bench.found("cases", rows=rows)


def table(results: dict[str, Any]) -> str:
    """What matters, a line each."""
    lines = []
    for name, facts in results.items():
        if "failed" in facts:
            lines.append(f"{name:34} FAILED {facts['failed'][:200]}")
        elif name == "cases":
            lines += [
                f"case {row['case']:29} "
                + (
                    f"FAILED {row['failed'][:160]}"
                    if "failed" in row
                    else f"{'ok ' if row['passed'] else 'BAD'} error {row['error_median']:.1e} "
                    f"max {row['error_max']:.1e} agree {row['agree']:.3f}"
                )
                for row in facts["rows"]
            ]
        elif name.startswith("faults at load"):
            lines += [f"{name}: {key}: exit {v['exit']}, {v['lines']} line(s): {v['says']}" for key, v in facts.items()]
        else:
            shown = [f"{key}={round(value, 5) if isinstance(value, float) else value}" for key, value in facts.items()]
            lines.append(f"{name:34} {' '.join(shown)}")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("tensorrt", "tools", "plugin", "work", "out", "model", "references", "cases", "onnxruntime-gpu"):
        parser.add_argument(f"--{option}", type=Path, required=option in ("tools", "plugin", "work", "out"))
    parser.add_argument("--tactic-sources", type=int, help="for sinkrt_build; 0: without cuBLAS and cuDNN")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--recipes", default=",".join(SHAPE_RECIPES), help="of shape8 and shape32")
    parser.add_argument("--windows", default=f"{LARGEST_WINDOW},1020", help="of shape8 and shape32; none is larger")
    parser.add_argument("--seconds", type=float, default=3600, help="seconds for all of it")
    return parser.parse_args()


def main() -> None:
    """Run the parts. Exports, which need no GPU, go on beside."""
    arguments = parsed()
    bench, parts = Bench(arguments), arguments.parts.split(",")
    pool = ThreadPoolExecutor(4)
    exports: dict[str, Future[Path]] = {}
    if "smollm2" in parts:
        exports = {name: pool.submit(export_model, bench, name) for name in RECIPES}
    made: dict[str, Future[Path]] = {}
    for layers in (8, 32):
        if f"shape{layers}" in parts:
            made |= {
                f"{layers} {name}": pool.submit(make_shape, bench, layers, SHAPE_RECIPES[name])
                for name in arguments.recipes.split(",")
            }
        if f"peers{layers}" in parts and arguments.onnxruntime_gpu is not None:
            made[f"{layers} onnx"] = pool.submit(make_shape, bench, layers, None, "onnx")
    with bench.step("bandwidth"):
        bench.found("bandwidth", **bench.probe("bandwidth", "bandwidth"))
    work: dict[str, Callable[[], None]] = {
        "cases": lambda: cases(bench),  # first of all: exports are still under way
        "smollm2": lambda: smollm2(bench, exports),
        "soak": lambda: soak(bench),
        "shape8": lambda: shape(bench, 8, made),
        "peers8": lambda: peers(bench, 8, made),
        "shape32": lambda: shape(bench, 32, made),
        "peers32": lambda: peers(bench, 32, made),
    }
    for part, run in work.items():
        if part in parts:
            with bench.step(part):
                run()
    pool.shutdown(wait=False, cancel_futures=True)
    bench.stop()
    text = table(bench.results)
    (bench.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
