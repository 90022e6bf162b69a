"""`sinkexport inspect MODEL` shows what an export would read and refuse, and `--tokenizer-out` writes the tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
from sinkexport.config import ExportConfig
from sinkexport.pipeline.export import export
from transformers import Gemma4TextConfig, RwkvConfig

from tests.exporter.tiny_models import TINY, tiny_model
from tests.fidelity.gguf_writer import tiny, write
from tests.fidelity.test_turn_ends import CHATML, PHI3, TOKENS
from tests.fidelity.tokenizer_folders import byte_level, spaced, write_folder
from tests.support import run_cli, run_cli_apart

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}


def folder_of(name: str, folder: Path, config: Any = None, **changes: Any) -> Path:
    write_folder(folder, byte_level(special=TOKENS), CONFIG if config is None else config)
    tiny_model(name, vocab_size=400, **changes).save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensor(folder: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """Put zeros in the place of a tensor, or take it away."""
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays.pop(name, None)
    if shape is not None:
        arrays[name] = np.zeros(shape, np.float32)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def inspected(*arguments: str) -> str:
    result = run_cli("inspect", *arguments)
    result.succeeded()
    return result.out


def as_json(folder: Path) -> Any:
    return json.loads(inspected(str(folder), "--json"))


@pytest.mark.parametrize(
    ("name", "heads"), [("rwkv", "no attention"), ("mamba2", "no attention"), ("lfm2", "6 query heads")]
)
def test_recurrent_layers_are_called_so(name: str, heads: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    out = inspected(str(tmp_path / "model"))
    assert f" x {heads}" in out
    assert "layers: recurrent" in out or name == "lfm2"
    assert "full attention" not in out or name == "lfm2"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("kimi_linear", "2: 1 x 6 query heads over latent rows of 24 (16 of them values)"),
        ("deepseek_v3", "2 x 6 query heads over latent rows of 24 (16 of them values)"),
        ("gemma4_text", "the last 2: they read an earlier layer's"),
        ("lfm2", "2: 1 x 6 query heads, 2 key heads of 8"),
    ],
)
def test_layers_of_other_kinds_are_described(name: str, layers: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    assert layers in inspected(str(tmp_path / "model"))


def test_a_folder(tmp_path: Path) -> None:
    folder = folder_of("llama-yarn", tmp_path / "model")
    before = sorted(path.name for path in folder.iterdir())
    found = as_json(folder)
    assert found["model"] == {
        "family": "llama",
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "num_q_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "hidden_size": 48,
        "vocab_size": 400,
        "max_positions": 512,
    }
    net = tiny_model("llama-yarn", vocab_size=400)
    count, size = len(net.state_dict()), sum(p.nbytes for p in net.state_dict().values())
    assert found["tensors"] == {"count": count, "bytes": size, "types": {"F32": {"count": count, "bytes": size}}}
    (rope,) = found["positions"]["rope"]
    assert (rope["type"], rope["theta"], rope["rotary_share"], rope["scaling"]["factor"]) == ("yarn", 10000.0, 1.0, 4.0)
    assert found["windows"] == [{"kind": "full_attention", "window": None, "layers": 2}]
    assert found["tokenizer"]["special_tokens"] == {
        "bos_token": {"text": "<s>", "id": 0},
        "eos_token": {"text": "</s>", "id": 1},
    }
    assert (found["tokenizer"]["type"], found["tokenizer"]["pre_tokenizer"]) == ("BPE", ["ByteLevel"])
    template = {"wants": "text", "no_system_message": None, "keeps_history": True, "arguments": []}
    assert found["tokenizer"]["chat_template"] == {"characters": len(CHATML), **template}
    assert found["ends"] == [
        {"id": 1, "text": "</s>"},
        {"id": 2, "text": "<|im_start|>"},
        {"id": 3, "text": "<|im_end|>"},
    ]
    assert found["refused"] == []
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing is written
    shown = inspected(str(folder))
    for words in (
        "rope, yarn, theta 10000.0",
        "22 F32" if count == 22 else f"{count} F32",
        "<|im_end|>",
        "nothing that was read",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("name", "share", "windows"),
    [
        ("gpt_neox", 0.25, [("full_attention", None, 2)]),
        ("mistral", 1.0, [("sliding_attention", 64, 2)]),
        ("gemma3_text", 1.0, [("sliding_attention", 5, 2), ("full_attention", None, 1)]),
        ("bloom", None, [("full_attention", None, 2)]),
    ],
)
def test_positions_and_windows(
    name: str, share: float | None, windows: list[tuple[str, int | None, int]], tmp_path: Path
) -> None:
    found = as_json(folder_of(name, tmp_path / "model"))
    assert [(row["kind"], row["window"], row["layers"]) for row in found["windows"]] == windows
    assert {rope["rotary_share"] for rope in found["positions"]["rope"]} == ({share} if share else set())
    assert found["positions"]["known_as"]
    assert found["refused"] == []


@pytest.mark.parametrize(
    ("change", "section", "words"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "tensors",
            "cut short?",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "tensors", "64 bytes, with a header of"),
        (lambda f: (f / "model.safetensors").unlink(), "tensors", "a folder without"),
        (lambda f: tensor(f, "lm_head.weight", None), "tensors", "1 missing: 'lm_head.weight'"),
        (lambda f: tensor(f, "model.layers.0.self_attn.q_proj.bias", (96,)), "tensors", "1 unexpected: 'model."),
        (lambda f: tensor(f, "model.norm.weight", (7,)), "tensors", "model.norm.weight [7] for [48]"),
        (lambda f: edit(f / "config.json", num_hidden_layers=1), "tensors", "9 unexpected"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "b"}}'),
            "tensors",
            "which names other files",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer", "tokenizer.json: received"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer", "list where an object"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for"), "tokenizer", "the source's own, which fails"),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 5000}'),
            "ends of a turn",
            "received 5000",
        ),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 400}'),
            "config",
            "learns a vector",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "unknown"}'), "config", "unknown"),
        (lambda f: (f / "config.json").write_text("{"), "config", "'config.json': received"),
        (lambda f: edit(f / "config.json", hidden_size="wide"), "config", "hidden_size"),
        (lambda f: edit(f / "config.json", eos_token_id="</s>"), "config", "eos_token_id"),
    ],
)
def test_what_would_be_refused_is_named(change: Any, section: str, words: str, tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    change(folder)
    found = as_json(folder)
    assert [row["section"] for row in found["refused"]] == [section]
    assert words in found["refused"][0]["reason"]
    assert words in " ".join(inspected(str(folder)).split())


@pytest.mark.parametrize("name", TINY)
def test_tensors_of_healthy_models_are_all_there(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    found = as_json(tmp_path)
    assert (found["refused"], found["tensors"]["count"] > 10) == ([], True)


def test_files_by_torch_are_looked_into(tmp_path: Path) -> None:
    weights = tiny_model("llama").state_dict()
    folder = folder_of("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "shapes that do not fit" in as_json(folder)["refused"][0]["reason"]  # another vocabulary


def test_a_template_without_system_messages_and_tokens_outside(tmp_path: Path) -> None:
    library = byte_level(special=TOKENS)
    library.add_special_tokens(["<image>"])
    folder = folder_of("llama", tmp_path / "model", {**CONFIG, "chat_template": PHI3})
    library.save(str(folder / "tokenizer.json"))
    found = as_json(folder)
    assert found["tokenizer"]["chat_template"]["no_system_message"] == "leaves a system message out"
    assert "'<image>' (400)" in found["tokenizer"]["remarks"][0]
    assert found["refused"] == []


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    library = byte_level(special=(*TOKENS, "\x1b[2J"))
    config = {**CONFIG, "pad_token": "\x1b[2J"}
    folder = write_folder(tmp_path / "model", library, config)
    tiny_model("llama", vocab_size=400).save_pretrained(folder)
    shown = inspected(str(folder))
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown


# --- the tokenizer alone ----------------------------------------------------------------------------------------------


def test_tokenizer_out_writes_what_a_bundle_holds(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(8)
    library.save(str(folder / "tokenizer.json"))
    assert "400 tokens" in inspected(str(folder), "--tokenizer-out", str(tmp_path / "out"))
    export(str(folder), tmp_path / "bundle", ExportConfig(2, 8, chunk_size=1))
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes()
    assert len(tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("word " * 50).ids) > 8


def test_tokenizer_out_refuses_a_template_that_a_bundle_would_not_take(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for")
    result = run_cli("inspect", folder, "--tokenizer-out", tmp_path / "out")
    result.refusal("the source's own, which fails")
    assert not (tmp_path / "out").exists()


def test_tokenizer_out_refuses(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    out = tmp_path / "out"

    def refused(*arguments: str) -> str:
        result = run_cli("inspect", *arguments)
        return result.refusal()

    inspected(str(folder), "--tokenizer-out", str(out))
    assert "holds tokenizer.json" in refused(str(folder), "--tokenizer-out", str(out))
    assert "which is no model" in refused("families", "--tokenizer-out", str(tmp_path / "x"))
    assert "--memory or --json" in refused(str(folder), "--json", "--tokenizer-out", str(tmp_path / "x"))
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json: received" in refused(str(folder), "--tokenizer-out", str(tmp_path / "x"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "without a tokenizer" in refused(str(folder), "--tokenizer-out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    result = run_cli("inspect", tmp_path / "none")
    result.refusal("which is not there")


def test_an_id_of_the_hub(tmp_path: Path) -> None:
    """The Hub's cache is read: files that a model may lack are not there."""
    folder, commit = folder_of("llama", tmp_path / "model"), "a" * 40
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = json.loads(run_cli_apart("inspect", "some/model", "--json", env=environment).succeeded().out)
    assert (found["format"], found["tensors"], found["refused"]) == ("Hub", None, [])
    assert {name: found[name] for name in ("tokenizer", "ends")} == {
        name: as_json(folder)[name] for name in ("tokenizer", "ends")
    }


# --- GGUF and bundles -------------------------------------------------------------------------------------------------


def gguf(path: Path) -> Path:
    """A GGUF file of Llama's architecture with SentencePiece's vocabulary and random weights."""
    import gguf

    library = spaced()
    names = [library.id_to_token(number) for number in range(library.get_vocab_size())]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(names) - 259)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-float(number) for number in range(len(names))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(names), 32), "output": (len(names), 32), "output_norm": (32,)}
    shapes |= {
        f"blk.0.{name}": (rows, 32)
        for name, rows in (
            ("attn_q", 32),
            ("attn_k", 16),
            ("attn_v", 16),
            ("attn_output", 32),
            ("ffn_gate", 32),
            ("ffn_up", 32),
            ("ffn_down", 32),
        )
    }
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path: Path) -> None:
    file = gguf(tmp_path / "tiny.gguf")
    found = as_json(file)
    assert (found["format"], found["model"]["family"], found["model"]["head_dim"]) == ("GGUF", "llama", 8)
    assert found["tensors"]["types"]["F32"]["count"] == found["tensors"]["count"] == 12
    assert found["tokenizer"]["read_from"].startswith("GGUF llama")
    assert found["tokenizer"]["beginning"] == [{"id": 1, "text": "<s>"}]
    assert [end["id"] for end in found["ends"]] == [2]
    assert found["refused"] == []
    inspected(str(file), "--tokenizer-out", str(tmp_path / "out"))
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ("ab", " ab", "a b", "ab</s>ab", "é"):
        assert written.encode(text).ids == spaced().encode(text).ids


def test_a_gguf_files_tensors_that_an_export_refuses(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama", tensors={"blk.1.attn_q.weight": None}))
    (reason,) = (row["reason"] for row in as_json(path)["refused"] if row["section"] == "tensors")
    assert "blk.1.attn_q" in reason


def test_bundles_stay_bundles(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    export(str(folder), tmp_path / "bundle", ExportConfig(2, 8, chunk_size=1))
    shutil.copy(folder / "config.json", tmp_path / "bundle" / "config.json")
    assert json.loads(inspected(str(tmp_path / "bundle"), "--json"))["schema_version"]


def test_heads_that_differ_by_layer_are_no_fault(tmp_path: Path) -> None:
    """transformers refuses to give one number for them; a model without attention has none."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16, "head_dim": 8}
    for name, config in (("gemma4", Gemma4TextConfig(**layers, num_hidden_layers=2)), ("rwkv", RwkvConfig())):
        config.save_pretrained(tmp_path / name)
        done = run_cli("inspect", tmp_path / name)
        assert {"gemma4": "heads as each layer has them, or none", "rwkv": "no attention"}[name] in done.out
        assert "refused (config)" not in done.out
