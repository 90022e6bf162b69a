"""Windows and chunks whose tables of positions are larger than a constant of a prefill graph may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from sinkexport.graph.builder import LARGE_CONSTANT_BYTES

from tests.exporter.tiny_models import tiny_model
from tests.support import export_model, random_ids


@pytest.mark.parametrize(
    ("name", "chunk_size", "window_size"),
    # [T, T] of truth values; [T, T] of distances; [W] of slots
    [("llama", 1025, 1030), ("bloom", 363, 370), ("llama", 3, 2**17 + 1)],
)
def test_large_tables_are_computed_in_the_graph(name: str, chunk_size: int, window_size: int, tmp_path: Path) -> None:
    """The export's own check agrees, and a long prompt ends where single steps do."""
    model = tiny_model(name, num_hidden_layers=1)
    bundle = export_model(model, tmp_path / "bundle", num_sink_tokens=2, window_size=window_size, chunk_size=chunk_size)
    graph = onnx.load(bundle.path / "prefill.onnx", load_external_data=False).graph
    own = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    assert max(tensor.ByteSize() for tensor in own) <= LARGE_CONSTANT_BYTES
    chunks, steps = bundle.session(), bundle.session()
    ids = random_ids(chunk_size + window_size % 50 + 7)
    found = chunks.prefill(ids)
    for token in ids:
        wanted = steps.step(np.array([token]))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
