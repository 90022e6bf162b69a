"""sinkrt: run sinkexport bundles forever, in constant memory. Needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sinkrt.errors import BackendError, BundleError, SinkError, StateError, UsageError

if TYPE_CHECKING:
    from sinkrt.scheduler import Scheduler
    from sinkrt.session import Session, StreamCopy

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BundleError",
    "Scheduler",
    "Session",
    "SinkError",
    "StateError",
    "StreamCopy",
    "UsageError",
    "__version__",
]


_LAZY = {"Scheduler": "sinkrt.scheduler", "Session": "sinkrt.session", "StreamCopy": "sinkrt.session"}


def __getattr__(name: str) -> Any:
    # Session brings ONNX Runtime along; the exporter and manifest readers need neither.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
