"""What does each recipe cost, and what does it save? One table over recipes.

    python benchmarks/quantisation.py MODEL --text FILE [--bundle DIR ..] [--recipe NAME|FILE ..] [--kv fp,int8]
                                      [--target TARGET] [--isa NAME,..] [--chunks] [--sink-tokens S] [--window W]
                                      [--tokens N] [--keep FILE] [--threads N] [--json FILE]

Every bundle predicts the same tokens as MODEL in float32 with the same sinks and window (see docs/evaluation.md):
perplexity and its increase, Kullback-Leibler divergence, share of tokens with the same top-1 token, and whether the
recipe's own thresholds hold. Bundles are those named, and one for each recipe named, which is exported to a temporary
folder. All must have the same S and W. MODEL is a model folder, a .gguf file, a Hub id, or a floating-point bundle;
exporting needs a model. With --isa each bundle for the CPU library is measured by each of these sets of its kernels, as
SINKEXPORT_CPU_ISA forces them: avx512_bf16, avx512_vnni, avx2_vnni, avx2, portable. With --chunks a bundle for the CPU
library predicts by its prefill graph, chunk after chunk, not step by step: faster, and what prompts get.
--keep keeps MODEL's predictions, 4 bytes for each token and vocabulary entry, and reads them the next time.
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

from chunk_predictions import chunk_predictor
from harness import check_json, command, environment, table, where, write_json
from kept_predictions import keep_predictions
from sinkexport.bench.machine import physical_cores, torch_threads
from sinkexport.config import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_SIZE, ExportConfig
from sinkexport.evaluation.evaluate import encode
from sinkexport.evaluation.perplexity import Predictor
from sinkexport.evaluation.quality import compare_predictions
from sinkexport.evaluation.quality_gate import check, is_bundle, thresholds, verify_quality
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
    name: str, bundle: Path, against: str | LoadedModel | Predictor, text: str, num_tokens: int, threads: int
) -> dict[str, Any]:
    """The figures of one bundle, step by step."""
    with shown_progress({stage: f"{name}: {label}" for stage, label in STAGES.items()}) as show:
        report = verify_quality(bundle, against, text, num_tokens=num_tokens, threads=threads, report=show)
    return {
        **facts_of(name, bundle),
        "how": "steps",
        "reference": report.reference,
        **dataclasses.asdict(report.quality),
        "prefill_error": report.prefill.max_relative_error,
        "failures": report.failures,
    }


def chunk_row(
    name: str, bundle: Path, reference: Predictor, text: str, num_tokens: int, threads: int
) -> dict[str, Any]:
    """The figures of one bundle by its prefill graph."""
    manifest = load_manifest(bundle)
    ids = encode(bundle, manifest, text)[:num_tokens]
    with shown_progress({stage: f"{name}: {label}" for stage, label in STAGES.items()}) as show:
        quality = compare_predictions(reference, chunk_predictor(bundle, manifest, ids, threads), ids, show)
    failed = [one for one in check(quality, thresholds(manifest.quantization)) if not one.passed]
    return {
        **facts_of(name, bundle),
        "how": f"chunks of {manifest.stream.chunk_size}",
        "reference": reference.note,
        **dataclasses.asdict(quality),
        "failures": [f"{one.name}: {one.value:.4g}, limit {one.limit:.4g}" for one in failed],
    }


def facts_of(name: str, bundle: Path) -> dict[str, Any]:
    """What a bundle's manifest says."""
    manifest = load_manifest(bundle)
    return {
        "bundle": name,
        "quantization": None if manifest.quantization is None else dataclasses.asdict(manifest.quantization),
        "target": manifest.target,
        "weights_dtype": manifest.weights_dtype,
        "num_sink_tokens": manifest.stream.num_sink_tokens,
        "window_size": manifest.stream.window_size,
        "weights_bytes": manifest.weights_bytes,
        "state_bytes": manifest.state_bytes,
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
    reference: list[Predictor] = []

    def kept(bundle: Path) -> str | LoadedModel | Predictor:
        """What bundles are compared with: predictions that are kept, if any are; a bundle has the tokenizer."""
        if arguments.keep is not None and not reference:
            reference.append(predictions(arguments, against, text, bundle))
        return reference[0] if reference else against

    def add(name: str, bundle: Path, **more: Any) -> None:
        for isa in arguments.isa if load_manifest(bundle).target == CPU and arguments.isa else [None]:
            named = name if isa is None else f"{name}, {isa}"
            compared = kept(bundle)
            with forced(isa):
                if arguments.chunks and isinstance(compared, Predictor) and load_manifest(bundle).target == CPU:
                    found = chunk_row(named, bundle, compared, text, arguments.tokens, arguments.threads)
                else:
                    found = row(named, bundle, compared, text, arguments.tokens, arguments.threads)
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


def predictions(arguments: argparse.Namespace, against: str | LoadedModel, text: str, bundle: Path) -> Predictor:
    """The model's predictions, from the file or for it.

    Raises: UsageError for a bundle in the model's place, and for a file of other predictions.
    """
    if isinstance(against, str):
        raise UsageError(
            problem("MODEL", received=f"'{against}', a bundle", expected="a model", fix="leave out --keep and --chunks")
        )
    manifest = load_manifest(bundle)
    ids = encode(bundle, manifest, text)[: arguments.tokens]
    with torch_threads(arguments.threads):
        return keep_predictions(against, ids, manifest.stream, arguments.keep)


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
    parser.add_argument("--chunks", action="store_true", help="bundles for the CPU library: by chunks; needs --keep")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep MODEL's predictions there, or read them")
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
    if arguments.chunks and arguments.keep is None:
        parser.error("--chunks: needs --keep FILE, since chunks are compared with predictions that were kept")
    try:
        run(arguments)
    except SinkError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
