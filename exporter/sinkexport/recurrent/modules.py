"""Modules of transformers that keep their states to themselves, with explicit states in their place.

transformers' common cache knows nothing of them: RecurrentGemma keeps states in its modules, MiniMax has a cache of its
own, RWKV and xLSTM take lists, and a Zaya layer asks for states that a chunk with a padded end cannot give. Each is
recognised by its class, and its `forward` is replaced for as long as a context lasts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from sinkexport.recurrent.states import StateKey


@dataclasses.dataclass
class TokenStates:
    """States of one module while T tokens of each of B streams run through it.

    states: by kind and index, [B, ..]; what became of them is put in their place. is_token: bool [B, T]. num_valid:
    int64 [1] where T > 1: the number of tokens, which come first; None: all T. begins: bool [B, T], the first token of
    a stream.
    """

    states: dict[StateKey, torch.Tensor]
    is_token: torch.Tensor
    num_valid: torch.Tensor | None
    begins: torch.Tensor

    def window(self, inputs: torch.Tensor, index: int = 0) -> torch.Tensor:
        """The last inputs before the tokens and theirs, [B, C, K + T], of inputs [B, C, T]. The last K are kept."""
        before = self.states["conv", index]
        seen = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
        num_kept, num_tokens = before.shape[-1], inputs.shape[-1]
        if self.num_valid is not None:
            after = seen.index_select(-1, self.num_valid + torch.arange(num_kept))
        else:
            after = seen[..., num_tokens:]
            if num_tokens == 1:
                after = torch.where(self.is_token[..., None], after, before.to(inputs.dtype))
        self.states["conv", index] = after.to(before.dtype)
        return seen


@dataclasses.dataclass(frozen=True)
class ModuleRule:
    """How one class of transformers computes with explicit states.

    shapes: of one stream's states, of a module. forward: takes the module, its states and what its own `forward` takes.
    """

    class_name: str
    shapes: Callable[[Any], Mapping[StateKey, tuple[int, ...]]]
    forward: Callable[..., Any]


def layer_of(name: str) -> int:
    """Index of the layer that a module with this name belongs to: the first number in it."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


@contextlib.contextmanager
def explicit_states(modules: Mapping[Any, tuple[ModuleRule, TokenStates]]) -> Iterator[None]:
    """Replace the `forward` of modules inside a context."""
    with contextlib.ExitStack() as patches:
        for module, (rule, states) in modules.items():
            replaced = functools.partial(rule.forward, module, states)
            patches.enter_context(mock.patch.object(module, "forward", replaced))
        yield
