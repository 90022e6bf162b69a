"""Checks before the graphs of an export are built: a refusal takes seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sinkrt.errors import UsageError, problem
from sinkrt.ring import Ring

from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.families.rope import ModelRotary
from sinkexport.families.shape import AttentionShape
from sinkexport.model.head_caches import HeadCache
from sinkexport.sources import refuse_architecture
from sinkexport.util.machine import total_memory_bytes


def check_model(model: Any, config: ExportConfig) -> None:
    """The architecture must export, and the weights be finite numbers of the bundle's dtype.

    Raises: UsageError.
    """
    refuse_architecture(model.config)
    wanted = getattr(torch, WEIGHT_DTYPES[config.dtype])
    is_loaded_so = any(parameter.dtype == wanted for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 != wanted and is_loaded_so:
            raise UsageError(
                problem(
                    f"--dtype {config.dtype}",
                    received=f"'{name}', which this family keeps in float32",
                    expected="weights of one type",
                    fix="use --dtype fp32",
                )
            )
        if parameter.dtype != wanted:
            raise UsageError(
                problem(
                    f"dtype of '{name}'",
                    received=parameter.dtype,
                    expected=str(wanted),
                    fix="load the model with that dtype",
                )
            )
        if not _is_finite(parameter):
            raise UsageError(
                problem(
                    f"weights '{name}'",
                    received="NaN or Inf",
                    expected="finite numbers",
                    fix="check the model, or use --dtype fp32 if it overflows fp16",
                )
            )


def _is_finite(parameter: torch.Tensor) -> bool:
    """Whether all numbers are finite: the sum shows it, unless it overflows itself."""
    with torch.no_grad():
        return bool(parameter.sum(dtype=torch.float32).isfinite()) or bool(parameter.isfinite().all())


def check_calibration(model: Any, config: ExportConfig) -> None:
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


def check_variant(model: Any, config: ExportConfig, shape: AttentionShape) -> None:
    """The files of the variant must be of this model.

    Raises: UsageError.
    """
    architecture = type(model).__name__
    if not config.variant.is_plain and not shape.is_uniform:
        raise UsageError(
            problem(
                "attention variant",
                received=f"a file for {architecture}, whose layers attend with heads of different sizes, or not at all",
                expected="one attention a layer, of the same sizes in all",
                fix="leave out --head-windows, --sink-tuning and --affine",
            )
        )
    if config.budgets is not None:
        config.budgets.check_model(architecture, shape.num_layers, shape.num_kv_heads)
    if config.sink_tuning is not None:
        config.sink_tuning.check_model(architecture, shape.num_layers, shape.num_q_heads)
    if config.affine is not None:
        hidden_size = model.config.get_text_config().hidden_size
        config.affine.check_model(shape.num_layers, shape.num_q_heads, hidden_size, shape.recurrent)


def check_weights_after_rotation(config: ExportConfig, rotary: ModelRotary) -> None:
    """Queries that are weighed at their in-cache position need the portable graph, and one window for all heads.

    Raises: UsageError.
    """
    if not rotary.norms or (config.variant.is_plain and not config.has_plugins):
        return
    what = f"--target {config.target}" if config.has_plugins else "a file that changes attention"
    raise UsageError(
        problem(
            "rotary positions",
            received=f"{what}, and weights of norms after the rotation ({min(rotary.norms)})",
            expected="--target onnx, and the model's own attention",
            fix="use --native, or --target onnx" if config.has_plugins else "export it without",
        )
    )


def check_tuned_sinks(config: ExportConfig, shape: AttentionShape, caches: Sequence[HeadCache]) -> None:
    """Layers whose attention to sinks is changed must keep some.

    Raises: UsageError.
    """
    if config.sink_tuning is not None:
        kept = [[c.ring.num_sink_tokens for c in caches if c.layer == layer] for layer in range(shape.num_layers)]
        config.sink_tuning.check_sinks([min(sinks, default=0) for sinks in kept])


def check_rings(config: ExportConfig, rings: Sequence[Ring]) -> None:
    """Something must keep the sinks, and a chunk must fit the smallest window.

    Raises: UsageError.
    """
    if not rings:
        return  # no attention: nothing to keep
    if config.budgets is not None and config.window_size > max(ring.window_size for ring in rings):
        raise UsageError(
            problem(
                "--head-windows",
                received=f"{config.window_size} tokens, where sliding windows are shorter",
                expected="the longest per-head window in a layer that can have it",
                fix="change the file",
            )
        )
    smallest = min(ring.window_size for ring in rings)
    if config.num_sink_tokens and not any(ring.num_sink_tokens for ring in rings):
        raise UsageError(
            problem(
                "sinks + window",
                fix="lower --window, or use --sink-tokens 0",
                received=f"{config.capacity} tokens, more than any layer's sliding window",
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


def check_drafts(config: ExportConfig, shape: AttentionShape, rings: Sequence[Ring]) -> None:
    """A draft must fit the smallest window, and whatever it changes must be rows that can be written later.

    Raises: UsageError.
    """
    if config.speculate is None:
        return
    num_tokens, smallest = config.speculate + 1, min((ring.window_size for ring in rings), default=0)
    received, fix = None, "leave --speculate out"
    if shape.recurrent:
        received = "a model with recurrent states, which a draft changes before it is accepted"
    elif not rings:
        received = "a model without attention"
    elif config.variant.act is not None:
        received = "sink tuning with act, whose sums of attention every token changes"
    elif num_tokens > smallest:
        received = f"{config.speculate} drafted tokens, {num_tokens} with the one before, and a window of {smallest}"
        fix = f"use --speculate {smallest - 1} at most" if smallest > 1 else fix
    if received is not None:
        raise UsageError(
            problem("--speculate", received=received, expected="a draft that fits every layer's window", fix=fix)
        )


def check_memory(config: ExportConfig, caches: Sequence[HeadCache]) -> None:
    """The cache must fit this machine's memory: a window with a zero too many is refused before minutes of work.

    Raises: UsageError.
    """
    entry_bytes = 1 if config.has_int8_window else 2 if config.dtype == "fp16" else 4
    per_stream = sum(len(c.kv_heads) * c.ring.capacity * c.num_elements for c in caches)
    needed = config.batch * per_stream * entry_bytes
    total = total_memory_bytes()
    if needed > total:
        raise UsageError(
            problem(
                "cache",
                received=f"{needed / 1e9:,.1f} GB of keys and values",
                expected=f"at most this machine's {total / 1e9:,.1f} GB of memory",
                fix="lower --window, --sink-tokens or --batch",
            )
        )
