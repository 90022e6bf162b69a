"""GGUF files that cannot be read exactly are refused in one line that names the key, the tensor or the part."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from sinkexport.loading.gguf_models.file import open_gguf
from sinkexport.loading.gguf_models.model import gguf_config, load_gguf, stated_end_ids
from sinkexport.sources import locate
from sinkrt import UsageError

from tests.fidelity.gguf_writer import HIDDEN, VOCAB, Tiny, tiny, tiny_mixtral, write
from tests.support import run_cli

VECTOR = np.ones(HIDDEN, np.float32)


def _load(path: Path) -> Any:
    origin = locate(str(path))
    return load_gguf(origin, gguf_config(origin), torch.float32)


def _refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        _load(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    return message


def _matches(expected: str, message: str) -> bool:
    """Whether the message says so; shown, if it does not."""
    if re.search(expected, message) is None:
        pytest.fail(f"{message!r} does not say {expected!r}")
    return True


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "a weight is missing": ({"blk.1.attn_q.weight": None}, r"no tensor 'blk\.1\.attn_q\.weight'"),
    "the embedding is missing": ({"token_embd.weight": None}, r"token_embd\.weight"),
    "the last norm is missing": ({"output_norm.weight": None}, r"no tensor 'output_norm\.weight'"),
    "one bias of two layers": ({"blk.0.attn_output.bias": VECTOR}, r"no tensor 'blk\.1\.attn_output\.bias'"),
    "an unknown tensor": ({"blk.0.attn_gate.weight": VECTOR}, r"'blk\.0\.attn_gate\.weight', which 'llama' has no"),
    "experts without their number": ({"blk.0.ffn_gate_inp.weight": VECTOR}, r"ffn_gate_inp"),
    "a layer too many": ({"blk.2.attn_norm.weight": VECTOR}, r"block_count' = 2 .* 3 layers"),
    "another shape": ({"blk.0.ffn_up.weight": np.ones((80, HIDDEN), np.float32)}, r"ffn_up\.weight' \(80, 64\)"),
    "the shape of as many values": ({"blk.0.ffn_up.weight": np.ones((HIDDEN, 96), np.float32)}, r"\(64, 96\)"),
    "a norm of another length": ({"blk.0.attn_norm.weight": np.ones(32, np.float32)}, r"attn_norm"),
    "factors of another length": ({"rope_freqs.weight": np.ones(5, np.float32)}, r"of shape \(5,\)"),
    "factors of zero": ({"rope_freqs.weight": np.zeros(8, np.float32)}, r"not above 0"),
    "long factors alone": ({"rope_factors_long.weight": np.ones(8, np.float32)}, r"rope_factors_short"),
}

KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "a key of no known effect": ({"attention.scale": 0.5}, r"'llama\.attention\.scale' = 0\.5"),
    "a window": ({"attention.sliding_window": 8}, r"'llama\.attention\.sliding_window' = 8"),
    "not causal": ({"attention.causal": False}, r"'llama\.attention\.causal' = False"),
    "heads partly rotated": ({"rope.dimension_count": 8}, r"rope\.dimension_count' = 8"),
    "an odd share": ({"rope.dimension_count": 7}, r"rope\.dimension_count' = 7"),
    "other heads of values": ({"attention.value_length": 8}, r"attention\.value_length' = 8"),
    "unknown scaling": ({"rope.scaling.type": "dynamic"}, r"rope\.scaling\.type' = 'dynamic'"),
    "yarn's extrapolation": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 0.5},
        r"yarn_ext_factor' = 0\.5",
    ),
    "yarn's settings without yarn": ({"rope.scaling.yarn_beta_fast": 8.0}, r"YaRN's settings \(beta_fast\)"),
    "longrope without factors": ({"rope.scaling.type": "longrope"}, r"without 'rope_factors_long\.weight'"),
    "another key of each layer": ({"feed_forward_length": [96, 80]}, r"another value in each layer \(\[96, 80\]"),
    "no layers": ({"block_count": 0}, r"block_count' = 0"),
    "too many layers": ({"block_count": 4_000_000_000}, r"block_count' = 4000000000"),
    "more layers than tensors": ({"block_count": 3}, r"block_count' = 3"),
    "no heads": ({"attention.head_count": 0}, r"head_count' = 0"),
    "heads that are no ratio": ({"attention.head_count_kv": 3}, r"4 heads of queries and 3 of keys"),
    "a huge MLP": ({"feed_forward_length": 1 << 30}, r"feed_forward_length' = 1073741824"),
    "a large MLP": ({"feed_forward_length": 1 << 20}, r"'blk\.0\.ffn_gate\.weight' \(96, 64\)"),
    "other columns": ({"embedding_length": 128}, r"embedding_length' = 128"),
    "another vocabulary": ({"vocab_size": 95}, r"95 vocab_size for 'token_embd\.weight' of 96 rows"),
    "a norm that divides by nothing": ({"attention.layer_norm_rms_epsilon": -1.0}, r"rms_epsilon' = -1\.0"),
    "not a number": ({"rope.freq_base": float("nan")}, r"rope\.freq_base' = nan"),
    "a text for a number": ({"attention.head_count": "four"}, r"head_count' = 'four'"),
    "no norm's eps": ({"attention.layer_norm_rms_epsilon": None}, r"no key 'llama\.attention\.layer_norm_rms_epsilon'"),
    "experts used where there are none": ({"expert_used_count": 2}, r"expert_used_count' = 2"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors(what: str, tmp_path: Path) -> None:
    changes, expected = TENSORS[what]
    path = write(tmp_path / "bad.gguf", tiny("llama", tensors=changes))
    assert _matches(expected, _refusal(path))


@pytest.mark.parametrize("what", KEYS)
def test_keys(what: str, tmp_path: Path) -> None:
    changes, expected = KEYS[what]
    made = tiny("llama")
    for key, value in changes.items():
        made.keys.pop(key, None)
        if value is not None:
            made.keys[key] = value
    assert _matches(expected, _refusal(write(tmp_path / "bad.gguf", made)))


OTHERS: dict[str, tuple[Tiny, str]] = {
    "an architecture that is not mapped": (Tiny("deci", {}, {}), r"architecture 'deci', expected one of bloom"),
    "one without positions to keep": (Tiny("gpt2", {}, {}), r"'gpt2', which learns a vector for each absolute"),
    "an adapter": (Tiny("llama", {}, {}, {"general.type": "adapter"}), r"type 'adapter'"),
    "keys of another architecture": (
        Tiny("llama", tiny("llama").keys, tiny("llama").tensors, {"qwen2.rope.freq_base": 7.0}),
        r"'qwen2\.rope\.freq_base'",
    ),
    "a vision encoder": (
        Tiny("llama", tiny("llama").keys, tiny("llama").tensors, {"clip.use_gelu": True}),
        r"'clip\.use_gelu'",
    ),
    "more experts a token than there are": (tiny_mixtral(expert_used_count=5), r"expert_used_count' = 5 of 4"),
    "groups of experts": (tiny_mixtral(expert_group_count=2), r"expert_group_count' = 2"),
    "another gate": (tiny_mixtral(expert_gating_func=2), r"expert_gating_func' = 2"),
    "a huge number of experts": (tiny_mixtral(expert_count=1 << 20), r"ffn_gate_inp\.weight' \(4, 64\)"),
    "a share where whole heads are rotated": (
        tiny("qwen2", keys={"rope.dimension_count": 8}),
        r"rotation of 8 of 16 columns",
    ),
    "experts in an architecture without": (tiny("qwen2", keys={"expert_count": 4}), r"'qwen2\.expert_count' = 4"),
    "no biases of keys in any layer": (tiny("qwen2", biases=("attn_q", "attn_v")), r"no tensor 'blk\.0\.attn_k\.bias'"),
    "no biases behind attention": (
        tiny("gpt-oss", tensors={"blk.0.attn_output.bias": None, "blk.1.attn_output.bias": None}),
        r"no tensor 'blk\.0\.attn_output\.bias'",
    ),
    "granite without rotation": (
        tiny("granite", keys={"logit_scale": 2.0, "rope.scaling.finetuned": False}),
        r"rope\.scaling\.finetuned' = False",
    ),
    "olmo's eps": (tiny("olmo", keys={"attention.layer_norm_epsilon": 1e-6}), r"layer_norm_epsilon' = 1e-06"),
    "mpt without alibi": (
        tiny("mpt", biases=False, head=False, keys={"attention.max_alibi_bias": 0.0}),
        r"mpt without ALiBi",
    ),
    "mpt with biases": (tiny("mpt", biases=True, head=False), r"'blk\.0\.attn_\w+\.bias'"),
    "falcon-rw": (tiny("falcon", biases=False, norms=("attn_norm",)), r"Falcon-RW"),
    "glm4 with positions by axis": (
        tiny("glm4", keys={"rope.dimension_sections": [2, 1, 1, 0]}),
        r"dimension_sections' = \[2, 1, 1, 0\]",
    ),
    "stablelm's flag against its tensors": (
        tiny("stablelm", keys={"use_parallel_residual": True}),
        r"use_parallel_residual' = True",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_others(what: str, tmp_path: Path) -> None:
    made, expected = OTHERS[what]
    assert _matches(expected, _refusal(write(tmp_path / "bad.gguf", made)))


def test_keys_without_effect_are_no_obstacle(tmp_path: Path) -> None:
    made = tiny(
        "llama",
        keys={
            "rope.scaling.original_context_length": 4 << 20,
            "rope.scaling.finetuned": True,
            "expert_count": 0,
            "expert_used_count": 0,
            "attention.causal": True,
        },
    )
    made.keys["context_length"] = 4 << 20
    made.other_keys = {
        "general.sampling.temp": 0.7,
        "quantize.imatrix.file": "x",
        "quantize.imatrix.entries_count": 3,
        "mradermacher.quantize_version": "2",
        "general.file_type": 1,
    }
    _load(write(tmp_path / "good.gguf", made))


def test_weights_equal_those_of_transformers_loader(tmp_path: Path) -> None:
    import transformers

    path = write(tmp_path / "tiny.gguf", tiny("llama", head=False))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = _load(path).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


TOKENS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "eos": ({}, (2,)),
    "eot and eom": ({"eot_token_id": 7, "eom_token_id": 9}, (2, 7, 9)),
    "the same twice": ({"eot_token_id": 2}, (2,)),
    "none": ({"eos_token_id": None}, ()),
    "eot alone": ({"eos_token_id": None, "eot_token_id": 7}, (7,)),
}


@pytest.mark.parametrize("what", TOKENS)
def test_ends_of_a_text(what: str, tmp_path: Path) -> None:
    """None is made up: without a key, transformers' Llama has 2."""
    tokens, expected = TOKENS[what]
    path = write(tmp_path / "tiny.gguf", tiny("llama"), tokens=tokens)
    model = _load(path)
    assert stated_end_ids(open_gguf(path)) == expected
    ends = model.generation_config.eos_token_id
    assert tuple([] if ends is None else [ends] if isinstance(ends, int) else ends) == expected
    assert model.config.eos_token_id == (None if "eos_token_id" in tokens else 2)


def test_an_end_outside_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama"), tokens={"eot_token_id": VOCAB})
    assert _matches(r"eot_token_id' = 96", _refusal(path))


def test_a_split_model_is_read_whole(tmp_path: Path) -> None:
    made = tiny("llama", seed=3)
    whole = _load(write(tmp_path / "whole.gguf", made)).state_dict()
    (tmp_path / "parts").mkdir()
    first = write(tmp_path / "parts" / "tiny.gguf", made, split=5)
    parts = sorted(first.parent.iterdir())
    assert len(parts) == 5
    for part in parts:
        ours = _load(part).state_dict()
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
        assert locate(str(part)).name == "tiny"
    parts[3].rename(tmp_path / "away.gguf")
    assert _matches(r"without tiny-00004-of-00005\.gguf", _refusal(first))
    parts[2].rename(parts[3])
    parts[2].write_bytes(parts[3].read_bytes())
    assert _matches(r"says that it is part 2 \(from 0\)", _refusal(first))
    alone = tmp_path / "tiny.gguf"
    alone.write_bytes(first.read_bytes())
    assert _matches(r"one of 5 parts", _refusal(alone))


def test_parts_whose_names_say_more_than_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny-00001-of-00001.gguf", tiny("llama"))
    _load(path)  # one part that says nothing of parts
    renamed = [path.with_name(f"tiny-0000{number}-of-00002.gguf") for number in (1, 2)]
    for other in renamed:
        other.write_bytes(path.read_bytes())
    assert _matches(r"says nothing of a split", _refusal(renamed[0]))


def _file(tmp_path: Path) -> bytes:
    return write(tmp_path / "tiny.gguf", tiny("llama")).read_bytes()


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    raw = _file(tmp_path)
    bad = tmp_path / "bad.gguf"
    for length in (0, 3, 20, 24, 100, 777, 2000, 4000, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:length])
        assert _matches(r"a whole GGUF file", _refusal(bad))


BYTES = {
    "another byte order": (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian"),
    "a later version": (lambda raw: raw[:4] + struct.pack("<I", 4) + raw[8:], "version 4"),
    "the first version": (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "version 1"),
    "other bytes": (lambda raw: b"PK\3\4" + raw[4:], "does not begin with 'GGUF'"),
    "a pointer of Git LFS": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS"),
    "more keys than bytes": (lambda raw: raw[:16] + struct.pack("<Q", 1 << 40) + raw[24:], "metadata keys announced"),
    "more tensors than bytes": (lambda raw: raw[:8] + struct.pack("<Q", 1 << 40) + raw[16:], "tensors announced"),
    "a long name": (lambda raw: raw[:24] + struct.pack("<Q", 1 << 60) + raw[32:], "bytes of a text"),
    "a long array": (lambda raw: _longer_array(raw), "in 'tokenizer.ggml.tokens'"),
    "a name that is not UTF-8": (lambda raw: raw[:32] + b"\xff" + raw[33:], "not UTF-8"),
}


def _longer_array(raw: bytes) -> bytes:
    place = raw.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    return raw[:place] + struct.pack("<Q", 1 << 50) + raw[place + 8 :]


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_gguf(what: str, tmp_path: Path) -> None:
    change, expected = BYTES[what]
    (tmp_path / "bad.gguf").write_bytes(change(_file(tmp_path)))
    assert expected in _refusal(tmp_path / "bad.gguf")


def test_damaged_headers_raise_nothing_else(tmp_path: Path) -> None:
    """Bits turned over anywhere in the header: a refusal, or a model (a score or a text of the vocabulary changed)."""
    raw = _file(tmp_path)
    end, generator, bad = raw.index(b"blk.1."), np.random.default_rng(0), tmp_path / "bad.gguf"
    refused = 0
    for _ in range(60):
        changed = bytearray(raw)
        for place in generator.integers(4, end, 2):
            changed[place] ^= 1 << generator.integers(0, 8)
        bad.write_bytes(bytes(changed))
        try:
            _load(bad)
        except UsageError:
            refused += 1
    assert refused > 20


def test_reader_equals_gguf_pys(tmp_path: Path) -> None:
    made = tiny("llama")
    made.kinds = {"blk.0.attn_q.weight": "Q8_0", "output.weight": "F16", "blk.1.attn_q.weight": "BF16"}
    made.other_keys = {
        "general.tags": ["a", "ü"],
        "general.flags": [True, False],
        "general.numbers": [1.5, -2.0],
        "general.integers": [3, -4],
        "general.alignment": 64,
    }
    path = write(tmp_path / "tiny.gguf", made)
    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    assert dict(ours.metadata) == {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert np.array_equal(tensor.data, ours.tensors[tensor.name].data)
        assert list(tensor.shape) == list(ours.tensors[tensor.name].shape)
        assert tensor.tensor_type == ours.tensors[tensor.name].tensor_type


def test_the_command_ends_with_2_and_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", tiny("llama", keys={"attention.scale": 0.5}))
    run_cli("export", path, "-o", tmp_path / "out").refusal("llama.attention.scale")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["bad.gguf"]
