"""The forms of quantised matmuls by the names that targets have for them."""

from __future__ import annotations

from collections.abc import Mapping

from sinkexport.graph.quantize.cpu import CpuForm
from sinkexport.graph.quantize.ort import OrtForm
from sinkexport.graph.quantize.plugin import PluginForm
from sinkexport.graph.quantize.qdq import QdqForm

FORMS: Mapping[str, type[OrtForm] | type[QdqForm]] = {
    "ort": OrtForm,
    "qdq": QdqForm,
    "plugin": PluginForm,
    "cpu": CpuForm,
}
