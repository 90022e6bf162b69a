"""Indexers: small layers that choose the tokens which an attention may see (DeepSeek sparse attention,
arXiv:2512.02556; block-sparse in MiniMax M3).

An indexer that may choose as many tokens as a cache holds chooses all of them: attention is dense then, and the indexer
is left out of the graph with its weights. With fewer than that the model is refused. That a layer does nothing else is
found by the check of the export: there the model computes with its own indexers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

_LIMITS = (("index_topk",), ("topk_blocks", "block_size"), ("block_topk", "compress_ratio"))
"""Attributes of an indexer whose product is the number of tokens that it chooses."""


class EveryToken(torch.nn.Module):
    """Stands in for an indexer and chooses all tokens. layer_idx: of its layer."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.chosen: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """hidden_states [B, T, N] -> bool [B, 1, T, T], which those that want indices pass on unread."""
        batch, num_tokens, _width = hidden_states.shape
        self.chosen = torch.ones(batch, 1, num_tokens, num_tokens, dtype=torch.bool)
        return self.chosen


def find_indexers(model: Any) -> dict[str, Any]:
    """The indexers of `model`, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "indexer" and getattr(module, "layer_idx", None) is not None
    }


def refuse_small_indexes(model: Any, capacity: int) -> None:
    """Refuse a model whose indexers or dynamic masks choose fewer tokens than a cache of `capacity` holds.

    Raises: UsageError with the number.
    """
    for name, module in find_indexers(model).items():
        num_tokens = _num_tokens(module)
        if num_tokens is None:
            received, expected = (
                f"an indexer of an unknown kind, '{name}'",
                "one whose number of chosen tokens is known",
            )
            fix = "this model cannot be exported exactly"
        elif num_tokens < capacity:
            received = f"an indexer that chooses {num_tokens} tokens, and a cache of {capacity} (sinks and window)"
            expected = "a cache that it chooses whole: attention is dense then"
            fix = f"use --window with at most {num_tokens} tokens, less the sinks"
        else:
            continue
        raise UsageError(problem("attention", received=received, expected=expected, fix=fix))
    for module in model.modules():
        kept = getattr(module, "keep_window_size", None)  # of a dynamic mask
        if isinstance(kept, int) and kept < capacity:
            raise UsageError(
                problem(
                    "attention",
                    received=f"a dynamic mask that keeps {kept} tokens, and a cache of {capacity} (sinks and window)",
                    expected="a cache that it keeps whole: attention is dense then",
                    fix=f"use --window with at most {kept} tokens, less the sinks",
                )
            )


def _num_tokens(indexer: Any) -> int | None:
    """Number of tokens that an indexer chooses; None: it is of another kind."""
    for names in _LIMITS:
        found = [getattr(indexer, name, None) for name in names]
        if all(isinstance(one, int) and one > 0 for one in found):
            product = 1
            for one in found:
                product *= int(one)  # type: ignore[arg-type]
            return product
    return None


@contextlib.contextmanager
def every_token_chosen(model: Any) -> Iterator[list[EveryToken]]:
    """All indexers of `model` choose all tokens inside a context. Yields: their stand-ins. Contexts may nest."""
    found = find_indexers(model)
    stand_ins = {
        name: module if isinstance(module, EveryToken) else EveryToken(module.layer_idx)
        for name, module in found.items()
    }
    try:
        for name, module in stand_ins.items():
            _put(model, name, module)
        yield list(stand_ins.values())
    finally:
        for name, module in found.items():
            _put(model, name, module)


def without_choices(stand_ins: Iterable[EveryToken], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of the attention function, less what these have chosen."""
    chosen = [one.chosen for one in stand_ins if one.chosen is not None]
    return {name: value for name, value in arguments.items() if not any(value is one for one in chosen)}


def no_mask(*, batch_size: int, q_length: int, kv_length: int, **_: Any) -> torch.Tensor:
    """transformers' mask interface: a mask [B, 1, T, n] that hides nothing, for code that wants one."""
    return torch.zeros(batch_size, 1, q_length, kv_length)


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
