"""The check of an export's weights against the file: no false alarms, and what it must see.

Healthy models are exported with the check, and then compared with files that their graphs were not made of.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.loading.checkpoints.file_tensor import FileTensor
from sinkexport.loading.checkpoints.safetensors_reader import read_safetensors
from sinkexport.loading.gguf_models.file import open_gguf
from sinkexport.loading.weights.check_weights import check_weights, gguf_tensors
from sinkexport.loading.weights.graph_weights import read_graph
from sinkexport.loading.weights.weight_roles import rows_of_halves
from sinkexport.loading.weights.weight_rounding import Rounding
from sinkexport.pipeline.export import export, export_loaded
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel, Origin, load_model
from sinkrt.contract import load_manifest
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model
from tests.real_model import smollm2_file
from tests.support import export_model, refused

Arrays = dict[str, np.ndarray]
Spoil = Callable[[Arrays], None]
WEIGHTS = "model.safetensors"

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"chunk_size": 4}),
    "llama in 4 bits": ("llama", {"recipe": "int4-nearest"}),
    "tied, float16": ("llama-tied", {"dtype": "fp16", "chunk_size": 4}),
    "gemma": ("gemma3_text", {"chunk_size": 4}),
    "experts": ("mixtral", {}),
    "experts in 8 bits": ("mixtral", {"recipe": "int8-channel"}),
    "transposed experts": ("gpt_oss", {"chunk_size": 4}),
    "linear attention": ("qwen3_next", {"recipe": "int8-dynamic"}),
    "biases": ("codegen", {"recipe": "int8-weights"}),
    "native": ("llama-mha", {"recipe": "int8-channel", "target": "tensorrt", "native": True}),
}


class Exported:
    """A bundle of a folder, and the means to compare it with another file."""

    def __init__(self, folder: Path, name: str, options: dict[str, Any]) -> None:
        tiny_model(name).save_pretrained(folder / "model")
        recipe = options.get("recipe")
        self.config = ExportConfig(
            **{
                "num_sink_tokens": 1,
                "window_size": 9,
                "chunk_size": 1,
                **options,
                "recipe": None if recipe is None else load_recipe(recipe),
            }
        )
        self.loaded = load_model(str(folder / "model"), WEIGHT_DTYPES[self.config.dtype])
        self.bundle = folder / "bundle"
        export_loaded(self.loaded, self.bundle, self.config)  # with the check: no false alarm
        self.source = folder / "model"

    def refusal(self, spoil: Spoil, folder: Path) -> str:
        """The line with which the bundle is refused if a file like this was its source."""
        shutil.copytree(self.source, folder)
        arrays = safetensors.numpy.load_file(folder / WEIGHTS)
        spoil(arrays)
        safetensors.numpy.save_file(arrays, folder / WEIGHTS, {"format": "pt"})
        return self.refusal_of(Origin(str(folder), folder, {}, "tiny"))

    def compare(self, origin: Origin) -> None:
        files = [graph.file for graph in load_manifest(self.bundle).graphs.values()]
        loaded = LoadedModel(self.loaded.model, None, "tiny", origin)
        check_weights(self.bundle, files, loaded, self.config, num_q_heads=6, num_kv_heads=2)

    def refusal_of(self, origin: Origin) -> str:
        with pytest.raises(UsageError) as refused:
            self.compare(origin)
        assert "\n" not in str(refused.value)
        return str(refused.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def export(kind: str) -> Exported:
        if kind not in made:
            made[kind] = Exported(tmp_path_factory.mktemp("exported"), *KINDS[kind])
        return made[kind]

    return export


@pytest.mark.parametrize("kind", KINDS)
def test_healthy_models_are_written(exported: Callable[[str], Exported], kind: str) -> None:
    exported(kind)


@pytest.mark.slow
def test_the_real_model_is_written(tmp_path: Path) -> None:
    recipe = load_recipe("int8-weights")
    export(str(smollm2_file()), tmp_path / "out", ExportConfig(window_size=60, chunk_size=1, recipe=recipe))


# --- what it must see: the file is not that which the graph was made of, as with a faulty loader ---


def _swap(arrays: Arrays, one: str, other: str) -> None:
    arrays[one], arrays[other] = arrays[other], arrays[one]


def _random_projection(arrays: Arrays) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    arrays[name] = np.random.default_rng(0).normal(0.0, 0.25, arrays[name].shape).astype(np.float32)


def _ones_as_norm(arrays: Arrays) -> None:
    arrays["model.norm.weight"] = np.ones(48, np.float32)


def _swapped_layers(arrays: Arrays) -> None:
    for name in [name for name in arrays if ".layers.0." in name]:
        _swap(arrays, name, name.replace(".0.", ".1."))


def _swapped_gate(arrays: Arrays) -> None:
    _swap(arrays, "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")


def _permuted_heads(arrays: Arrays) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    arrays[name] = arrays[name][rows_of_halves(2, len(arrays[name]))]


def _two_rows_swapped(arrays: Arrays) -> None:
    array = arrays["model.layers.0.self_attn.v_proj.weight"]
    array[[3, 17]] = array[[17, 3]]


def _scaled(arrays: Arrays) -> None:
    arrays["model.layers.1.mlp.down_proj.weight"] *= 1.5


def _other_head(arrays: Arrays) -> None:
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()


def _dropped_bias(arrays: Arrays) -> None:
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.ones(96, np.float32)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_random_projection, "model.layers.1.self_attn.q_proj.weight"),
        (_ones_as_norm, "model.norm.weight"),
        (_swapped_layers, "model.layers.0."),
        (_swapped_gate, "model.layers.0.mlp.gate_proj.weight"),
        (_permuted_heads, "model.layers.0.self_attn.k_proj.weight"),
        (_two_rows_swapped, "model.layers.0.self_attn.v_proj.weight"),
        (_scaled, "model.layers.1.mlp.down_proj.weight"),
        (_other_head, "lm_head.weight"),
        (_dropped_bias, "model.layers.0.self_attn.q_proj.bias"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "llama in 4 bits"])
def test_another_files_weight_is_named(
    exported: Callable[[str], Exported], tmp_path: Path, spoil: Spoil, named: str, kind: str
) -> None:
    assert f"'{named}" in exported(kind).refusal(spoil, tmp_path / "model").replace("weights ", "")


def test_old_buffers_are_accounted_for(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    def add(arrays: Arrays) -> None:
        arrays["model.layers.0.self_attn.bias"] = np.tri(32, dtype=np.uint8)[None, None]
        arrays["model.layers.0.self_attn.masked_bias"] = np.array(-1e9, np.float32)
        arrays["unknown"] = np.zeros(3, np.float32)

    message = exported("llama").refusal(add, tmp_path / "model")
    assert "'unknown'" in message
    assert "others" not in message


def test_a_parameter_that_the_file_lacks_is_named(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """The loader might have filled it with ones, and had not said so."""
    message = exported("llama").refusal(lambda arrays: arrays.pop("model.norm.weight"), tmp_path / "model")
    assert "1 constants of the graph that are not of the file: 'model.model.norm.weight'" in message


def test_a_missing_tied_weight_is_named(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    message = exported("tied, float16").refusal(lambda arrays: arrays.pop("model.embed_tokens.weight"), tmp_path / "m")
    assert "not of the file" in message


EXPERT = "model.layers.{}.mlp.experts.{}.{}.weight"
MIXTRAL = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


def _expert_name(arrays: Arrays, layer: int, expert: int, part: str) -> str:
    names = [form.format(layer, expert, part) for form in (EXPERT, MIXTRAL)]
    return next(name for name in names if name in arrays)


def _expert_for_another(arrays: Arrays) -> None:
    _swap(arrays, _expert_name(arrays, 0, 3, "w1"), _expert_name(arrays, 0, 2, "w1"))


def _expert_random(arrays: Arrays) -> None:
    array = arrays[_expert_name(arrays, 1, 7, "w2")]
    array[:] = np.random.default_rng(0).normal(size=array.shape)


def _gate_for_up(arrays: Arrays) -> None:
    for expert in range(8):
        _swap(arrays, _expert_name(arrays, 0, expert, "w1"), _expert_name(arrays, 0, expert, "w3"))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(_expert_for_another, ".experts.2.w1"), (_expert_random, ".experts.7.w2"), (_gate_for_up, ".experts.0.w1")],
)
@pytest.mark.parametrize("kind", ["experts", "experts in 8 bits"])
def test_another_files_expert_is_named(
    exported: Callable[[str], Exported], tmp_path: Path, spoil: Spoil, named: str, kind: str
) -> None:
    assert named in exported(kind).refusal(spoil, tmp_path / "model")


def test_a_norm_that_is_folded_is_compared(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """Gemma stores scale - 1: the graph has a constant of another content, without a name."""

    def spoil(arrays: Arrays) -> None:
        arrays["model.norm.weight"] += 0.1

    assert "model.norm.weight" in exported("gemma").refusal(spoil, tmp_path / "model")


def test_folded_norms_of_two_layers_are_not_mistaken(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    def spoil(arrays: Arrays) -> None:
        _swap(arrays, "model.layers.0.input_layernorm.weight", "model.layers.2.input_layernorm.weight")

    assert "input_layernorm" in exported("gemma").refusal(spoil, tmp_path / "model")


def test_an_export_refuses_and_leaves_nothing_unless_asked_not_to_check(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    """A model in memory that is another than its file's, as a loader with a bug would hand it out."""
    source = str(exported("llama").source)
    other, config = load_model(source), ExportConfig(window_size=9, chunk_size=1)
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.neg_()
    with refused("up_proj", error=UsageError):
        export_loaded(other, tmp_path / "out", config)
    assert not list(tmp_path.iterdir())
    export_loaded(other, tmp_path / "out", config, check=False)


def test_torch_files_are_read_as_well(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    tensors = {
        name: torch.from_numpy(array)
        for name, array in safetensors.numpy.load_file(exported("llama").source / WEIGHTS).items()
    }
    origin = Origin(str(tmp_path), tmp_path, {}, "tiny")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    exported("llama").compare(origin)
    tensors["model.layers.0.self_attn.o_proj.weight"][5] = 0.0
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert "model.layers.0.self_attn.o_proj.weight" in exported("llama").refusal_of(origin)


# --- GGUF files: other names, another order of rows ---


def write_gguf(path: Path, arrays: Arrays, *, permuted: bool = True) -> Origin:
    """A tiny Llama as llama.cpp's converter lays it out."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    for name, array in arrays.items():
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
        if heads and permuted:
            halves = array.reshape(heads, 2, -1, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Origin(str(path), path, {"gguf_file": path.name}, "tiny")


def test_a_gguf_files_tensors_are_found(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    arrays = safetensors.numpy.load_file(exported("llama").source / WEIGHTS)
    for kind in ("llama", "llama in 4 bits"):
        exported(kind).compare(write_gguf(tmp_path / f"{kind}.gguf", arrays))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_swapped_gate, "blk.0.ffn_"),
        (_swapped_layers, "blk.0."),
        (_random_projection, "blk.1.attn_q.weight"),
        (_ones_as_norm, "output_norm.weight"),
    ],
)
def test_another_gguf_files_tensors_are_named(
    exported: Callable[[str], Exported], tmp_path: Path, spoil: Spoil, named: str
) -> None:
    arrays = safetensors.numpy.load_file(exported("llama").source / WEIGHTS)
    spoil(arrays)
    assert named in exported("llama").refusal_of(write_gguf(tmp_path / "a.gguf", arrays))


def test_a_permutation_that_was_not_undone_is_seen(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """The loader took the rows as they lie: the file's queries, permuted, are the graph's."""
    arrays = safetensors.numpy.load_file(exported("llama").source / WEIGHTS)
    message = exported("llama").refusal_of(write_gguf(tmp_path / "a.gguf", arrays, permuted=False))
    assert "attn_" in message


# --- its parts ---


def test_own_reader_agrees_with_safetensors(tmp_path: Path) -> None:
    import safetensors.torch

    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
    tensors = {str(kind): (torch.randn(3, 5) * 3).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "all.safetensors")
    found = read_safetensors(tmp_path / "all.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].shape == tuple(value.shape)
        assert np.array_equal(np.asarray(found[name].array(), np.float64), value.double().numpy()), name


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "int4-nearest"},
        {"recipe": "int8-weights"},
        {"recipe": "int8-dynamic"},
        {"recipe": "int8-channel", "target": "tensorrt", "native": True},
    ],
)
def test_matrices_of_a_graph_are_the_models(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every layout is read as what it stands for: compared with the whole of the model's own weights."""
    model = tiny_model("llama")
    settings = {**options, "recipe": load_recipe(options["recipe"]), "window_size": 9, "chunk_size": 1}
    export_model(model, tmp_path / "out", **settings, check=False)
    seen = set()
    for matrix in read_graph(tmp_path / "out" / "decode.onnx"):
        if not matrix.parts or matrix.shape[1] == 1:
            continue
        seen.update(matrix.parts)
        whole = np.concatenate([model.get_parameter(part).detach().numpy() for part in matrix.parts])
        values, steps = matrix.read(np.arange(matrix.shape[0]), np.arange(whole.shape[1]))
        assert values.shape == whole.shape
        assert (np.abs(values - whole) <= 0.51 * steps + 0.6 * steps * ("int4" in options["recipe"]) + 1e-6).all()
    assert seen == {name for name, p in model.named_parameters() if p.dim() == 2}


def test_rows_of_halves_is_llama_cpps_permutation_undone() -> None:
    """Source: llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    num_heads, head_dim = 3, 8
    weight = np.arange(num_heads * head_dim)[:, None]
    permuted = weight.reshape(num_heads, 2, head_dim // 2, 1).swapaxes(1, 2).reshape(weight.shape)
    assert np.array_equal(permuted[rows_of_halves(num_heads, len(weight))], weight)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K", "BF16"])
def test_quantised_tensors_are_read_in_part(kind: str, tmp_path: Path) -> None:
    """Rows, and columns of the first block, are those of the whole."""
    values = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    if kind == "Q6_K":  # gguf-py reads it and does not write it
        raw = np.random.default_rng(0).integers(0, 200, (6, 2 * 210), dtype=np.uint8)
        raw[:, [208, 209, 418, 419]] = 0x1C  # scales that are finite
    else:
        raw = gguf.quantize(values, number)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf_tensors(open_gguf(tmp_path / "a.gguf"))["blk.0.ffn_up.weight"]
    whole = gguf.dequantize(raw, number)
    assert tensor.matrix_shape == (6, 512)
    assert np.array_equal(tensor.rows(np.array([1, 4])), whole[[1, 4]])
    columns = tensor.sampled_columns()
    assert np.array_equal(tensor.columns(columns), whole[:, columns])


def test_numbers_fit_within_their_rounding_and_no_further() -> None:
    file = np.array([[1.0, -2.0, 0.0]], np.float32)
    none = np.zeros_like(file)
    assert Rounding().fits(file, file, none)
    assert not Rounding().fits(file, file * 1.0001, none)
    assert not Rounding().fits(file, file + 1e-6 * np.array([[0, 0, 1]], np.float32), none)
    assert not Rounding().fits(file, np.full_like(file, np.nan), none)
    assert Rounding(half=True).fits(file * 1.2345678, (file * 1.2345678).astype(np.float16).astype(np.float32), none)
    assert Rounding().fits(file, file + 0.05, none + 0.1)
    assert not Rounding().fits(file, file + 0.2, none + 0.1)
    assert not Rounding(nearest=False).fits(file, file[:, [1, 0, 2]], none + 0.1)


def test_a_tensor_is_read_by_rows_and_columns() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = FileTensor("x", array.shape, "F32", "file", lambda: array)
    assert tensor.matrix_shape == (6, 4)
    assert np.array_equal(tensor.rows(np.array([5])), [[20, 21, 22, 23]])
    assert np.array_equal(tensor.columns(np.array([0]))[:, 0], [0, 4, 8, 12, 16, 20])
    swapped = tensor.reordered(np.arange(6)[::-1])
    assert np.array_equal(swapped.rows(np.array([0])), [[20, 21, 22, 23]])
    assert np.array_equal(swapped.columns(np.array([1]))[:, 0], [21, 17, 13, 9, 5, 1])
