"""Facts of the manifest about the model, its quantisation and the packages that made the bundle."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping, Sequence

from sinkrt.contract import AttentionCache, HeadWindow, ModelFacts, Quantization, attention_entries

from sinkexport.config import ExportConfig
from sinkexport.families.rope import ModelRotary
from sinkexport.families.shape import AttentionShape
from sinkexport.loading.origin import LoadedModel
from sinkexport.model.head_caches import HeadCache
from sinkexport.quant.weight import WeightScheme

PRODUCERS = ("sinkexport", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def model_facts(
    loaded: LoadedModel,
    shape: AttentionShape,
    rotary: ModelRotary,
    special_ids: tuple[int | None, tuple[int, ...]],
    *,
    vocab_size: int,
) -> ModelFacts:
    """Facts about the model. special_ids: the beginning of a text, and the ends of a turn."""
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
    turning = [spec for spec in rotary.calls if spec.rotary_dim]
    if shape.alibi_slopes is not None:
        return "alibi"
    if not turning:
        return "none"
    spec = turning[0]
    parts = [f"rope {spec.rotary_dim} of {shape.head_dim}", "interleaved" if spec.interleaved else "halves"]
    if len(turning) < shape.num_layers:
        parts.append(f"in {len(turning)} of {shape.num_layers} layers")
    if (tables := len({spec.table for spec in turning})) > 1:
        parts.append(f"{tables} sets of frequencies")
    return ", ".join(parts)


def quantization_facts(config: ExportConfig, kept: Collection[WeightScheme] = ()) -> Quantization | None:
    """Quantisation of the bundle; None: it has none. kept: how matrices of a quantised checkpoint are written."""
    recipe = config.recipe
    if recipe is None or (recipe.stored is not None and not kept and recipe.kv == "fp"):
        return None
    bits = [scheme.bits for scheme in kept] if recipe.weights is None else [recipe.weights.bits]
    return Quantization(
        recipe=recipe.name,
        weights=f"int{max(set(bits), key=bits.count)}" if bits else "float",
        activations=recipe.activations.mode,
        kv=recipe.kv,
        calibration_sha256=None if config.calibration is None else config.calibration.sha256,
        thresholds=recipe.thresholds.model_dump(),
    )


def head_windows(caches: Sequence[HeadCache]) -> list[HeadWindow]:
    """Key heads by the window of their cache, in the order of the states."""
    return [
        HeadWindow(layer=cache.layer, kv_heads=cache.kv_heads, window_size=cache.ring.window_size) for cache in caches
    ]


def attention_caches(model: ModelFacts, caches: Sequence[HeadCache]) -> tuple[AttentionCache, ...] | None:
    """Sizes of every cache, in the order of the states; None: each has the model's, one a layer."""
    if not all(cache.is_whole for cache in caches):
        return None  # groups of the heads of one cache
    return attention_entries(
        model,
        [
            AttentionCache(
                layer=cache.layer,
                call=cache.number,
                num_q_heads=len(cache.q_heads),
                num_kv_heads=len(cache.kv_heads),
                key_dim=cache.key_dim,
                value_dim=cache.value_dim,
                latent=cache.is_latent,
            )
            for cache in sorted(caches, key=lambda cache: cache.layer)
        ],
    )


def producers() -> Mapping[str, str]:
    """Packages that made the bundle, and their versions."""
    return {name: importlib.metadata.version(name) for name in PRODUCERS}
