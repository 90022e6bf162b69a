"""What does each recipe cost, and what does it save? One table over recipes.

    python benchmarks/quantisation.py MODEL --text FILE [--bundle DIR ..] [--recipe NAME|FILE ..] [--kv fp,int8]
                                      [--target TARGET] [--isa NAME,..] [--sink-tokens S] [--window W]
                                      [--tokens N] [--threads N] [--json FILE]

Every bundle predicts the same tokens as MODEL in float32 with the same sinks and window (see docs/evaluation.md):
perplexity and its increase, Kullback-Leibler divergence, share of tokens with the same top-1 token, and whether the
recipe's own thresholds hold. Bundles are those named, and one for each recipe named, which is exported to a temporary
folder. All must have the same S and W. MODEL is a model folder, a .gguf file, a Hub id, or a floating-point bundle;
exporting needs a model. With --isa each bundle for the CPU library is measured by each of these sets of its kernels, as
SINKEXPORT_CPU_ISA forces them: avx512_bf16, avx512_vnni, avx2_vnni, avx2, portable.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from harness import check_json, command, environment, table, where, write_json
from sinkexport.bench.machine import physical_cores
from sinkexport.config import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_SIZE, ExportConfig
from sinkexport.evaluation.quality_gate import is_bundle, verify_quality
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import Recipe, load_recipe, recipe_names
from sinkexport.sources import LoadedModel, load_model
from sinkexport.targets import AUTO, OPTIONS
from sinkexport.util.files import read_text
from sinkexport.util.progress import shown_progress
from sinkrt.contract import Manifest, load_manifest
from sinkrt.contract.constants import CPU
from sinkrt.errors import SinkError, UsageError, problem

HEADERS = ("bundle", "weights MB", "state MB", "perplexity", "increase", "±", "KL nats", "top-1 equal", "within limits")
STAGES = {"load": "Loading", "quality": "Predicting", "prefill": "Prefilling in pieces"}


def variants(names: list[str], kinds: list[str]) -> list[tuple[str, Recipe]]:
    """Each recipe with each kind of window, by what to call it.

    Raises: UsageError for an unknown recipe or kind.
    """
    found = []
    for name in names:
        recipe = load_recipe(name)
        for kv in kinds or [recipe.kv]:
            found.append((f"{recipe.name}, kv {kv}" if kinds else recipe.name, recipe.with_kv(kv)))
    return found


def row(
    name: str, bundle: Path, against: str | LoadedModel, text: str, num_tokens: int, threads: int
) -> dict[str, Any]:
    """The figures of one bundle."""
    manifest = load_manifest(bundle)
    with shown_progress({stage: f"{name}: {label}" for stage, label in STAGES.items()}) as show:
        report = verify_quality(bundle, against, text, num_tokens=num_tokens, threads=threads, report=show)
    return {
        "bundle": name,
        "quantization": None if manifest.quantization is None else dataclasses.asdict(manifest.quantization),
        "target": manifest.target,
        "weights_dtype": manifest.weights_dtype,
        "num_sink_tokens": manifest.stream.num_sink_tokens,
        "window_size": manifest.stream.window_size,
        "weights_bytes": manifest.weights_bytes,
        "state_bytes": manifest.state_bytes,
        "reference": report.reference,
        **dataclasses.asdict(report.quality),
        "prefill_error": report.prefill.max_relative_error,
        "failures": report.failures,
    }


def forced(isa: str | None) -> AbstractContextManager[Any]:
    """Sessions that are loaded meanwhile use these kernels of the CPU library; None: those that it chooses."""
    return mock.patch.dict(os.environ, {} if isa is None else {"SINKEXPORT_CPU_ISA": isa})


def cells(facts: dict[str, Any]) -> list[str]:
    error = facts["standard_error"]
    within = "-" if facts["quantization"] is None else "no" if facts["failures"] else "yes"
    return [
        facts["bundle"],
        f"{facts['weights_bytes'] / 1e6:.1f}",
        f"{facts['state_bytes'] / 1e6:.1f}",
        f"{facts['perplexity']:.3f}",
        f"{facts['perplexity_increase']:+.2%}",
        "-" if error is None else f"{error:.2%}",
        f"{facts['kl_divergence']:.5f}",
        f"{facts['top1_agreement']:.2%}",
        within,
    ]


def check_geometry(manifests: list[Manifest]) -> None:
    """Perplexities with different caches cannot stand in one table.

    Raises: UsageError.
    """
    found = sorted({(m.stream.num_sink_tokens, m.stream.window_size) for m in manifests})
    if len(found) > 1:
        raise UsageError(
            problem(
                "--bundle",
                received=", ".join(f"S={s} W={w}" for s, w in found),
                expected="the same S and W for all",
                fix="run one table for each",
            )
        )


def run(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text, "--text")
    named = [(path.name, path) for path in arguments.bundle]
    check_geometry([load_manifest(path) for _, path in named])
    recipes = variants(arguments.recipe, arguments.kv)
    if not named and not recipes:
        raise UsageError(
            problem(
                "--recipe",
                received="neither recipe nor bundle",
                expected=", ".join(recipe_names()),
                fix="name some, or pass --bundle",
            )
        )
    if is_bundle(arguments.model) and recipes:
        raise UsageError(
            problem(
                "MODEL",
                received=f"'{arguments.model}', a bundle",
                expected="a model to export",
                fix="pass the model itself, or no --recipe",
            )
        )
    stream = load_manifest(named[0][1]).stream if named else None
    geometry = (stream.num_sink_tokens, stream.window_size) if stream else (arguments.sink_tokens, arguments.window)
    configs = [ExportConfig(*geometry, target=arguments.target, recipe=recipe) for _, recipe in recipes]
    facts = {"environment": environment(arguments.threads), "model": arguments.model, "text": arguments.text.name}
    against = arguments.model if is_bundle(arguments.model) else load_model(arguments.model)
    rows: list[dict[str, Any]] = []

    def add(name: str, bundle: Path, **more: Any) -> None:
        for isa in arguments.isa if load_manifest(bundle).target == CPU and arguments.isa else [None]:
            with forced(isa):
                named = name if isa is None else f"{name}, {isa}"
                found = row(named, bundle, against, text, arguments.tokens, arguments.threads)
            rows.append({**found, "isa": isa, **more})
            write_json(arguments.json, {**facts, "rows": rows})  # a run that is cut short leaves what it found

    for name, path in named:
        add(name, path)
    for (name, _), config in zip(recipes, configs, strict=True):
        with tempfile.TemporaryDirectory(prefix="quantisation-") as folder:
            start = time.perf_counter()
            export_loaded(against, Path(folder) / "bundle", config)
            add(name, Path(folder) / "bundle", export_s=time.perf_counter() - start)
    first = rows[0]
    print(f"{command()}\n{where(facts['environment'])}\n")
    print(
        f"{first['num_tokens']:,} tokens of {arguments.text.name} predicted, S={first['num_sink_tokens']} "
        f"W={first['window_size']}; {first['reference']}: perplexity "
        f"{first['reference_perplexity']:.3f}\n"
    )
    print(table(HEADERS, [cells(found) for found in rows]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, a .gguf file, a Hub id, or a floating-point bundle")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--bundle", type=Path, nargs="+", default=[], metavar="DIR", help="bundles to measure")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="NAME|FILE", help="recipes to export and measure")
    parser.add_argument(
        "--kv",
        type=lambda kinds: kinds.split(","),
        default=[],
        metavar="KIND,..",
        help="fp and int8: each recipe with these kinds of window (default: its own)",
    )
    parser.add_argument("--target", choices=(*OPTIONS, AUTO), default=AUTO, help="of exports (default: %(default)s)")
    parser.add_argument(
        "--isa",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,..",
        help="kernels of the CPU library by which each of its bundles is measured (default: the best for this machine)",
    )
    parser.add_argument(
        "--sink-tokens", type=int, default=DEFAULT_NUM_SINK_TOKENS, metavar="S", help="of exports; the bundles' if any"
    )
    parser.add_argument(
        "--window", type=int, default=DEFAULT_WINDOW_SIZE, metavar="W", help="of exports; the bundles' if any"
    )
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="of the text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of both sides together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure")
    arguments = parser.parse_args()
    check_json(arguments.json)
    try:
        run(arguments)
    except SinkError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
