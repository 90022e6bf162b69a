"""Rules for layers that keep their states in transformers' own cache, and what all such rules need."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from sinkexport.recurrent.states import StateKey, Tokens
from sinkexport.recurrent.step_cache import StepCache


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """How one kind of layer computes from the states of a `StepCache`.

    name: of the rule, for people. covers: whether a module that asks the cache for states of these keys follows it.
    in_place: makes a model skip what is no token, and compute chunks in few nodes, inside a context. It does nothing to
    a model without such layers.
    """

    name: str
    covers: Callable[[Any, frozenset[StateKey]], bool]
    in_place: Callable[[Any, StepCache, Tokens], AbstractContextManager[None]]


def has_functions(module: Any, *names: str) -> bool:
    """Whether the file that defines a module's class defines these functions, too."""
    file = sys.modules[type(module).__module__]
    return all(callable(getattr(file, name, None)) for name in names)


@contextlib.contextmanager
def replaced_functions(model: Any, replacements: Mapping[str, Callable[[Callable[..., Any]], Any]]) -> Iterator[None]:
    """Replace functions of transformers in each file of a model's classes that has all of them, inside a context.

    replacements: by name; each takes the function and returns what replaces it.
    """
    names = {type(module).__module__ for module in model.modules()}
    files = [
        file for file in (sys.modules[name] for name in sorted(names)) if all(hasattr(file, n) for n in replacements)
    ]
    with contextlib.ExitStack() as patches:
        for file in files:
            for name, replace in replacements.items():
                patches.enter_context(mock.patch.object(file, name, replace(getattr(file, name))))
        yield
