"""sinkrt: run sinkexport bundles forever, in constant memory. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkrt.errors import BackendError, BundleError, SinkError, StateError, UsageError

if TYPE_CHECKING:
    from sinkrt.session import Session, StreamCopy

__version__ = "0.1.0"
__all__ = [
    "BackendError", "BundleError", "Session", "SinkError", "StateError", "StreamCopy", "UsageError", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Session brings ONNX Runtime along; the exporter and manifest readers need neither.
    if name in ("Session", "StreamCopy"):
        from sinkrt import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
