"""Weights that a model has and its code does not read: options turned off, indexers that choose all tokens, and what
serves images and sounds."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkexport.families.interface import intercept_attention, own_values

NUM_TOKENS = 8


class _Readers(TorchDispatchMode):
    """Records which of some tensors operators are called with. known: their ids; they live as long as this does."""

    def __init__(self, known: frozenset[int]) -> None:
        super().__init__()
        self._known = known
        self.read: set[int] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read.update(self._known.intersection(id(one) for one in tree_leaves((args, kwargs))))
        return function(*args, **(kwargs or {}))


def unread_weights(model: Any) -> frozenset[str]:
    """Names of parameters and saved buffers that no operator reads while the model's own code computes logits.

    All names of each are given.
    """

    def attend(
        _module: Any, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        return own_values(q, v), None

    places = torch.arange(NUM_TOKENS)[None]
    ids = places % model.config.get_text_config().vocab_size
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved]
    named = [*model.named_parameters(remove_duplicate=False), *buffers]
    known = frozenset(id(tensor) for _, tensor in named)
    with torch.no_grad(), intercept_attention(model, attend), _Readers(known) as readers:
        model(input_ids=ids, position_ids=places, use_cache=False)
    return frozenset(name for name, tensor in named if id(tensor) not in readers.read)
