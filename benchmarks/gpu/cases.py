"""Small bundles for the TensorRT plugin that differ in one thing each, and what they must compute.

    python benchmarks/gpu/cases.py make FOLDER [NAME ..]                 (no GPU; ONNX Runtime and torch)
    python benchmarks/gpu/cases.py check FOLDER [NAME ..] --tools DIR --plugin FILE [-- options of sinkrt_build]

A case is a model with random weights, a Llama unless attention has more: B streams, a prompt in chunks, steps over two
wraps of the window. Expected logits come from ONNX Runtime's CPU in float32: a bundle of the same weights, recipe and
window type without plugin, whose matmuls do not round their inputs.
`check` builds engines, decodes with the C++ runtime and prints a line of JSON with the errors, relative to the norm of
the expected logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

S, W, CHUNK, PROMPT, STEPS = 4, 60, 16, 100, 150
VOCAB = 1024
SMALL_VOCAB = 256
# Median and largest relative error that pass: float16 matmuls and attention against float32. With INT8 experts
# rounding tips a choice now and then; the nodes in NumPy, with exact attention, are as far (largest 0.095).
LIMITS = (0.02, 0.06)
INT8_EXPERTS = (0.02, 0.2)


def _case(head_dim: int = 64, **others: Any) -> dict[str, Any]:
    return {
        "head_dim": head_dim,
        "recipe": None,
        "kv": "fp",
        "batch": 1,
        "separate": False,
        "family": "llama",
        "sink_scale": False,
        "limits": LIMITS,
        "vocab": VOCAB,
        "sinks": S,
        **others,
    }


_TWO_STREAMS = {
    "heads by layer": "laguna",
    "values smaller than keys": "mimo_v2_flash",
    "shared caches": "gemma3n",
    "shared caches of two sizes": "gemma4",
    "two attentions a layer": "diffllama",
    "latent attention": "minicpm3",
    "latent attention, experts": "deepseek_v3",
    "short convolution": "lfm2",
    "Mamba-2 beside attention": "falcon_h1",
    "Mamba-2": "nemotron_h",
    "Mamba": "jamba",
    "gated delta rule": "olmo_hybrid",
    "lightning attention": "minimax",
    "Kimi delta attention": "kimi_linear",
    "convolutions in attention": "zaya",
}
"""Cases of two streams that differ in their family alone."""

CASES: dict[str, dict[str, Any]] = {
    "fp16 matmuls": _case(),
    "int8 weights": _case(recipe="int8-channel"),
    "int4 weights": _case(recipe="int4-nearest"),
    "3 streams, int4 weights, int8 window": _case(recipe="int4-nearest", kv="int8", batch=3),
    "int8 window": _case(recipe="int8-channel", kv="int8"),
    "int8 window, fp16 matmuls": _case(kv="int8"),
    "3 streams": _case(recipe="int8-channel", batch=3),
    "3 streams, int8 window": _case(recipe="int8-channel", kv="int8", batch=3),
    "separate buffers": _case(recipe="int8-channel", separate=True),
    "separate buffers, int8 window": _case(recipe="int8-channel", kv="int8", separate=True),
    "heads of 80": _case(80, recipe="int8-channel"),
    "heads of 96": _case(96, recipe="int8-channel"),
    "heads of 128": _case(128, recipe="int8-channel"),
    "heads of 256": _case(256, recipe="int8-channel"),
    # Without a recipe: ONNX Runtime rounds the inputs of INT8 matmuls to 8 bits, more than these models forgive.
    "alibi": _case(family="bloom"),
    "alibi, int8 window": _case(kv="int8", family="bloom"),
    "sink logit": _case(family="flint"),
    "sink scale": _case(sink_scale=True),
    "gate": _case(family="qwen3_5"),
    "3 streams, gate": _case(family="qwen3_5", batch=3),
    # 4 experts of 12 for each token: in a step of one stream, of several, and in a chunk, where many take the same.
    "experts": _case(family="mixtral"),
    "experts, int8 weights": _case(recipe="int8-channel", family="mixtral", limits=INT8_EXPERTS),
    "3 streams, experts": _case(family="mixtral", batch=3),
    "experts in one layer": _case(family="qwen3_moe"),
    "linear attention": _case(family="qwen3_5_linear"),
    "3 streams, linear attention": _case(family="qwen3_5_linear", batch=3),
    "linear attention, experts": _case(family="qwen3_next"),
    "3 streams, experts, int8 weights": _case(recipe="int8-channel", batch=3, family="mixtral", limits=INT8_EXPERTS),
    **{name: _case(family=family, batch=2, vocab=SMALL_VOCAB) for name, family in _TWO_STREAMS.items()},
    "RG-LRU": _case(family="recurrent_gemma", batch=2, vocab=SMALL_VOCAB, sinks=0),
}


def folder_of(root: Path, name: str) -> Path:
    """Where a case lies."""
    return root / name.replace(" ", "-").replace(",", "")


def make(root: Path, names: Sequence[str]) -> None:
    """Write bundles, tokens and expected logits."""
    import torch
    from case_models import case_model
    from reference import float_matmuls
    from sinkexport.config import ExportConfig
    from sinkexport.pipeline.export import export_loaded
    from sinkexport.quant.recipe import load_recipe
    from sinkexport.sources import LoadedModel
    from sinkrt import Session

    for index, (name, case) in enumerate(CASES.items()):
        if name not in names:
            continue
        torch.manual_seed(index)
        model = case_model(case["family"], case["vocab"], case["head_dim"], has_sink_scale=case["sink_scale"])
        geometry = {
            "num_sink_tokens": case["sinks"],
            "window_size": W,
            "batch": case["batch"],
            "chunk_size": CHUNK,
            "kv": case["kv"],
            "recipe": None if case["recipe"] is None else load_recipe(case["recipe"]),
            "sink_tuning": _sink_tuning(model) if case["sink_scale"] else None,
        }
        folder = folder_of(root, name)
        export_loaded(
            LoadedModel(model, None, name), folder / "expected", ExportConfig(**geometry, target="onnx"), overwrite=True
        )
        export_loaded(
            LoadedModel(model.to(torch.float16), None, name),
            folder / "bundle",
            ExportConfig(**geometry, target="tensorrt", dtype="fp16"),
            overwrite=True,
        )
        tokens = np.random.default_rng(index).integers(0, case["vocab"], (PROMPT + STEPS, case["batch"]), np.int32)
        tokens.tofile(folder / "tokens.bin")
        with float_matmuls(folder / "expected") as exact, Session.load(exact) as session:
            if case["separate"]:  # decode only, from the first token
                rows = [session.step(row).copy() for row in tokens]
            else:
                rows = [session.prefill(tokens[:PROMPT].T).copy()]
                rows += [session.step(row).copy() for row in tokens[PROMPT:]]
        np.save(folder / "expected.npy", np.stack(rows).astype(np.float16))  # [N, B, vocab]
        for file in (folder / "expected").iterdir():
            file.unlink()
        (folder / "expected").rmdir()
        print(f"{name}: made", flush=True)


def _sink_tuning(model: Any) -> Any:
    """Factors far from 1 in every head."""
    from sinkexport.variants.sink_tuning import SinkTuningFile, TunedModel

    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    facts = TunedModel(name="case", architecture=type(model).__name__, num_layers=layers, num_q_heads=heads)
    factors = tuple(tuple((0.1, 8.0, 0.3, 20.0)[head % 4] for head in range(heads)) for _ in range(layers))
    return SinkTuningFile(model=facts, first_token_scale=factors)


def check(
    root: Path, names: Sequence[str], tools: Path, plugin: Path, build_options: list[str], timeout_s: float, jobs: int
) -> list[dict[str, Any]]:
    """Build and run cases, `jobs` at a time. A failure of one is reported in its row."""

    def checked(name: str) -> dict[str, Any]:
        row = {"case": name, **_checked(folder_of(root, name), CASES[name], tools, plugin, build_options, timeout_s)}
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(checked, names))


def _checked(
    folder: Path, case: dict[str, Any], tools: Path, plugin: Path, build_options: list[str], timeout_s: float
) -> dict[str, Any]:
    logits_file = folder / "logits.bin"
    want = np.load(folder / "expected.npy").astype(np.float32)
    row: dict[str, Any] = {}
    try:
        built = _run([tools / "sinkrt_build", folder / "bundle", "--plugin", plugin, *build_options], timeout_s)
        row["build_s"] = [float(line.split(", ")[-1].removesuffix(" s")) for line in built.splitlines()]
        run: list[Any] = [folder / "bundle", folder / "tokens.bin", logits_file]
        if case["separate"]:
            ways = {"": [tools / "run_engine", *run]}
        else:  # the prompt in chunks, and all of it in steps
            ways = {"": [tools / "probe", "replay", *run, PROMPT], "steps_": [tools / "probe", "replay", *run, 0]}
        passed = True
        for way, command in ways.items():
            _run(command, timeout_s)
            got = np.fromfile(logits_file, np.float32).reshape(-1, *want.shape[1:])[-len(want) :]
            logits_file.unlink()
            errors = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
            row[f"{way}error_median"], row[f"{way}error_max"] = float(np.median(errors)), float(errors.max())
            row[f"{way}agree"] = float((got.argmax(-1) == want.argmax(-1)).mean())
            passed &= bool(np.median(errors) < case["limits"][0] and errors.max() < case["limits"][1])
    except RuntimeError as error:
        return {**row, "failed": str(error)}
    return {**row, "passed": passed}


def _run(command: Sequence[Any], timeout_s: float) -> str:
    """Standard output of a program.

    Raises: RuntimeError with the last line of what it says, or that it took too long.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        before = (error.stdout or b"").decode().strip().replace("\n", "; ")  # engines that it had built
        raise RuntimeError(f"{name}: more than {timeout_s:.0f} s; {before}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{name}: exit code {done.returncode}: {lines[-1][:400]}")
    return done.stdout


def main() -> int:
    """Make or check; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("make", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of cases; all, if none is given")
    parser.add_argument("--tools", type=Path, help="folder of sinkrt_build, probe and run_engine")
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a build or a run")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time; they hold each other up")
    # What follows -- is sinkrt_build's: argparse would take it for a second list of positional arguments.
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments, build_options = parser.parse_args(words[:cut]), words[cut + 1 :]
    if unknown := [name for name in arguments.names if name not in CASES]:
        parser.error(f"case: received '{unknown[0]}', expected one of: {'; '.join(CASES)}")
    names = arguments.names or list(CASES)
    if arguments.task == "make":
        make(arguments.folder, names)
        return 0
    rows = check(
        arguments.folder, names, arguments.tools, arguments.plugin, build_options, arguments.timeout, arguments.jobs
    )
    print(json.dumps({"cases": rows}))
    return 0 if all(row.get("passed") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
