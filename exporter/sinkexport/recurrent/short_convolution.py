"""Short convolutions without another state (LFM2, LFM2-MoE, LFM3): the last inputs are the state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sinkexport.recurrent.rules import CacheRule, has_functions
from sinkexport.recurrent.states import StateKey, Tokens
from sinkexport.recurrent.step_cache import StepCache


def covers(module: Any, keys: frozenset[StateKey]) -> bool:
    """Whether a module with states of these keys only convolves its last inputs."""
    return {kind for kind, _ in keys} == {"conv"} and has_functions(module, "causal_conv1d_update", "causal_conv1d_fn")


@contextlib.contextmanager
def unchanged(_model: Any, _cache: StepCache, _tokens: Tokens) -> Iterator[None]:
    """Leave a model as it is: `StepCache` keeps the inputs that count."""
    yield


SHORT_CONVOLUTION = CacheRule("short convolution", covers, unchanged)
