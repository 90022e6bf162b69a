"""The whole export: load, probe, trace, convert, write."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from pathlib import Path
from typing import Any

from sinkrt.contract import (
    CPU_ABI,
    MANIFEST_NAME,
    PLUGIN_ABI,
    SCHEMA_VERSION,
    FileFacts,
    Manifest,
    StreamFacts,
    TokenizerFacts,
)
from sinkrt.ring import POSITION_LIMIT

from sinkexport.config import WEIGHT_DTYPES, ExportConfig, target_of
from sinkexport.families.unread import unread_weights
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.loading.tokenizers.tokenizer_checks import check_template, check_tokens, fitted, named, opening_size
from sinkexport.loading.tokenizers.turn_ends import beginning_id, end_ids
from sinkexport.loading.weights.check_weights import check_weights
from sinkexport.pipeline.bundle_writer import (
    hash_bundle,
    require_space,
    staged_bundle,
    write_tokenizer,
)
from sinkexport.pipeline.check_export import UncheckedWarning, compare_graphs, opened, why_unchecked
from sinkexport.pipeline.checks import (
    check_calibration,
    check_model,
)
from sinkexport.pipeline.graph_files import GraphFiles, PlanOf, write_graphs
from sinkexport.pipeline.manifest_facts import (
    head_windows,
    producers,
    quantization_facts,
)
from sinkexport.pipeline.probed import Probed, probed_model
from sinkexport.pipeline.sink_token import with_sink_token
from sinkexport.pipeline.stored_weights import recipe_for, stored_weights
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel, load_model
from sinkexport.targets import Target
from sinkexport.util.garbage import no_garbage_collection
from sinkexport.util.progress import Report, silent
from sinkexport.variants.affine import FILE_NAME as AFFINE_FILE

LOGGER = logging.getLogger("sinkexport")
WINDOW_RECIPE = "int8-window"
"""Recipe of ``kv="int8"`` where none is given."""
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
    plan_of: PlanOf = RecipePlan,
) -> Manifest:
    """Export a model that is in memory already, in the dtype of its parameters, which must be `config`'s.

    The model is left as it was. check: compare the finished graphs with it, where ONNX Runtime can run them
    (`sinkexport.pipeline.check_export`), before the bundle gets its name. plan_of: makes the plan of a recipe.

    Raises: UsageError.
    """
    model, out = loaded.model, Path(out)
    loaded = dataclasses.replace(loaded, tokenizer=_checked_tokenizer(loaded, config))
    config = _resolved(_with_pinned_system(loaded.tokenizer, config), loaded)
    special_ids = _special_ids(model, loaded.tokenizer)
    check_model(model, config)
    check_calibration(model, config)
    stored = stored_weights(loaded, config)
    with no_garbage_collection(), staged_bundle(out, overwrite=overwrite) as stage:
        require_space(stage, sum(p.nbytes for p in model.parameters()) + SMALL_FILES_BYTES)
        report("probe", 0, 1)
        probed = probed_model(model, config)
        if config.affine is not None:
            (stage / AFFINE_FILE).write_bytes(config.affine.raw)
        written = write_graphs(stage, loaded, config, probed, report, stored.planner(plan_of), special_ids)
        tokenizer_facts = write_tokenizer(loaded.tokenizer, stage)
        report("hash", 0, 1)
        facts = hash_bundle(stage, written.hashes)
        manifest = stored.described(_manifest(facts, config, probed, written, tokenizer_facts), config)
        (stage / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        if check:
            _check(stage, loaded, config, probed, written, manifest, report)
    report("done", 1, 1)
    return manifest


def _check(
    stage: Path,
    loaded: LoadedModel,
    config: ExportConfig,
    probed: Probed,
    written: GraphFiles,
    manifest: Manifest,
    report: Report,
) -> None:
    """Compare weights with their file, and graphs with the model: ONNX Runtime opens these beside the former.

    Raises: UsageError, BundleError as `compare_graphs`.
    """
    reason = why_unchecked(manifest)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(opened(stage, manifest)) if reason is None else None
        report("weights", 0, 1)
        _check_weights(stage, loaded, config, probed, written)
        if session is not None:
            report("check", 0, 1)
            compare_graphs(session, stage, manifest, loaded.model)
    if reason is not None:
        warnings.warn(f"the graphs were not compared with the model: {reason}", UncheckedWarning, stacklevel=3)


def _check_weights(stage: Path, loaded: LoadedModel, config: ExportConfig, probed: Probed, written: GraphFiles) -> None:
    """Raises: UsageError if the graphs have other numbers than the file that the model came from."""
    calls = probed.shape.calls
    check_weights(
        stage,
        [graph.file for graph in written.graphs.values()],
        loaded,
        config,
        num_q_heads=max((call.num_q_heads for call in calls), default=0),
        num_kv_heads=probed.shape.num_kv_heads,
        derived=written.derived,
        unread=functools.partial(unread_weights, loaded.model),
    )


def _manifest(
    files: dict[str, FileFacts],
    config: ExportConfig,
    probed: Probed,
    written: GraphFiles,
    tokenizer: TokenizerFacts | None,
) -> Manifest:
    """The manifest of a bundle of these files."""
    shape = probed.shape
    return Manifest(
        schema_version=SCHEMA_VERSION,
        target=target_of(config).manifest_name,
        weights_dtype=WEIGHT_DTYPES[config.dtype],
        model=written.model,
        stream=StreamFacts(
            num_sink_tokens=config.num_sink_tokens,
            window_size=config.window_size,
            batch=config.batch,
            chunk_size=written.num_tokens,
            position_limit=POSITION_LIMIT,
        ),
        graphs=written.graphs,
        states=written.states,
        tokenizer=tokenizer,
        files=files,
        producer=producers(),
        quantization=quantization_facts(config),
        plugin_abi=_library_abi(target_of(config)),
        attention=written.attention,
        **config.variant.manifest_entries(shape.num_layers, shape.num_q_heads, head_windows(probed.caches)),
    )


def _library_abi(target: Target) -> str | None:
    """Version of the nodes that are not ONNX's own."""
    if target.has_cpu_library:
        return CPU_ABI
    return PLUGIN_ABI if target.has_plugins else None


def _resolved(config: ExportConfig, loaded: LoadedModel) -> ExportConfig:
    """The config whose recipe says all: refined for the family, and with `kv`, which goes before the recipe's.

    Raises: UsageError if the refined recipe cannot be followed, or is not for such weights.
    """
    recipe = recipe_for(config.recipe, loaded)
    if recipe is None and config.has_int8_window:
        recipe = load_recipe(WINDOW_RECIPE)
    if recipe is None:
        return config
    recipe = recipe.for_family(loaded.model.config.get_text_config().model_type)
    if config.kv is not None:
        recipe = recipe.with_kv(config.kv)
    return dataclasses.replace(config, recipe=recipe, kv=recipe.kv)


def _checked_tokenizer(loaded: LoadedModel, config: ExportConfig) -> SourceTokenizer | None:
    """The tokenizer that the bundle gets, with the sink token if one is asked for. What users should know is logged.

    Raises: UsageError for one that does not belong to the model, or has a broken chat template.
    """
    tokenizer, num_rows = loaded.tokenizer, 0
    if tokenizer is not None:
        num_rows = loaded.model.get_input_embeddings().weight.shape[0]
        # Again, after `load_model`: a caller may have replaced the tokenizer. One that fits comes back as it is.
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
