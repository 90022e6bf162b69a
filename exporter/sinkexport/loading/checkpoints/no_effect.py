"""Tensors that a weight file may hold without any effect on the next token: a short list, each with its reason."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import FileTensor, ZeroBias

MASKED_LOGIT = -1e4
"""Largest logit of a masked token in old checkpoints."""


@dataclasses.dataclass(frozen=True)
class NoEffect:
    """names: pattern of names, searched for. fits: whether a tensor of such a name is what its name says.

    family: only where the model's family declares that it does not read it.
    """

    names: re.Pattern[str]
    reason: str
    fits: Callable[[FileTensor], bool] = lambda _: True
    agrees: Callable[[FileTensor, Any], bool] = lambda *_: True
    family: bool = False


def _is_causal_mask(tensor: FileTensor) -> bool:
    """[1, 1, n, n], or less of it, of ones on and below the diagonal."""
    shape = [n for n in tensor.shape if n != 1]
    if len(shape) != 2 or shape[0] != shape[1]:
        return False
    mask = np.asarray(tensor.array()).reshape(shape).astype(bool)
    return bool((mask == np.tri(shape[0], dtype=bool)).all())


def _is_masked_logit(tensor: FileTensor) -> bool:
    return int(np.prod(tensor.shape)) == 1 and float(np.asarray(tensor.array()).reshape(())) <= MASKED_LOGIT


def _counts_up(tensor: FileTensor) -> bool:
    values = np.asarray(tensor.array()).reshape(-1)
    return bool((values == np.arange(len(values))).all())


def _are_the_models(tensor: FileTensor, model: Any) -> bool:
    """Whether frequencies are those of the model's rotary embeddings, but for rounding to bfloat16."""
    stored = np.asarray(tensor.array(), np.float32).reshape(-1)
    own = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    if not own or any(buffer.is_meta for buffer in own):  # computed in the family's code; or a mere outline of a model
        return True
    return any(
        len(stored) == buffer.numel() and np.allclose(stored, buffer.float().numpy(), rtol=0.01, atol=1e-9)
        for buffer in own
    )


DECAYS = ("query_decay", "key_decay", "diagonal_decay")
"""Buffers of lightning attention, in the order in which its `decay_factors` computes them of `slope_rate`."""


def _are_powers_of_the_slope(tensor: FileTensor, model: Any) -> bool:
    """Whether factors for a block of tokens of lightning attention are those of the layer's own decay rate."""
    name, _, kind = tensor.name.rpartition(".")
    module: Any = next((m for own, m in model.named_modules() if own == name or own.endswith(f".{name}")), None)
    rate = getattr(module, "slope_rate", None)
    if rate is None or rate.is_meta:
        return rate is not None
    factors = module.decay_factors(rate)[DECAYS.index(kind)]
    stored = np.asarray(tensor.array(), np.float32)
    return stored.size == factors.numel() and np.allclose(
        stored.reshape(-1), factors.float().numpy().reshape(-1), rtol=0.02, atol=1e-4
    )


TABLE = (
    NoEffect(
        re.compile(r"rotary_emb\.inv_freq$|(attn|attention)\.inv_freq$"),
        "frequencies, computed from the configuration: compared with it",
        agrees=_are_the_models,
    ),
    NoEffect(
        re.compile(rf"(^|\.)({'|'.join(DECAYS)})$"),
        "powers of a layer's decay rate: compared with it",
        agrees=_are_powers_of_the_slope,
    ),
    NoEffect(
        re.compile(r"(attn|attention|self_attention)\.(bias|causal_mask|mask)$"), "a causal mask", _is_causal_mask
    ),
    NoEffect(
        re.compile(r"(attn|attention|self_attention)\.masked_bias$"), "the logit of a masked token", _is_masked_logit
    ),
    NoEffect(re.compile(r"\.bias$"), "zeros that GPTQ's programs save", lambda tensor: isinstance(tensor, ZeroBias)),
    NoEffect(re.compile(r"(^|\.)position_ids$"), "0, 1, 2 ..", _counts_up),
    NoEffect(re.compile(r"(^|\.)mtp(\.|_|$)"), "drafts of later tokens: decoding one by one needs none", family=True),
    NoEffect(re.compile(r"(^|\.)layers\.\d+\."), "a layer that drafts later tokens", family=True),
    NoEffect(
        re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\."),
        "reads images or sound, not text",
        family=True,
    ),
)


def why_no_effect(tensor: FileTensor, model: Any) -> str | None:
    """The reason why a tensor that the model has no place for changes nothing; None: there is none."""
    declared = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for entry in TABLE:
        if not entry.names.search(tensor.name) or not entry.fits(tensor):
            continue
        if entry.family and not any(pattern.search(tensor.name) for pattern in declared):
            continue
        if not entry.agrees(tensor, model):
            continue
        return entry.reason
    return None
