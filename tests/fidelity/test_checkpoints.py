"""Damaged model folders are refused in one line that names what is wrong; healthy ones load.

The files are damaged by this module's own code (`damage`), which knows the formats and nothing of the loader.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from sinkexport.loading.checkpoints.safetensors_reader import read_safetensors
from sinkexport.sources import load_model

from tests.exporter.tiny_models import TINY, tiny_model
from tests.support import run_cli

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models, each saved once."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
        return made[name]

    return save


@pytest.fixture
def folder(healthy: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama's folder, to be damaged."""
    return Path(shutil.copytree(healthy("llama"), tmp_path / "model"))


def change(folder: Path, edit: Callable[[Arrays], None], file: str = WEIGHTS) -> None:
    arrays = safetensors.numpy.load_file(folder / file)
    edit(arrays)
    safetensors.numpy.save_file(arrays, folder / file, {"format": "pt"})


def set_config(folder: Path, file: str = "config.json", **values: Any) -> None:
    facts = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**facts, **values}))


def refusal(folder: Path | str) -> str:
    """The one line with which an export is refused; nothing is left behind."""
    out = Path(folder).parent / "bundle"
    result = run_cli("export", folder, "-o", out, "--window", "9")
    message = result.refusal()
    assert len(message) < 700
    assert not out.exists()
    assert not list(out.parent.glob(".bundle*"))
    return message


@pytest.mark.parametrize("name", TINY)
def test_every_healthy_family_loads(healthy: Callable[[str], Path], name: str) -> None:
    loaded = load_model(str(healthy(name))).model
    for key, value in tiny_model(name).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    "tensor",
    ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"],
)
def test_a_missing_tensor_is_named(folder: Path, tensor: str) -> None:
    change(folder, lambda arrays: arrays.pop(tensor))
    assert f"1 missing: '{tensor}'" in refusal(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    change(folder, lambda arrays: [arrays.pop(name) for name in list(arrays) if "mlp" in name])
    message = refusal(folder)
    assert "6 missing: 'model.layers.0.mlp.down_proj.weight'" in message
    assert "and 3 more" in message


def test_an_unexpected_bias_is_named(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change(folder, lambda arrays: arrays.update({name: np.ones(96, np.float32)}))
    assert f"1 unexpected: '{name}'" in refusal(folder)


def test_layers_that_the_configuration_leaves_out_are_named(folder: Path) -> None:
    set_config(folder, num_hidden_layers=1)
    message = refusal(folder)
    assert "9 unexpected: 'model.layers.1." in message
    assert "config.json" in message


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda arrays: arrays.update({name: arrays[name][:-1].copy()}))
    assert f"{name} [63, 48] for [64, 48]" in refusal(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_with_a_prefix_are_refused(folder: Path, prefix: str) -> None:
    def rename(arrays: Arrays) -> None:
        for name in list(arrays):
            arrays[f"{prefix}{name}"] = arrays.pop(name)

    change(folder, rename)
    message = refusal(folder)
    assert "'lm_head.weight'" in message
    assert f"'{prefix[:-1]}'" in message


def test_a_base_models_names_load_if_the_head_is_tied(healthy: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers' own custom: names without 'model.', as the base model saves them."""
    folder = Path(shutil.copytree(healthy("llama-tied"), tmp_path / "model"))
    change(
        folder, lambda arrays: [arrays.update({name.removeprefix("model."): arrays.pop(name)}) for name in list(arrays)]
    )
    loaded = load_model(str(folder)).model
    assert torch.equal(loaded.lm_head.weight, tiny_model("llama-tied").lm_head.weight)


def test_lora_layers_say_how_to_merge(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def wrap(arrays: Arrays) -> None:
        arrays[name.replace(".weight", ".base_layer.weight")] = arrays.pop(name)
        arrays[name.replace(".weight", ".lora_A.default.weight")] = np.ones((2, 48), np.float32)

    change(folder, wrap)
    message = refusal(folder)
    assert f"1 missing: '{name}'" in message
    assert "merge_and_unload" in message


def test_an_adapter_beside_the_model_says_how_to_merge(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refusal(folder)
    (folder / "config.json").unlink()
    assert "merge_and_unload" in refusal(folder)


@pytest.mark.parametrize("with_scales", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_without_a_configuration(folder: Path, dtype: torch.dtype, with_scales: bool) -> None:
    import safetensors.torch

    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors[name] = (tensors[name] * 100).to(dtype)
    if with_scales:
        tensors[f"{name}_scale"] = torch.tensor([0.01])
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    message = refusal(folder)
    assert name in message
    assert "quantization_config" in message


def test_scales_alone_are_unexpected(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    change(folder, lambda arrays: arrays.update({name: np.ones((1, 1), np.float32)}))
    message = refusal(folder)
    assert name in message
    assert "original floating-point model" in message


def test_a_missing_expert_is_named(healthy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("mixtral"), tmp_path / "model"))
    name = next(name for name in read_safetensors(folder / WEIGHTS) if ".experts.3." in name)
    change(folder, lambda arrays: arrays.pop(name))
    assert f"1 missing: '{name}'" in refusal(folder)


def test_the_last_expert_missing_is_refused(healthy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("mixtral"), tmp_path / "model"))
    last = [name for name in read_safetensors(folder / WEIGHTS) if ".layers.0." in name and ".experts.7." in name]
    change(folder, lambda arrays: [arrays.pop(name) for name in last])
    assert "layers.0" in refusal(folder)


# --- split models ---


def split(folder: Path, shards: int = 2) -> dict[str, str]:
    """Save the folder's model as `shards` files with an index. Returns: the file of each tensor."""
    arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(arrays)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    placed = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        part = {name: arrays[name] for name in names if placed[name] == file}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def test_a_split_model_loads(folder: Path) -> None:
    split(folder)
    assert torch.equal(load_model(str(folder)).model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_a_single_file_beside_an_index_is_refused(folder: Path) -> None:
    stale = (folder / WEIGHTS).read_bytes()
    split(folder)
    (folder / WEIGHTS).write_bytes(stale)
    message = refusal(folder)
    assert f"'{WEIGHTS}' and '{INDEX}'" in message


def test_an_index_of_the_single_file_is_healthy(folder: Path) -> None:
    names = list(read_safetensors(folder / WEIGHTS))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    load_model(str(folder))


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
def test_an_index_without_metadata_is_named(folder: Path, metadata: Arrays) -> None:
    """transformers ends on a KeyError or a TypeError."""
    placed = split(folder)
    (folder / INDEX).write_text(json.dumps({**metadata, "weight_map": placed}))
    assert f"'{INDEX}': received no table 'metadata'" in refusal(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 4, "do_sample": False},
        {"compile_config": {}},
        {"cache_implementation": "of old"},
        {"early_stopping": "perhaps"},
        {"max_new_tokens": -5},
    ],
)
def test_settings_for_sampling_are_no_obstacle(folder: Path, settings: Arrays) -> None:
    """transformers ends on them; an export reads the ids alone."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5], **settings}))
    assert load_model(str(folder)).model.generation_config.eos_token_id == [3, 5]


def test_a_tied_head_that_differs_is_used_and_said(
    healthy: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(healthy("llama-tied"), tmp_path / "model"))
    table = safetensors.numpy.load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    for number in (0.0, 1.0):
        change(folder, lambda arrays, number=number: arrays.update({"lm_head.weight": table + np.float32(number)}))
        caplog.clear()
        model = load_model(str(folder)).model
        assert np.array_equal(model.lm_head.weight.detach().numpy(), table + np.float32(number))
        assert ("tie_word_embeddings" in caplog.text) == bool(number)


def test_a_missing_shard_is_named(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "'model-00002-of-00002.safetensors'" in refusal(folder)


def test_a_shard_of_another_save_is_named(folder: Path) -> None:
    split(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00001-of-00003.safetensors")
    assert "'model-00001-of-00003.safetensors'" in refusal(folder)


def test_shards_without_an_index_are_refused(folder: Path) -> None:
    split(folder)
    (folder / INDEX).unlink()
    assert "2 shards without" in refusal(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path) -> None:
    placed = split(folder)
    change(folder, lambda arrays: arrays.pop("model.norm.weight"), placed["model.norm.weight"])
    message = refusal(folder)
    assert "'model.norm.weight'" in message
    assert placed["model.norm.weight"] in message


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    placed = split(folder)
    other = next(file for file in placed.values() if file != placed["model.norm.weight"])
    change(folder, lambda arrays: arrays.update({"model.norm.weight": np.ones(48, np.float32)}), other)
    assert "'model.norm.weight' in" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        "{}",
        '{"weight_map": {"a": "../model.safetensors"}}',
    ],
)
def test_a_broken_index_is_named(folder: Path, content: str) -> None:
    split(folder)
    (folder / INDEX).write_text(content)
    assert INDEX in refusal(folder)


# --- files that are no safetensors files ---


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: bytes, rest: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + rest)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 4)


def _only_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _few_bytes(path: Path) -> None:
    path.write_bytes(b"\x01\x02\x03")


def _overlap(path: Path) -> None:
    header, rest = header_of(path)
    names = [name for name in header if name != "__metadata__"]
    header[names[1]] = header[names[0]]
    write_header(path, json.dumps(header).encode(), rest)


def _twice(path: Path) -> None:
    header, rest = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    write_header(path, (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), rest)


def _no_shape(path: Path) -> None:
    header, rest = header_of(path)
    del header[next(name for name in header if name != "__metadata__")]["shape"]
    write_header(path, json.dumps(header).encode(), rest)


def _odd_type(path: Path) -> None:
    header, rest = header_of(path)
    header[next(name for name in header if name != "__metadata__")]["dtype"] = "Q4"
    write_header(path, json.dumps(header).encode(), rest)


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _longer,
        _only_header,
        _few_bytes,
        _overlap,
        _twice,
        _no_shape,
        _odd_type,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(POINTER),
        lambda path: path.write_bytes(b"<html>not found</html>" * 50),
        lambda path: write_header(path, b"{]", b""),
        lambda path: write_header(path, b"[1]", b""),
    ],
)
def test_a_damaged_weight_file_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / WEIGHTS)
    assert WEIGHTS in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [POINTER, b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"model": 3}'])
def test_a_damaged_text_file_is_one_line(folder: Path, file: str, content: bytes) -> None:
    if content.startswith(b'{"model') and file != "tokenizer.json":
        content = b'{"eos_token_id": "two", "model_type": 3}'
    (folder / file).write_bytes(content)
    message = refusal(folder)
    assert file in message or message.startswith("tokenizer: " if file == "tokenizer.json" else "model: ")


@pytest.mark.parametrize("value", ["2", 1.5, True, [2, "3"], {}])
def test_ends_that_are_no_ids_are_named(folder: Path, value: Any) -> None:
    set_config(folder, "generation_config.json", eos_token_id=value)
    message = refusal(folder)
    assert "generation_config.json" in message
    assert "eos_token_id" in message


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "48"},
        {"hidden_act": "nope"},
        {"head_dim": 0},
        {"rope_scaling": 5},
        {"dtype": "float99"},
        {"vocab_size": -1},
        {"model_type": None},
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_line(folder: Path, values: dict[str, Any]) -> None:
    set_config(folder, **values)
    assert "the network" not in refusal(folder)


def test_what_a_configuration_lacks_is_said(folder: Path) -> None:
    set_config(folder, layer_types=["full_attention"])
    message = refusal(folder)
    assert "(`num_hidden_layers` (2) must be equal to the number of `layer_types` (1))" in message
    assert "check what its config.json says" in message


def test_a_hub_id_that_is_not_there_is_one_line() -> None:
    run_cli("export", "nobody/nothing-of-that-name", "-o", "unused").refusal()


# --- .bin files ---


def to_torch(folder: Path) -> Path:
    import safetensors.torch

    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder / "pytorch_model.bin"


def test_torch_files_load_and_lack_nothing(folder: Path) -> None:
    path = to_torch(folder)
    assert torch.equal(load_model(str(folder)).model.lm_head.weight, tiny_model("llama").lm_head.weight)
    tensors = torch.load(path)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    torch.save(tensors, path)
    assert "1 missing: 'model.layers.0.self_attn.q_proj.weight'" in refusal(folder)


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _few_bytes,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(POINTER),
        lambda p: torch.save([1, 2], p),
        lambda p: torch.save({"epoch": 3}, p),
    ],
)
def test_a_damaged_torch_file_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    path = to_torch(folder)
    damage(path)
    assert path.name in refusal(folder)


def test_a_torch_file_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"lm_head.weight": Runs()}, to_torch(folder))
    assert "pytorch_model.bin" in refusal(folder)
    assert not (tmp_path / "ran").exists()


# --- what may be left out, or there ---


def test_old_buffers_do_no_harm(folder: Path) -> None:
    """Checkpoints of earlier years hold frequencies, masks and positions."""
    frequencies = (1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)).astype(np.float32)

    def add(arrays: Arrays) -> None:
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
        arrays["model.layers.0.self_attn.bias"] = np.tri(32, dtype=np.uint8)[None, None]
        arrays["model.layers.0.self_attn.masked_bias"] = np.array(-1e9, np.float32)
        arrays["model.position_ids"] = np.arange(512)[None]

    change(folder, add)
    load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            (0.25 / 10000.0 ** (np.arange(0, 16, 2) / 16)).astype(np.float32),
        ),  # of another configuration
        ("model.layers.0.self_attn.bias", np.ones(96, np.float32)),
        ("model.layers.0.self_attn.masked_bias", np.ones(1, np.float32)),
        ("model.mtp.weight", np.ones(3, np.float32)),
    ],
)
def test_what_only_looks_like_an_old_buffer_is_refused(folder: Path, name: str, array: np.ndarray) -> None:
    change(folder, lambda arrays: arrays.update({name: array}))
    assert name in refusal(folder)


def test_layers_for_drafts_are_left_out_where_the_family_says_so(
    healthy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(healthy("qwen3_next"), tmp_path / "model"))
    change(folder, lambda arrays: arrays.update({"mtp.fc.weight": np.ones((3, 3), np.float32)}))
    load_model(str(folder))


def test_tied_weights_that_are_saved_twice_are_healthy(healthy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("llama-tied"), tmp_path / "model"))
    change(folder, lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}))
    load_model(str(folder))


SETTINGS: list[dict[str, Any]] = [
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": "flash_attention_3"},
    {"pad_token_id": 4000},
    {"pad_token_id": -1},
    {"return_dict": False},
    {"use_cache": False},
    {"torchscript": True},
    {"output_attentions": True, "attn_implementation": "eager"},
    {"output_hidden_states": True},
    {"experts_implementation": "grouped_mm"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_of_the_author_change_nothing(folder: Path, settings: dict[str, Any]) -> None:
    set_config(folder, **settings)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        result = load_model(str(folder)).model(ids)
        assert torch.equal(result.logits, tiny_model("llama")(ids).logits)


# --- code of a folder ---

CODE = """
from pathlib import Path
Path(r"{marker}").touch()
from transformers import {base}Config as Base, {base}ForCausalLM as BaseModel
class CustomConfig(Base):
    model_type = "{family}"
class CustomModel(BaseModel):
    config_class = CustomConfig
"""
AUTO_MAP = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}


def add_code(folder: Path, marker: Path, family: str) -> None:
    (folder / "custom.py").write_text(CODE.format(marker=marker, base="Llama", family=family))
    set_config(folder, auto_map=AUTO_MAP, model_type=family, architectures=["CustomModel"])


def test_code_of_a_folder_is_not_run_and_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_code(folder, tmp_path / "ran", "llama")
    result = run_cli("export", folder, "-o", tmp_path / "out", "--window", "9", stdin="y\n")
    result.succeeded()
    assert "custom.CustomModel" in caplog.text
    assert "transformers' LlamaForCausalLM" in caplog.text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "words", ["export {model} -o {out}", "verify {out} --against {model}", "inspect --memory {model}"]
)
def test_a_model_that_needs_its_code_is_refused(folder: Path, tmp_path: Path, words: str) -> None:
    out = tmp_path / "out"
    if words.startswith("verify"):
        assert run_cli("export", folder, "-o", out, "--window", "9").code == 0
    add_code(folder, tmp_path / "ran", "custom")
    (tmp_path / "stdin").write_text("y\ny\n")
    with (tmp_path / "stdin").open() as lines:
        result = run_cli(*(word.format(model=folder, out=out) for word in words.split()), stdin=lines)
        assert lines.read() == "y\ny\n"
    result.refusal("is not run", "CustomModel")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "custom.py").write_text(CODE.format(marker=tmp_path / "ran", base="Llama", family="llama"))
    facts = {"tokenizer_class": "CustomTokenizer", "auto_map": {"AutoTokenizer": ["custom.CustomTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    run_cli("export", folder, "-o", tmp_path / "out", "--window", "9", stdin="y\n")
    assert not (tmp_path / "ran").exists()
