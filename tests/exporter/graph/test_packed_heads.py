"""Where SinkAttention of plugin graphs takes queries, keys and values as one, and where it does not.

What such graphs compute is in test_plugin_target.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from sinkexport.config import ExportConfig

from tests.exporter.tiny_models import tiny_model
from tests.support import export_model

HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "width"), [("llama", "fp16", 128), ("qwen3", "fp16", 0), ("llama", "fp32", 0)]
)
def test_steps_of_one_product_are_packed(tmp_path: Path, family: str, dtype: str, width: int) -> None:
    """Norms of heads and casts come between a matmul and attention: then there is a Split."""
    model = tiny_model(family, **HEADS)
    model = model.to(torch.float16) if dtype == "fp16" else model
    config = ExportConfig(num_sink_tokens=3, window_size=9, chunk_size=4, batch=2, dtype=dtype, target="tensorrt")
    bundle = tmp_path / "bundle"
    export_model(model, bundle, config, name=family)
    found = {role: _kinds(bundle / f"{role}.onnx") for role in ("decode", "prefill")}
    assert {attributes["packed_width"] for attributes in found["decode"]["SinkAttention"]} == {width}
    assert ("Split" in found["decode"]) == (width == 0)
    assert {attributes["packed_width"] for attributes in found["prefill"]["SinkAttention"]} == {0}


def _kinds(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Attributes of the nodes of each kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kinds.setdefault(node.op_type, []).append(attributes)
    return kinds
