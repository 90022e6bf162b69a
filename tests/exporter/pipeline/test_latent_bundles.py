"""Bundles of models with latent attention: what they hold, how much of it, and that their weights are the file's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.families.latent import KEYS, VALUES, Latent
from sinkexport.families.shape import AttentionCall, AttentionShape
from sinkexport.loading.weights.check_weights import check_weights
from sinkexport.model.head_caches import head_caches
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import load_recipe
from sinkexport.reference.dense import dense_logits
from sinkexport.sources import LoadedModel
from sinkrt import Session
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model
from tests.support import SharedExports, random_ids

DEEPSEEK_V3 = Latent("kv_b_proj.weight", num_heads=128, rest_dim=128, value_dim=128, latent_dim=512, rotary_dim=64)
GEOMETRY = {"num_sink_tokens": 2, "window_size": 8, "batch": 3, "chunk_size": 4}
CONFIG = ExportConfig(**GEOMETRY)


def test_cache_of_deepseek_v3() -> None:
    """1.2 KB a token and layer in float16 where keys and values of all heads take 82 KB."""
    call = AttentionCall(layer=0, number=0, num_q_heads=128, num_kv_heads=128, key_dim=192, value_dim=128)
    latent = dataclasses.replace(call, latent=DEEPSEEK_V3)
    elements = []
    for one in (latent, call):
        calls = tuple(dataclasses.replace(one, layer=layer) for layer in range(61))
        caches = head_caches(CONFIG, CONFIG.variant, AttentionShape(61, calls))
        elements.append(sum(len(cache.kv_heads) * cache.num_elements for cache in caches))
    assert elements == [61 * 576, 61 * 128 * (192 + 128)]
    assert 2 * elements[0] == 70_272  # bytes a token in float16
    assert 2 * elements[1] == 4_997_120


def exported(name: str, folder: Path, config: ExportConfig = CONFIG) -> tuple[torch.nn.Module, Path]:
    model = tiny_model(name)
    export_loaded(LoadedModel(model, None, name), folder / "bundle", config)
    return model, folder / "bundle"


def test_states_and_weights(tmp_path: Path) -> None:
    """One row a token, and the matrix once: in two parts, without the model's own expansion."""
    model, bundle = exported("deepseek_v3", tmp_path)
    with Session.load(bundle) as session:
        manifest = session.manifest
    assert [(state.kind, state.shape[1:]) for state in manifest.states] == [
        ("sink_k", (1, 2, 24)),
        ("window_k", (1, 8, 24)),
    ] * 2
    assert all(cache.latent and (cache.key_dim, cache.value_dim) == (24, 16) for cache in manifest.caches)
    assert manifest.weights_bytes <= sum(parameter.nbytes for parameter in model.parameters())
    for role in manifest.graphs:
        names = [value.name for value in onnx.load(bundle / f"{role}.onnx", load_external_data=False).graph.initializer]
        of_matrix = sorted(name.rpartition(".")[2] for name in names if "kv_b_proj" in name)
        assert of_matrix == sorted([KEYS, VALUES] * 2)


@pytest.mark.parametrize("row", [3, 14], ids=["key", "value"])
def test_another_matrix_is_noticed(row: int, shared_export: SharedExports) -> None:
    """Each row of a head, of the key and of the value, is compared with the file's."""
    made = shared_export("minicpm3", **GEOMETRY)
    model, bundle = made.model, made.path
    files = ["decode.onnx", "prefill.onnx"]
    check_weights(bundle, files, LoadedModel(model, None, "m"), CONFIG, num_q_heads=6, num_kv_heads=6)
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight[16 + row] += 0.1
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.kv_b_proj\.weight"):
        check_weights(bundle, files, LoadedModel(model, None, "m"), CONFIG, num_q_heads=6, num_kv_heads=6)


def test_int8_weights_and_window(tmp_path: Path) -> None:
    """The matrix's parts are rounded as experts' matrices are; the window has two scales a row."""
    recipe = load_recipe("int8-weights").with_kv("int8")
    model, bundle = exported("minicpm3", tmp_path, dataclasses.replace(CONFIG, recipe=recipe))
    ids = random_ids(CONFIG.batch, CONFIG.capacity)
    with Session.load(bundle) as session:
        got = np.stack([session.step(column).copy() for column in ids.T], axis=1)
        kinds = {state.kind: state.dtype for state in session.manifest.states}
    assert kinds == {
        "sink_k": "float32",
        "window_k": "int8",
        "window_k_scale": "float16",
        "window_v_scale": "float16",
    }
    wanted = dense_logits(model, ids)
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.99
    names = [value.name for value in onnx.load(bundle / "decode.onnx", load_external_data=False).graph.initializer]
    assert sum(name.endswith((f"{KEYS}.uint8", f"{VALUES}.uint8")) for name in names) == 4


def test_plugin_keeps_keys_and_values(tmp_path: Path) -> None:
    """The TensorRT plugin has no kernel for such rows: there the model's own keys are cached, what turns first."""
    model = tiny_model("minicpm3", qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64)
    config = dataclasses.replace(CONFIG, target="tensorrt", dtype="fp16")
    manifest = export_loaded(LoadedModel(model.half(), None, "m"), tmp_path / "bundle", config, check=False)
    assert {state.shape[1:] for state in manifest.states} == {(6, 2, 64), (6, 8, 64)}
