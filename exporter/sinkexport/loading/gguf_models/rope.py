"""Rotary positions of a GGUF model as transformers' rope_parameters.

llama.cpp rotates pair j of R by the angle position * base^(-2j/R) / (factor * freqs[j]) and multiplies queries and
keys by an attention factor; YaRN (arXiv:2309.00071) mixes scaled and unscaled angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sinkexport.loading.gguf_models.facts import MAX_LENGTH, Facts, refused, shortest
from sinkexport.loading.gguf_models.tensors import dequantised

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors of factors for each pair, float32 [R / 2]: for any text, for texts past the original length, for others."""

DEFAULT_BASE = 10000.0


def rope_parameters(facts: Facts, head_dim: int, *, tensors: bool = False, truncate: bool = True) -> dict[str, Any]:
    """Argument ``rope_parameters`` of a transformers configuration.

    tensors: whether the architecture reads tensors of factors. truncate: whether YaRN's bounds are whole pairs.
    Raises: UsageError for scaling that transformers has no exact equal of.
    """
    rotary_dim = facts.count("rope.dimension_count", head_dim, least=2)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise refused(
            f"'{facts.architecture}.rope.dimension_count' = {rotary_dim} for heads of {head_dim}",
            f"an even number up to {head_dim}",
        )
    found: dict[str, Any] = {"rope_theta": facts.number("rope.freq_base", DEFAULT_BASE)}
    if rotary_dim != head_dim:
        found["partial_rotary_factor"] = share(rotary_dim, head_dim)
    kind, factor = _scaling(facts)
    attention = facts.number("rope.scaling.attn_factor", 1.0)
    original = facts.count("rope.scaling.original_context_length", facts.context_length, most=MAX_LENGTH)
    yarn = _yarn_settings(facts, kind)
    freqs = _factors(facts, FREQS, rotary_dim) if tensors and kind != "longrope" else None
    long = _factors(facts, LONG, rotary_dim) if tensors else None
    short = _factors(facts, SHORT, rotary_dim) if tensors else None
    if (long is None) != (short is None):
        raise refused(f"one of '{LONG}' and '{SHORT}' alone", "both")
    if kind == "yarn":
        if freqs or long:
            raise refused("YaRN and a tensor of factors", "one of them")
        return found | _yarn(factor, original, attention, yarn, truncate)
    if kind == "longrope" and long is None:
        raise refused(f"'{facts.architecture}.rope.scaling.type' = 'longrope' without '{LONG}'", "both its tensors")
    if long and short and freqs:
        raise refused(f"'{FREQS}' and '{LONG}'", "one of them")
    if long is None and freqs is None and attention == 1.0:
        return found | ({"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor})
    uniform = freqs or [1.0] * (rotary_dim // 2)
    return found | {
        "rope_type": "longrope",
        "short_factor": [factor * one for one in short or uniform],
        "long_factor": [factor * one for one in long or uniform],
        "attention_factor": attention,
        "factor": 1.0,  # unused beside an attention factor; transformers warns without it
        "original_max_position_embeddings": original,
    }


def check_rotation(model: Any, parameters: Mapping[str, Any], head_dim: int) -> None:
    """Compare the frequencies that `model` rotates with to those that `parameters` stand for.

    Not every class of transformers reads every parameter: a Llama rotates whole heads whatever the share.
    YaRN's own values are not computed again, their number is.
    Raises: UsageError.
    """
    import numpy as np

    nested = {kind: one for kind, one in parameters.items() if isinstance(one, dict)}
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        kind = name.rpartition(".")[2].removesuffix("inv_freq").removesuffix("_")
        one = nested[kind] if nested else parameters
        rotary_dim = int(head_dim * one.get("partial_rotary_factor", 1.0))
        found = buffer.double().numpy()
        expected = one["rope_theta"] ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        if one["rope_type"] == "longrope":
            expected = expected / np.array(one["short_factor"])
        elif one["rope_type"] == "linear":
            expected = expected / one["factor"]
        same = len(found) == len(expected) and (
            one["rope_type"] == "yarn" or np.allclose(found, expected, rtol=1e-5, atol=0.0)
        )
        if not same:
            raise refused(
                f"rotation of {rotary_dim} of {head_dim} columns by {one['rope_type']} scaling",
                f"what transformers' {type(model).__name__} rotates by: {2 * len(found)} columns",
            )


def share(rotary_dim: int, head_dim: int) -> float:
    """The fraction that ``int(head_dim * fraction)`` makes `rotary_dim` of."""
    fraction = rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rotary_dim else math.nextafter(fraction, 1.0)


def _scaling(facts: Facts) -> tuple[str, float]:
    """Kind of scaling and its factor, 1.0 for none. The kind is linear if only a factor is there."""
    kind = facts.value("rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise refused(f"'{facts.architecture}.rope.scaling.type' = {kind!r}", "none, linear, yarn or longrope")
    old = facts.number("rope.scale_linear", 0.0, positive=False)
    factor = facts.number("rope.scaling.factor", old, positive=False) or 1.0
    if factor < 0:
        raise refused(f"'{facts.architecture}.rope.scaling.factor' = {factor}", "a number above 0")
    facts.expect("rope.scaling.alpha", 0.0, "scaling of the base")
    return kind or "linear", 1.0 if kind == "none" else factor


def _yarn_settings(facts: Facts, kind: str) -> dict[str, float]:
    """YaRN's settings that are there; without YaRN there must be none."""
    keys = {name: facts.value(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow", "attn_factor")}
    given = {name: facts.number(f"rope.scaling.yarn_{name}") for name, value in keys.items() if value is not None}
    facts.expect("rope.scaling.yarn_ext_factor", 1.0, "any other is not in transformers")
    facts.expect("rope.scaling.yarn_log_multiplier", 0.0, "only latent attention has another")
    if given and kind != "yarn":
        raise refused(f"YaRN's settings ({', '.join(given)}) with scaling of type '{kind}'", "scaling of type 'yarn'")
    return given


def _yarn(factor: float, original: int, attention: float, settings: dict[str, float], truncate: bool) -> dict[str, Any]:
    """transformers' YaRN. Its attention factor is the whole one, llama.cpp's a factor beside the paper's."""
    total = settings.get("attn_factor", 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0) * attention
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": settings.get("beta_fast", 32.0),
        "beta_slow": settings.get("beta_slow", 1.0),
        "attention_factor": total,
        "truncate": truncate,
    }


def _factors(facts: Facts, name: str, rotary_dim: int) -> list[float] | None:
    """The factors of a tensor, None if it is absent.

    Raises: UsageError for another length, and for factors that are not above 0.
    """
    import numpy as np

    if name not in facts.tensors:
        return None
    if facts.shape(name) != (rotary_dim // 2,):
        raise refused(f"tensor '{name}' of shape {facts.shape(name)}", f"({rotary_dim // 2},)")
    values = dequantised(facts.tensors[name])
    if not np.isfinite(values).all() or (values <= 0).any():
        raise refused(f"tensor '{name}' with factors that are not above 0", "finite factors above 0")
    return [shortest(float(value)) for value in values]
