"""How to build an engine, and what is reported about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MODULE = "tensorrt_rtx_bindings"
FLAVOURS = {"auto": ("tensorrt", MODULE), "tensorrt": ("tensorrt",), "rtx": (MODULE,)}
"""Python packages that build engines, the preferred one first, by the flavour that is asked for."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    plugin: the library of plugins/trt; None: the graph has standard operators only.
    workspace_bytes: largest scratch memory of a layer; None: TensorRT's default.
    timing_cache: a file that is read if it is there and written afterwards.
    tactic_sources: bits by TensorRT's TacticSource, the libraries of kernels; None: TensorRT's default.
    modules: packages to try, in this order.
    """

    plugin: Path | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    tactic_sources: int | None = None
    modules: tuple[str, ...] = (MODULE,)


@dataclass(frozen=True)
class EngineReport:
    """Result of building one ONNX graph.

    tensorrt: its version. flavour: ``TensorRT | TensorRT-RTX``. plugin_abi: of the plugin that was loaded, if one was.
    gpu, compute_capability: what it was built for, the latter as ``9.0``; None: all that the flavour supports.
    layer_types: layers by type, e.g. ``{"MATRIX_MULTIPLY": 241}``.
    inputs, outputs: names, in the graph's order.
    in_place: (input, output) names of each state that a KVCacheUpdate layer writes in place.
    warnings: TensorRT's, without repeats.
    parse_s, build_s: seconds. engine_bytes: size of the serialized engine, weights included.
    """

    tensorrt: str
    flavour: str
    plugin_abi: str | None
    gpu: str | None
    compute_capability: str | None
    layer_types: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_place: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    parse_s: float
    build_s: float
    engine_bytes: int

    @property
    def num_layers(self) -> int:
        """Layers of the parsed network, before TensorRT fuses any."""
        return sum(self.layer_types.values())
