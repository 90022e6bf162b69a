"""sinkrt: run sinkexport bundles forever, in constant memory. Needs no torch."""

from sinkrt.errors import BackendError, BundleError, SinkError, StateError, UsageError
from sinkrt.session import Session

__version__ = "0.1.0"
__all__ = ["BackendError", "BundleError", "Session", "SinkError", "StateError", "UsageError", "__version__"]
