"""SmoothQuant's divisors (arXiv:2211.10438) from channels' largest values and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sinkrt.errors import UsageError, problem

from sinkexport.calibration.file import rounded
from sinkexport.calibration.observers import ChannelMaxima
from sinkexport.families.interface import intercept_attention
from sinkexport.families.probe import probe_attention
from sinkexport.families.shape import AttentionShape

LEAST = 1e-5
"""Largest values of channels and of weights are taken to be at least this: a divisor must not be 0."""


def smoothing(
    model: Any, groups: Mapping[str, tuple[str, ...]], maxima: ChannelMaxima, alpha: float, *, with_sinks: bool
) -> dict[str, npt.NDArray[np.float32]]:
    """What to divide each input by, [K] by the first module of each group, as they are written to the file.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), w of all layers that read x, scaled to a geometric mean of 1. Query
    heads that share a value head share their divisors, so that the values' projection can take them over.

    Raises: UsageError if layers attend with heads of different sizes.
    """
    shape, _ = probe_attention(model, model.config.get_text_config().num_hidden_layers)
    outputs = attention_outputs(model, groups)
    if outputs and not shape.is_uniform:
        raise UsageError(
            problem(
                "recipe",
                received="smoothing, for a model whose layers attend with heads of different sizes",
                expected="heads of one size in all layers",
                fix="choose a recipe without smoothing",
            )
        )
    found = {}
    for first, members in groups.items():
        x = maxima.counted(first, with_sinks=with_sinks).astype(np.float64)
        w = np.max(
            [model.get_submodule(name).weight.detach().float().abs().amax(dim=0).numpy() for name in members], axis=0
        ).astype(np.float64)
        if first in outputs:
            x, w = _shared(x, shape), _shared(w, shape)
        divisors = np.maximum(x, LEAST) ** alpha / np.maximum(w, LEAST) ** (1.0 - alpha)
        divisors /= np.exp(np.log(divisors).mean())
        found[first] = np.array([rounded(value) for value in divisors], np.float32)
    return found


def attention_outputs(model: Any, groups: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The first modules of groups that read what attention gives, head by head, and nothing else.

    One token is run to find out: their inputs lie where the attention function's results do.
    """
    results: list[torch.Tensor] = []  # kept, or an address could come twice
    found: set[str] = set()

    def attend(
        _module: Any, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        results.append(q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]))  # [B, 1, Hq, D]
        return results[-1], None

    def look(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            if any(x.data_ptr() == out.data_ptr() and x.numel() == out.numel() for out in results):
                found.add(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in groups]
    try:
        with torch.no_grad(), intercept_attention(model, attend):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shared(values: npt.NDArray[np.float64], shape: AttentionShape) -> npt.NDArray[np.float64]:
    """[Hq * D]: the largest of the query heads that share a value head."""
    heads = values.reshape(shape.num_kv_heads, -1, shape.head_dim)  # [Hkv, Hq / Hkv, D]
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)
