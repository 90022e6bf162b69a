"""Parameters that a model has and its code does not read: options turned off, and indexers that choose all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkexport.families.interface import intercept_attention

NUM_TOKENS = 8


class _Readers(TorchDispatchMode):
    """Records which tensors operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read.update(id(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.nn.Parameter))
        return function(*args, **(kwargs or {}))


def unread_parameters(model: Any) -> frozenset[str]:
    """Names of parameters that no operator reads while the model's own code computes logits, by all their names."""

    def attend(
        _module: Any, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous(), None

    ids = torch.arange(NUM_TOKENS)[None]
    with torch.no_grad(), intercept_attention(model, attend), _Readers() as readers:
        model(input_ids=ids, position_ids=ids, use_cache=False)
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if id(parameter) not in readers.read)
