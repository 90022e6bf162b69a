"""The targets: one file each, an ordered list of passes and the facts that the rest of the exporter reads.

`sinkexport/graph/README.md` says how to add one.
"""

from __future__ import annotations

from sinkexport.targets.cpu import CPU
from sinkexport.targets.onnx import ONNX
from sinkexport.targets.target import Target
from sinkexport.targets.tensorrt_native import TENSORRT_NATIVE
from sinkexport.targets.tensorrt_plugin import TENSORRT_PLUGIN

__all__ = [
    "AUTO",
    "CPU",
    "ONNX",
    "OPTIONS",
    "RECIPE_TARGETS",
    "TARGETS",
    "TENSORRT_NATIVE",
    "TENSORRT_PLUGIN",
    "Target",
    "find_target",
]

TARGETS = (ONNX, CPU, TENSORRT_PLUGIN, TENSORRT_NATIVE)
"""The registry: a new target is one line here and one above."""

RECIPE_TARGETS = (*dict.fromkeys(target.recipes for target in TARGETS), CPU.name)
"""Names that a recipe's ``targets`` may list: what is for onnx is for cpu, too."""

OPTIONS = tuple(dict.fromkeys(target.option for target in TARGETS))
"""Values of ``--target``, each once."""


AUTO = "auto"
"""Value of ``--target`` that leaves the choice to the machine: `sinkexport.config`."""


def find_target(option: str, *, native: bool = False) -> Target | None:
    """The target that ``--target`` and ``--native`` choose. None: there is no such combination."""
    return next((target for target in TARGETS if (target.option, target.native) == (option, native)), None)
