"""The check of an export's weights against the file: no false alarms, and what it must see.

The models here are spoiled after they were loaded, as a faulty loader would: the file stays as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sinkexport.cli import cli
from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.loading.file_tensor import FileTensor
from sinkexport.loading.graph_weights import read_graph
from sinkexport.loading.safetensors_reader import read_safetensors
from sinkexport.loading.weight_roles import rows_of_halves
from sinkexport.loading.weight_rounding import Rounding
from sinkexport.pipeline import export, export_loaded
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel, load_model
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model
from tests.real_model import smollm2_file

Spoil = Callable[[Any], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
        return made[name]

    return save


def config(**options: Any) -> ExportConfig:
    recipe = options.pop("recipe", None)
    loaded = None if recipe is None else load_recipe(recipe)
    return ExportConfig(**{"num_sink_tokens": 1, "window_size": 9, "chunk_size": 1, "recipe": loaded, **options})


def refusal(source: Path, spoil: Spoil, out: Path, **options: Any) -> str:
    """The line with which an export of a spoiled model is refused; unspoiled it is written."""
    loaded = load_model(str(source), WEIGHT_DTYPES[options.get("dtype", "fp32")])
    with torch.no_grad():
        spoil(loaded.model)
    with pytest.raises(UsageError) as refused:
        export_loaded(loaded, out, config(**options))
    assert not out.exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- no false alarms ---

KINDS = [
    ("llama", {"chunk_size": 4}), ("llama-tied", {"dtype": "fp16", "chunk_size": 4}), ("gemma2", {"chunk_size": 4}),
    ("mixtral", {"recipe": "int4-nearest"}), ("qwen3_next", {"recipe": "int8-dynamic", "chunk_size": 4}),
    ("gpt_oss", {"chunk_size": 4}), ("codegen", {"recipe": "int8-weights"}), ("bloom", {"recipe": "int8-channel"}),
    ("llama-mha", {"recipe": "int8-channel", "target": "tensorrt", "native": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_healthy_models_are_written(
    saved: Callable[[str], Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    export(str(saved(name)), tmp_path / "out", config(**options))


def test_a_model_in_memory_is_compared_with_itself(tmp_path: Path) -> None:
    export_loaded(LoadedModel(tiny_model("mistral"), None, "tiny"), tmp_path / "out", config())


@pytest.mark.slow
def test_the_real_model_is_written(tmp_path: Path) -> None:
    export(str(smollm2_file()), tmp_path / "out", config(window_size=60, recipe="int8-weights"))


# --- what it must see ---


def layer(model: Any, index: int) -> Any:
    return model.model.layers[index]


def _random_projection(model: Any) -> None:
    layer(model, 1).self_attn.q_proj.weight.normal_(0.0, 0.25)


def _random_norm(model: Any) -> None:
    model.model.norm.weight.fill_(1.0)


def _swapped_layers(model: Any) -> None:
    layers = model.model.layers
    for one, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def _swapped_gate(model: Any) -> None:
    mlp = layer(model, 0).mlp
    kept = mlp.gate_proj.weight.clone()
    mlp.gate_proj.weight.copy_(mlp.up_proj.weight)
    mlp.up_proj.weight.copy_(kept)


def _permuted_heads(model: Any) -> None:
    """As if a GGUF file's order of rows had been left."""
    weight = layer(model, 0).self_attn.k_proj.weight
    weight.copy_(weight[torch.from_numpy(np.argsort(rows_of_halves(2, len(weight))))])


def _two_rows_swapped(model: Any) -> None:
    weight = layer(model, 0).self_attn.v_proj.weight
    weight[[3, 17]] = weight[[17, 3]].clone()


def _scaled(model: Any) -> None:
    layer(model, 1).mlp.down_proj.weight.mul_(1.05)


def _other_head(model: Any) -> None:
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)


@pytest.mark.parametrize(("spoil", "told"), [
    (_random_projection, "model.layers.1.self_attn.q_proj.weight"), (_random_norm, "model.norm.weight"),
    (_swapped_layers, "model.layers.0."), (_swapped_gate, "model.layers.0.mlp.gate_proj.weight"),
    (_permuted_heads, "model.layers.0.self_attn.k_proj.weight"),
    (_two_rows_swapped, "model.layers.0.self_attn.v_proj.weight"),
    (_scaled, "model.layers.1.mlp.down_proj.weight"), (_other_head, "lm_head.weight"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"recipe": "int4-nearest"}], ids=str)
def test_a_spoiled_weight_is_named(
    saved: Callable[[str], Path], tmp_path: Path, spoil: Spoil, told: str, options: dict[str, Any]
) -> None:
    if spoil is _scaled and options:
        pytest.skip("5% are less than a step of 4 bits")
    assert told in refusal(saved("llama"), spoil, tmp_path / "out", **options)


def _expert_for_another(model: Any) -> None:
    experts = layer(model, 0).mlp.experts
    experts.gate_up_proj[3] = experts.gate_up_proj[2]


def _expert_random(model: Any) -> None:
    layer(model, 1).mlp.experts.down_proj[7].normal_()


def _experts_gate_after_up(model: Any) -> None:
    weight = layer(model, 0).mlp.experts.gate_up_proj
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


@pytest.mark.parametrize(("spoil", "told"), [(_expert_for_another, ".experts.3.w"), (_expert_random, ".experts.7.w2"),
                                             (_experts_gate_after_up, ".experts.0.w")])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"recipe": "int8-channel"}], ids=str)
def test_spoiled_experts_are_named(
    saved: Callable[[str], Path], tmp_path: Path, spoil: Spoil, told: str, options: dict[str, Any]
) -> None:
    assert told in refusal(saved("mixtral"), spoil, tmp_path / "out", **options)


def test_a_norm_that_is_folded_is_compared(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma stores scale - 1: the graph has a constant of another content without a name."""

    def spoil(model: Any) -> None:
        model.model.norm.weight.zero_()

    assert "model.norm.weight" in refusal(saved("gemma2"), spoil, tmp_path / "out")


def test_folded_norms_of_two_layers_are_not_mistaken(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        norms = [layer(model, i).input_layernorm.weight for i in (0, 2)]
        kept = norms[0].clone()
        norms[0].copy_(norms[1])
        norms[1].copy_(kept)

    assert "input_layernorm" in refusal(saved("gemma3_text"), spoil, tmp_path / "out")


def test_a_parameter_that_the_file_lacks_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """As if the loader had filled it with ones, and had not said so."""
    loaded = load_model(str(saved("llama")))
    import safetensors.numpy

    folder = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    del arrays["model.norm.weight"]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    assert loaded.origin is not None
    moved = LoadedModel(loaded.model, None, "tiny", type(loaded.origin)(str(folder), folder, {}, "tiny"))
    with pytest.raises(UsageError, match=r"1 constants of the graph that are not of the file: 'model.model.norm"):
        export_loaded(moved, tmp_path / "out", config())


def test_a_tensor_that_the_loader_dropped_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = load_model(str(saved("llama")))
    import safetensors.numpy

    folder = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.ones(96, np.float32)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    assert loaded.origin is not None
    moved = LoadedModel(loaded.model, None, "tiny", type(loaded.origin)(str(folder), folder, {}, "tiny"))
    with pytest.raises(UsageError, match=r"'model.layers.0.self_attn.q_proj.bias' .* nowhere in the graph"):
        export_loaded(moved, tmp_path / "out", config())


def test_the_check_can_be_left_out(saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = load_model(str(saved("llama")))
    with torch.no_grad():
        _random_projection(loaded.model)
    export_loaded(loaded, tmp_path / "out", config(), check=False)


def test_the_command_refuses_before_anything_is_written(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that hands out another model than the file's."""
    other = load_model(str(saved("llama")))
    with torch.no_grad():
        _swapped_gate(other.model)
    monkeypatch.setattr("sinkexport.pipeline.load_model", lambda *_: other)
    result = CliRunner().invoke(cli, ["export", str(saved("llama")), "-o", str(tmp_path / "out"), "--window", "9"])
    assert isinstance(result.exception, UsageError)
    assert "gate_proj" in str(result.exception)
    assert not list(tmp_path.iterdir())


# --- its parts ---


def test_own_reader_agrees_with_safetensors(saved: Callable[[str], Path], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("options", [{"recipe": "int4-nearest"}, {"recipe": "int8-weights"}, {"recipe": "int8-dynamic"},
                                     {"recipe": "int8-channel", "target": "tensorrt", "native": True}])  # fmt: skip
def test_matrices_of_a_graph_are_the_models(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every layout is read as what it stands for: compared with the whole of the model's own weights."""
    model = tiny_model("llama")
    export_loaded(LoadedModel(model, None, "tiny"), tmp_path / "out", config(**options), check=False)
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
