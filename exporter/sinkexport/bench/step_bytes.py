"""Bytes of weights that one decode step has to read, as the export recorded them."""

from __future__ import annotations

from pathlib import Path

from sinkrt.contract import Manifest
from sinkrt.errors import BundleError, problem


def weight_bytes_per_step(bundle: Path, manifest: Manifest) -> int:
    """Return the bytes from the manifest; of a bundle made before schema 6, from its graph.

    Raises: BundleError if the graph cannot be read, or must be and onnx is not installed.
    """
    graph = manifest.graphs["decode"]
    return weight_bytes_of_file(bundle / graph.file) if graph.weight_bytes is None else graph.weight_bytes


def weight_bytes_of_file(graph_file: Path) -> int:
    """Return the bytes of weights that one run of any ONNX file reads.

    Raises: BundleError if the file is no ONNX graph, or onnx is not installed.
    """
    try:
        import onnx
        import onnx_ir as ir
        from google.protobuf.message import DecodeError

        from sinkexport.graph.weight_bytes import weight_bytes
    except ModuleNotFoundError:
        raise BundleError(
            problem(
                "bytes per step",
                received=f"a manifest that does not record them for '{graph_file.name}'",
                expected="one of schema 6 or newer",
                fix="export the model again, or pip install 'sinkexport[export]'",
            )
        ) from None
    try:
        model = onnx.load(str(graph_file), load_external_data=False)
        if not model.HasField("graph"):
            raise ValueError("no graph")
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(
            problem(
                graph_file.name,
                received=f"a file that is no ONNX graph ({type(error).__name__})",
                expected="a graph that 'sinkexport export' wrote",
                fix="export the model again",
            )
        ) from None
    return weight_bytes(ir.from_proto(model))
