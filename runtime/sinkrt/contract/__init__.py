"""The bundle's manifest: the only thing that the exporter and the runtimes share.

``manifest.json`` names every file of a bundle with its size and SHA-256, and every graph with its tensors.
It also names every state tensor, with the input and the output that must be bound to one buffer.
Standard library only, so that any tool can read a bundle.

The schema version is one integer. A runtime reads its own version and older ones it knows;
a newer one is refused, because guessing at an unknown field could silently change results.

The C++ runtime's structs, readers and constants are generated from this package (runtime/cpp/tools/make_manifest.py).
"""

from sinkrt.contract.constants import (
    CPU_ABI,
    DTYPE_BYTES,
    MANIFEST_NAME,
    MASS_KIND,
    NO_TOKEN,
    PLUGIN_ABI,
    RECURRENT_KINDS,
    SCALE_KINDS,
    SCHEMA_VERSION,
    STATE_KINDS,
    TARGETS,
)
from sinkrt.contract.files import check_files, hash_file, load_manifest
from sinkrt.contract.layout import attention_entries
from sinkrt.contract.manifest import Manifest
from sinkrt.contract.reader import build_from_json
from sinkrt.contract.schema import (
    ActTuning,
    AffineAttention,
    AttentionCache,
    EngineFacts,
    FileFacts,
    GraphSpec,
    HeadWindow,
    ModelFacts,
    Quantization,
    SinkTuning,
    StateSpec,
    StreamFacts,
    TensorSpec,
    TokenizerFacts,
)

__all__ = [
    "CPU_ABI",
    "DTYPE_BYTES",
    "MANIFEST_NAME",
    "MASS_KIND",
    "NO_TOKEN",
    "PLUGIN_ABI",
    "RECURRENT_KINDS",
    "SCALE_KINDS",
    "SCHEMA_VERSION",
    "STATE_KINDS",
    "TARGETS",
    "ActTuning",
    "AffineAttention",
    "AttentionCache",
    "EngineFacts",
    "FileFacts",
    "GraphSpec",
    "HeadWindow",
    "Manifest",
    "ModelFacts",
    "Quantization",
    "SinkTuning",
    "StateSpec",
    "StreamFacts",
    "TensorSpec",
    "TokenizerFacts",
    "attention_entries",
    "build_from_json",
    "check_files",
    "hash_file",
    "load_manifest",
]
