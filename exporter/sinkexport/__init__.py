"""sinkexport: turn Hugging Face causal LMs into bundles that decode forever in constant memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkexport.config import ExportConfig
    from sinkexport.pipeline.export import export

__version__ = "0.1.0"
__all__ = ["ExportConfig", "__version__", "export"]


def __getattr__(name: str) -> Any:
    # `sinkexport run` must start without torch, so nothing heavy is imported before it is asked for.
    if name == "export":
        from sinkexport.pipeline.export import export

        return export
    if name == "ExportConfig":
        from sinkexport.config import ExportConfig

        return ExportConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
