"""Decode time of random models of real shapes against the floor, and beside others: steps of e2e.py."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import Future
from pathlib import Path

from steps import Bench

HERE = Path(__file__).parent
SHAPE_RECIPES = {"fp16": None, "int8": "int8-channel"}
LARGEST_WINDOW = 4092


def make_shape(bench: Bench, layers: int, recipe: str | None, target: str = "tensorrt") -> Path:
    """A random bundle with the largest window."""
    name = f"shape{layers}-{recipe or 'fp16'}-{target}"
    if not (bench.work / name / "manifest.json").is_file():
        options = ["--recipe", recipe] if recipe else []
        command = [
            sys.executable,
            HERE / "shape.py",
            bench.work / name,
            "--layers",
            layers,
            "--window",
            LARGEST_WINDOW,
            "--target",
            target,
            *options,
        ]
        bench.run(f"make {name}", command, 480, gpu_environment=False)
    return bench.work / name


def step_bytes(bundle: Path) -> int:
    """Weights and states that a step reads."""
    from sinkexport.bench.step_bytes import weight_bytes_per_step
    from sinkrt.contract import load_manifest

    manifest = load_manifest(bundle)
    return weight_bytes_per_step(bundle, manifest) + manifest.state_bytes


def shape(bench: Bench, layers: int, made: dict[str, Future[Path]]) -> None:
    """Decode against the floor."""
    copy_gb_per_s = bench.results["bandwidth"]["copy_gb_per_s"]
    for recipe in bench.arguments.recipes.split(","):
        for window in map(int, bench.arguments.windows.split(",")):
            title = f"{layers} layers, {recipe}, W={window}"
            with bench.step(title):
                bundle = made[f"{layers} {recipe}"].result()
                if window != LARGEST_WINDOW:
                    smaller = bench.work / f"{bundle.name}-{window}"
                    command = [sys.executable, HERE / "shape.py", smaller, "--from", bundle, "--window", window]
                    bench.run(f"window {title}", command, 60, gpu_environment=False)
                    bundle = smaller
                bench.build(title, bundle, 400)
                floor_ms = step_bytes(bundle) / copy_gb_per_s / 1e6
                for at_once in (1, 16):
                    found = bench.probe(f"decode {title}", "soak", bundle, 640, at_once)
                    ms = found["ms_per_token"]
                    bench.found(
                        title,
                        floor_ms=round(floor_ms, 4),
                        **{
                            f"ms_per_token_{at_once}": ms,
                            f"times_floor_{at_once}": round(ms / floor_ms, 3),
                            "device_bytes": found["device_bytes"],
                        },
                    )
                for engine in (bundle / "engines").glob("*.engine"):  # the next one needs its room
                    engine.unlink()


def peers(bench: Bench, layers: int, made: dict[str, Future[Path]]) -> None:
    """What others take."""
    python = [sys.executable, HERE / "peers.py"]
    for task in ("recompute", "transformers"):
        with bench.step(f"{layers} layers, {task}"):
            command = [*python, task, "--layers", layers, "--context", LARGEST_WINDOW + 4]
            out = bench.run(f"{task} {layers}", command, 120, gpu_environment=False)
            bench.found(f"{layers} layers, {task}", **json.loads(out.strip().split("\n")[-1]))
    if f"{layers} onnx" in made:
        with bench.step(f"{layers} layers, ort-cuda"):
            bundle = made[f"{layers} onnx"].result()
            command = [*python, "ort-cuda", bundle]
            if bench.arguments.onnxruntime_gpu is not None:
                paths = [str(bench.arguments.onnxruntime_gpu), *filter(None, [os.environ.get("PYTHONPATH")])]
                command = ["env", f"PYTHONPATH={os.pathsep.join(paths)}", *command]
            out = bench.run(f"ort-cuda {layers}", command, 240, gpu_environment=False)
            bench.found(f"{layers} layers, ort-cuda", **json.loads(out.strip().split("\n")[-1]))
