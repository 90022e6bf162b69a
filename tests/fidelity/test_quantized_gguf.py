"""GGUF blocks as the integers that they hold, and what becomes of those that have minima."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.loading.checkpoints.file_tensor import QuantizedFileTensor
from sinkexport.loading.gguf_models.model import gguf_config, load_gguf
from sinkexport.loading.stored.gguf_blocks import TYPES, gguf_tensor
from sinkexport.pipeline.export import export_loaded
from sinkexport.pipeline.stored_weights import STORED
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel, locate
from sinkrt.contract import Manifest

from tests.fidelity.gguf_writer import Tiny, tiny, write
from tests.fidelity.test_gguf_models import FAMILIES
from tests.fidelity.test_quantized_folders import (
    EXACT,
    GEOMETRY,
    ROUNDED,
    error,
    logits,
    reference_logits,
    take_floating_inputs,
)
from tests.support import nightly_but, random_ids, refused

HALVES = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}
"""Bytes at which a block's float16 numbers begin; others begin with one."""


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """uint8 [.., bytes of a row] of any integers, with finite scales of either sign."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (int(np.prod(shape)) // elements, num_bytes), dtype=np.uint8)
    for start in HALVES.get(kind, (0,)):
        halves = (random.standard_normal(len(blocks)) * 0.003).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def blocks_of(kind: str, rows: np.ndarray) -> QuantizedFileTensor:
    """A tensor of a file."""
    known = gguf.GGMLQuantizationType[kind]
    elements, num_bytes = gguf.GGML_QUANT_SIZES[known]
    return QuantizedFileTensor(
        name="blk.0.ffn_up.weight",
        shape=(len(rows), rows.shape[1] // num_bytes * elements),
        dtype=kind,
        file="the file",
        array=lambda: rows,
        block=(elements, num_bytes),
        dequantize=lambda some: gguf.dequantize(some, known),
    )


@pytest.mark.parametrize("kind", [*TYPES, "Q4_1", "Q4_K", "Q2_K"])
def test_integers_stand_for_what_gguf_py_computes(kind: str) -> None:
    rows = random_blocks(kind, (6, 512))
    tensor, wanted = gguf_tensor(blocks_of(kind, rows)), gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(tensor.array(), wanted)
    assert np.array_equal(tensor.rows(np.array([4, 0, 4])), wanted[[4, 0, 4]])
    assert np.array_equal(tensor.columns(np.array([511, 3])), wanted[:, [511, 3]])
    assert (tensor.matrix is None) == (kind not in TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_integers_and_scales_are_those_of_the_blocks(kind: str) -> None:
    matrix = gguf_tensor(blocks_of(kind, random_blocks(kind, (6, 512)))).matrix
    assert matrix is not None
    found = matrix.read(None)
    low, high = {"Q8_0": (-128, 127), "Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q6_K": (-32, 31), "Q3_K": (-4, 3)}[kind]
    assert (found.integers.min(), found.integers.max()) == (low, high)
    assert found.scales.shape == (6, 512 // (16 if kind.endswith("K") else 32))


def quantised(made: Tiny, kind: str) -> Tiny:
    """Every matrix in blocks, but those that choose experts, and biases."""
    elements, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, values in made.tensors.items():
        if values.ndim > 1 and values.shape[-1] % elements == 0 and "gate_inp" not in name and "bias" not in name:
            made.kinds[name] = kind
            if kind in ("Q6_K", "Q3_K"):  # gguf-py does not write them
                made.tensors[name] = random_blocks(kind, values.shape)
    return made


def stored(made: Tiny, tmp_path: Path, target: str = "onnx", recipe: str = "stored") -> tuple[Any, Manifest]:
    """The model in floating point, and the manifest of ``bundle``."""
    origin = locate(str(write(tmp_path / "tiny.gguf", made)))
    model = load_gguf(origin, gguf_config(origin), torch.float32).eval()
    config = ExportConfig(**GEOMETRY | {"target": target}, recipe=load_recipe(recipe))
    return model, export_loaded(LoadedModel(model, None, "tiny", origin), tmp_path / "bundle", config)


@pytest.mark.parametrize(
    ("name", "kind"),
    nightly_but(
        [("llama", "Q8_0"), ("phi3", "Q4_0"), ("gpt-oss", "Q8_0")],
        [
            (n, k)
            for n in ("llama", "phi3", "gpt-oss", "qwen3moe", "falcon-40b", "gemma3")
            for k in ("Q8_0", "Q4_0", "Q5_0")
        ],
    ),
)
def test_blocks_lie_in_the_graph(name: str, kind: str, tmp_path: Path) -> None:
    """Heads in llama.cpp's order, fused projections, interleaved experts, tied tables."""
    made = FAMILIES[name][0]() if name in FAMILIES else tiny(name)
    model, manifest = stored(quantised(made, kind), tmp_path)
    bits = 4 if kind == "Q4_0" else 8
    assert f"GGUF {kind} kept in {bits} bits, blocks of 32" in manifest.producer[STORED]
    assert ("dequantised" in manifest.producer[STORED]) == (name in ("gpt-oss", "qwen3moe"))  # experts in blocks
    ids = random_ids(1, 10)
    take_floating_inputs(tmp_path / "bundle")
    limit = 1e-3 if name in ("gpt-oss", "qwen3moe") else EXACT
    assert error(logits(tmp_path / "bundle", ids), reference_logits(model, ids)) < limit


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_cpu_library_keeps_blocks_of_experts_too(kind: str, tmp_path: Path) -> None:
    model, manifest = stored(quantised(FAMILIES["qwen3moe"][0](), kind), tmp_path, "cpu")
    assert "dequantised" not in manifest.producer[STORED]
    ids = random_ids(1, 10)
    assert error(logits(tmp_path / "bundle", ids), reference_logits(model, ids)) < ROUNDED


def test_types_with_minima_are_dequantised(tmp_path: Path) -> None:
    """Nothing is kept: the bundle is one in floating point, and says so."""
    model, manifest = stored(quantised(tiny("llama"), "Q4_1"), tmp_path)
    assert manifest.quantization is None
    assert "GGUF Q4_1 dequantised" in manifest.producer[STORED]
    ids = random_ids(1, 10)
    assert error(logits(tmp_path / "bundle", ids), reference_logits(model, ids)) < EXACT


def test_without_the_recipe_blocks_are_floating_point(tmp_path: Path) -> None:
    """Other recipes may round them, too."""
    origin = locate(str(write(tmp_path / "tiny.gguf", quantised(tiny("llama"), "Q8_0"))))
    model = load_gguf(origin, gguf_config(origin), torch.float32).eval()
    loaded = LoadedModel(model, None, "tiny", origin)
    plain = export_loaded(loaded, tmp_path / "plain", ExportConfig(**GEOMETRY))
    assert plain.quantization is None
    assert STORED not in plain.producer
    config = ExportConfig(**GEOMETRY, recipe=load_recipe("int8-weights"))
    rounded = export_loaded(loaded, tmp_path / "rounded", config)
    assert rounded.quantization is not None
    assert rounded.quantization.recipe == "int8-weights"


def test_a_file_without_blocks_has_nothing_stored(tmp_path: Path) -> None:
    with refused("recipe 'stored'", "floating point"):
        stored(tiny("llama"), tmp_path)
