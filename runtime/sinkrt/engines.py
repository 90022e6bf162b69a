"""Check before loading that an engine of 'sinkexport build' may run here: TensorRT's own reasons say little.

Twin of runtime/cpp/src/bundle/engines.h.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sinkrt.contract import Manifest, hash_file
from sinkrt.contract.constants import PLUGIN_FILE as PLUGIN_FILE
from sinkrt.errors import BackendError, problem


@dataclasses.dataclass(frozen=True)
class EngineHost:
    """Software and GPU that would run an engine.

    flavour: ``TensorRT | TensorRT-RTX``. version: of it, in full. plugin_abi: of the plugin library that is loaded;
    None: none is. compute_capability: of the GPU, as ``9.0``.
    """

    flavour: str
    version: str
    plugin_abi: str | None
    compute_capability: str


def check_engine(bundle: Path, manifest: Manifest, role: str, host: EngineHost, *, hashes: bool = True) -> Path:
    """Path of the engine of the graph `role`, if it is whole, was made of this very graph and runs on `host`.

    hashes: compare SHA-256 too, not only the size.

    Raises: BackendError with the first reason why not.
    """
    facts, rebuild = (manifest.engines or {}).get(role), "run 'sinkexport build' on this machine"
    if facts is None:
        raise BackendError(problem(f"{role} engine", received="none", expected="one in the bundle", fix=rebuild))
    graph = manifest.files[manifest.graphs[role].file]
    wanted = (
        ("its graph", graph.sha256[:12], facts.graph_sha256[:12]),
        ("flavour", host.flavour, facts.flavour),
        ("version", _three_parts(host.version), _three_parts(facts.version)),
        ("plugin ABI", host.plugin_abi, facts.plugin_abi),
        ("compute capability", host.compute_capability, facts.compute_capability or host.compute_capability),
    )
    for what, here, built in wanted:
        if here != built and not (what == "plugin ABI" and built is None):
            raise BackendError(
                problem(
                    f"{role} engine: {what}",
                    received=f"one that was built for {built}",
                    expected=f"{here}, as here",
                    fix=rebuild,
                )
            )
    path = bundle / facts.file
    size = path.stat().st_size if path.is_file() else None
    if size != facts.bytes:
        received = "no such file" if size is None else f"{size} bytes"
        raise BackendError(problem(f"'{facts.file}'", received=received, expected=f"{facts.bytes} bytes", fix=rebuild))
    if hashes and hash_file(path).sha256 != facts.sha256:
        raise BackendError(problem(f"'{facts.file}'", received="other content", expected="what was built", fix=rebuild))
    return path


def _three_parts(version: str) -> str:
    """First three numbers of a version: the C++ library reports no more of itself, and no more decides."""
    return ".".join(version.split(".")[:3])
