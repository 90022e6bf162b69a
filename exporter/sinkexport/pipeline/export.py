"""The whole export: load, probe, trace, convert, write."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from sinkrt.contract import (
    MANIFEST_NAME,
    PLUGIN_ABI,
    SCHEMA_VERSION,
    AffineAttention,
    HeadWindow,
    Manifest,
    ModelFacts,
    Quantization,
    StreamFacts,
)
from sinkrt.errors import UsageError, problem
from sinkrt.ring import POSITION_LIMIT, Ring

from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.graph.convert import BuiltGraph, build_graph
from sinkexport.graph.passes.plugin_operators import refuse_geometry
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.loading.tokenizers.tokenizer_checks import check_template, check_tokens, fitted, named, opening_size
from sinkexport.loading.tokenizers.turn_ends import beginning_id, end_ids
from sinkexport.loading.weights.check_weights import check_weights
from sinkexport.model.decoder import StreamStep, trace
from sinkexport.model.experts import static_experts
from sinkexport.model.head_caches import HeadCache, head_caches
from sinkexport.model.probe import probe_attention
from sinkexport.model.refusals import refusing
from sinkexport.model.rope import AttentionShape, ModelRotary
from sinkexport.pipeline.bundle_writer import (
    hash_bundle,
    require_space,
    staged_bundle,
    write_graph,
    write_graph_with_weights_of,
    write_tokenizer,
)
from sinkexport.pipeline.check_export import UncheckedWarning, check_export, why_unchecked
from sinkexport.pipeline.sink_token import with_sink_token
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel, load_model, refuse_architecture
from sinkexport.util.progress import Report, silent
from sinkexport.variants.affine import FILE_NAME as AFFINE_FILE

LOGGER = logging.getLogger("sinkexport")
PRODUCERS = ("sinkexport", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
WINDOW_RECIPE = "int8-window"
"""What ``kv="int8"`` means without a recipe."""
SMALL_FILES_BYTES = 64 * 2**20
"""Room for graph, tokenizer and manifest beside the weights."""


def export(
    source: str,
    out: Path | str,
    config: ExportConfig | None = None,
    *,
    overwrite: bool = False,
    check: bool = True,
    report: Report = silent,
) -> Manifest:
    """Export the model `source` (local directory, ``.gguf`` file or Hub id) to the bundle folder `out`.

    check: see `export_loaded`.

    Raises: UsageError with the reason if the model cannot be exported exactly or `out` cannot be written.
    """
    config = config or ExportConfig()
    report("load", 0, 1)
    loaded = load_model(source, WEIGHT_DTYPES[config.dtype])
    report("load", 1, 1)
    return export_loaded(loaded, out, config, overwrite=overwrite, check=check, report=report)


def export_loaded(
    loaded: LoadedModel,
    out: Path | str,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    check: bool = True,
    report: Report = silent,
) -> Manifest:
    """Export a model that is in memory already, in the dtype of its parameters, which must be `config`'s.

    The model is left as it was. check: compare the finished graphs with it, where ONNX Runtime can run them
    (`sinkexport.pipeline.check_export`), before the bundle gets its name.

    Raises: UsageError.
    """
    model, out = loaded.model, Path(out)
    tokenizer = _checked_tokenizer(loaded, config)
    loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
    config = _resolved(_with_pinned_system(tokenizer, config), model.config.get_text_config().model_type)
    special_ids = _special_ids(model, tokenizer)
    _check_model(model, config)
    _check_calibration(model, config)
    with staged_bundle(out, overwrite=overwrite) as stage:
        require_space(stage, sum(p.nbytes for p in model.parameters()) + SMALL_FILES_BYTES)
        report("probe", 0, 1)
        with static_experts(model):  # transformers' own form has demands on sizes that the graph has not
            shape, rotary = probe_attention(model, model.config.get_text_config().num_hidden_layers, config.capacity)
        if config.budgets is not None:
            config.budgets.check_model(type(model).__name__, shape.num_layers, shape.num_kv_heads)
        caches = head_caches(config, shape)
        rings = [cache.ring for cache in caches]
        _check_rings(config, rings)
        _check_memory(config, shape, caches)
        if config.has_plugins:
            refuse_geometry(shape.head_dim, config.batch, max(ring.capacity for ring in rings))
        if config.sink_tuning is not None:
            config.sink_tuning.check_model(type(model).__name__, shape.num_layers, shape.num_q_heads)
            config.sink_tuning.check_sinks(
                [
                    min((c.ring.num_sink_tokens for c in caches if c.layer == i), default=0)
                    for i in range(shape.num_layers)
                ]
            )
        if config.affine is not None:
            hidden_size = model.config.get_text_config().hidden_size
            config.affine.check_model(shape.num_layers, shape.num_q_heads, hidden_size, shape.recurrent)
            (stage / AFFINE_FILE).write_bytes(config.affine.raw)
        report("decode", 0, 1)
        built = _build(loaded, config, shape, rotary, "decode", config.batch, 1)
        graphs = {"decode": built.spec("decode.onnx")}
        write_graph(built.model, stage, "decode.onnx", lambda done, total: report("write", done, total))
        if (num_tokens := min(config.num_tokens_per_chunk, *(ring.window_size for ring in rings))) > 1:
            report("prefill", 0, 1)
            # Of one stream: a long prompt then costs the other streams nothing.
            chunk = _build(loaded, config, shape, rotary, "prefill", 1, num_tokens)
            graphs["prefill"] = chunk.spec("prefill.onnx")
            write_graph_with_weights_of(chunk.model, stage, "prefill.onnx", "decode.onnx")
        for graph in graphs.values():
            onnx.checker.check_model(stage / graph.file)
        if check:
            report("weights", 0, 1)
            files = [graph.file for graph in graphs.values()]
            check_weights(stage, files, loaded, config, num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads)
        tokenizer_facts = write_tokenizer(tokenizer, stage)
        report("hash", 0, 1)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            target=config.target,
            weights_dtype=WEIGHT_DTYPES[config.dtype],
            model=_model_facts(loaded, shape, rotary, special_ids, vocab_size=built.outputs[0].shape[-1]),
            stream=StreamFacts(config.num_sink_tokens, config.window_size, config.batch, num_tokens, POSITION_LIMIT),
            graphs=graphs,
            states=built.states,
            tokenizer=tokenizer_facts,
            files=hash_bundle(stage),
            producer=_producers(),
            quantization=_quantization(config),
            plugin_abi=PLUGIN_ABI if config.has_plugins else None,
            sink_tuning=None if config.sink_tuning is None else config.sink_tuning.facts,
            head_windows=_head_windows(config, caches),
            affine_attention=_affine_facts(config, shape),
        )
        (stage / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        if check and (reason := why_unchecked(manifest)) is not None:
            warnings.warn(f"the graphs were not compared with the model: {reason}", UncheckedWarning, stacklevel=2)
        elif check:
            report("check", 0, 1)
            check_export(stage, manifest, model, config.affine)
    report("done", 1, 1)
    return manifest


def _head_windows(config: ExportConfig, caches: Sequence[HeadCache]) -> tuple[HeadWindow, ...] | None:
    if config.budgets is None:
        return None
    return tuple(HeadWindow(cache.layer, cache.kv_heads, cache.ring.window_size) for cache in caches)


def _affine_facts(config: ExportConfig, shape: AttentionShape) -> AffineAttention | None:
    return None if config.affine is None else config.affine.facts(shape.num_layers, shape.num_q_heads)


def _build(
    loaded: LoadedModel,
    config: ExportConfig,
    shape: AttentionShape,
    rotary: ModelRotary,
    role: str,
    batch: int,
    num_tokens: int,
) -> BuiltGraph:
    step = StreamStep(loaded.model, config, shape, rotary, batch=batch, num_tokens=num_tokens).eval()
    recipe, dtype = config.recipe, WEIGHT_DTYPES[config.dtype]
    plan = None if recipe is None else RecipePlan(recipe, loaded.model, dtype, config.calibration)
    num_sinks = 0 if config.calibration is None else config.calibration.num_sink_tokens
    with _no_garbage_collection():
        with refusing(loaded.model, f"tracing the {role} graph"):
            program = trace(step)
        with refusing(loaded.model, f"converting the {role} graph to ONNX"):
            return build_graph(
                program, role, step.state_names, config.target, num_sinks, plan, plugins=config.has_plugins
            )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of small objects that live on: the collector would look through all of them again and
    again, an eighth of the whole time, and find a few megabytes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _resolved(config: ExportConfig, family: str) -> ExportConfig:
    """The config whose recipe says all: refined for the family, and with `kv`, which goes before the recipe's.

    Raises: UsageError if the refined recipe cannot be followed.
    """
    recipe = load_recipe(WINDOW_RECIPE) if config.recipe is None and config.has_int8_window else config.recipe
    if recipe is None:
        return config
    recipe = recipe.for_family(family)
    if config.kv is not None:
        recipe = recipe.with_kv(config.kv)
    return dataclasses.replace(config, recipe=recipe, kv=recipe.kv)


def _quantization(config: ExportConfig) -> Quantization | None:
    recipe = config.recipe
    if recipe is None:
        return None
    return Quantization(
        recipe=recipe.name,
        weights="float" if recipe.weights is None else f"int{recipe.weights.bits}",
        activations=recipe.activations.mode,
        kv=recipe.kv,
        calibration_sha256=None if config.calibration is None else config.calibration.sha256,
        thresholds=recipe.thresholds.model_dump(),
    )


def _checked_tokenizer(loaded: LoadedModel, config: ExportConfig) -> SourceTokenizer | None:
    """The tokenizer that the bundle gets, with the sink token if one is asked for. What users should know is logged.

    Raises: UsageError for one that does not belong to the model, or has a broken chat template.
    """
    tokenizer, num_rows = loaded.tokenizer, 0
    if tokenizer is not None:
        num_rows = loaded.model.get_input_embeddings().weight.shape[0]
        tokenizer = named(fitted(tokenizer, num_rows), loaded.model.config.get_text_config())
        check_tokens(tokenizer)
        check_template(tokenizer)
        for remark in tokenizer.remarks:
            LOGGER.warning("sinkexport: note: tokenizer: %s", remark)
    if config.sink_token is not None:
        tokenizer = with_sink_token(tokenizer, config.sink_token, num_rows)
    return tokenizer


def _with_pinned_system(tokenizer: SourceTokenizer | None, config: ExportConfig) -> ExportConfig:
    """The config with as many sinks as the opening of a conversation under its system message has tokens.

    Raises: UsageError if the model has no chat template, or one that takes no system message.
    """
    if config.pin_system is None:
        return config
    needed = opening_size(tokenizer, config.pin_system)
    return dataclasses.replace(config, num_sink_tokens=max(config.num_sink_tokens, needed))


def _check_model(model: Any, config: ExportConfig) -> None:
    refuse_architecture(model.config)
    wanted = getattr(torch, WEIGHT_DTYPES[config.dtype])
    for name, parameter in model.named_parameters():
        if parameter.dtype != wanted:
            raise UsageError(
                problem(
                    f"dtype of '{name}'",
                    received=parameter.dtype,
                    expected=str(wanted),
                    fix="load the model with that dtype",
                )
            )
        if not bool(torch.isfinite(parameter).all()):
            raise UsageError(
                problem(
                    f"weights '{name}'",
                    received="NaN or Inf",
                    expected="finite numbers",
                    fix="check the model, or use --dtype fp32 if it overflows fp16",
                )
            )


def _check_rings(config: ExportConfig, rings: Sequence[Ring]) -> None:
    """Something must keep the sinks, and a chunk must fit the smallest window.

    Raises: UsageError.
    """
    if config.budgets is not None and config.window_size > max(ring.window_size for ring in rings):
        raise UsageError(
            problem(
                "--budgets",
                received=f"{config.window_size} tokens, where own windows are shorter",
                expected="the longest budget in a layer that can have it",
                fix="change the file",
            )
        )
    smallest = min(ring.window_size for ring in rings)
    if config.num_sink_tokens and not any(ring.num_sink_tokens for ring in rings):
        raise UsageError(
            problem(
                "sinks + window",
                fix="lower --window, or use --sink-tokens 0",
                received=f"{config.capacity} tokens, more than any layer's own sliding window",
                expected=f"at most {max(ring.capacity for ring in rings)} tokens, or nothing would keep the sinks",
            )
        )
    if config.chunk_size is not None and config.chunk_size > smallest:
        raise UsageError(
            problem(
                "chunk_size",
                received=config.chunk_size,
                fix="lower --chunk",
                expected=f"at most {smallest}, the smallest window of a layer",
            )
        )


def _check_memory(config: ExportConfig, shape: AttentionShape, caches: Sequence[HeadCache]) -> None:
    """The cache must fit this machine's memory: a window with a zero too many is refused before minutes of work.

    Raises: UsageError.
    """
    rows = config.batch * sum(len(cache.kv_heads) * cache.ring.capacity for cache in caches)
    entry_bytes = 1 if config.has_int8_window else 2 if config.dtype == "fp16" else 4
    needed = 2 * rows * shape.head_dim * entry_bytes
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise UsageError(
            problem(
                "cache",
                received=f"{needed / 1e9:,.1f} GB of keys and values",
                expected=f"at most this machine's {total / 1e9:,.1f} GB of memory",
                fix="lower --window, --sink-tokens or --batch",
            )
        )


def _check_calibration(model: Any, config: ExportConfig) -> None:
    """The ranges must be of this model, by this recipe, with sinks that this bundle keeps.

    The window need not be the same: activations hardly depend on how far back a token sees.

    Raises: UsageError.
    """
    ranges, recipe = config.calibration, config.recipe
    if ranges is None or recipe is None:
        return
    if not recipe.needs_calibration:  # as refined for the family
        raise UsageError(
            problem(
                "--calibration",
                received=f"a file for recipe '{recipe.name}'",
                expected="none: the recipe needs no calibration",
                fix="leave it out",
            )
        )
    ranges.check_recipe(recipe)
    if recipe.needs_ranges and ranges.num_sink_tokens > config.num_sink_tokens:
        raise UsageError(
            problem(
                "sinks",
                received=f"{config.num_sink_tokens} tokens, and a calibration with {ranges.num_sink_tokens}",
                expected="at least as many as in the calibration",
                fix="raise --sink-tokens, or calibrate with fewer",
            )
        )
    ranges.check_model(model)


def _special_ids(model: Any, tokenizer: SourceTokenizer | None) -> tuple[int | None, tuple[int, ...]]:
    """The beginning of a text and the ends of a turn. Raises: UsageError for ids outside the vocabulary."""
    config = model.config.get_text_config()
    head = getattr(getattr(model, "lm_head", None), "weight", None)
    num_tokens = config.vocab_size if head is None else head.shape[0]  # lm_head has another name in some models
    found = (
        beginning_id(tokenizer, config, num_tokens),
        end_ids(tokenizer, config, getattr(model, "generation_config", None), num_tokens),
    )
    if tokenizer is not None:
        tokenizer.close()  # no more templates from here on
    return found


def _model_facts(
    loaded: LoadedModel,
    shape: AttentionShape,
    rotary: ModelRotary,
    special_ids: tuple[int | None, tuple[int, ...]],
    *,
    vocab_size: int,
) -> ModelFacts:
    config = loaded.model.config.get_text_config()
    return ModelFacts(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        family=config.model_type,
        num_layers=shape.num_layers,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=vocab_size,
        num_parameters=sum(p.numel() for p in loaded.model.parameters()),
        position_scheme=_position_scheme(shape, rotary),
        bos_token_id=special_ids[0],
        eos_token_ids=special_ids[1],
    )


def _position_scheme(shape: AttentionShape, rotary: ModelRotary) -> str:
    turning = [spec for spec in rotary.layers if spec.rotary_dim]
    if shape.alibi_slopes is not None:
        return "alibi"
    if not turning:
        return "none"
    spec = turning[0]
    parts = [f"rope {spec.rotary_dim} of {shape.head_dim}", "interleaved" if spec.interleaved else "halves"]
    if len(turning) < len(rotary.layers):
        parts.append(f"in {len(turning)} of {len(rotary.layers)} layers")
    if (tables := len({spec.table for spec in turning})) > 1:
        parts.append(f"{tables} sets of frequencies")
    return ", ".join(parts)


def _producers() -> Mapping[str, str]:
    return {name: importlib.metadata.version(name) for name in PRODUCERS}
