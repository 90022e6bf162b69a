"""When Python looks for garbage."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def no_garbage_collection(*, is_lasting: bool = False) -> Iterator[None]:
    """Suspend the collector while imports and tracing make millions of small objects that live on.

    It would look through all of them again and again, a fifth of the whole time, and find a few megabytes.

    is_lasting: if modules are imported meanwhile, never look through the objects that exist at the end either. A first
    look at those of torch and transformers takes a third of a second.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if is_lasting and len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
