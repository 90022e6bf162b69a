"""GGUF models: logits equal llama.cpp's, metadata and tensors are used, known to be without effect, or refused.

Errors are relative to the spread (standard deviation) of llama.cpp's log probabilities. What sinkexport loads runs in
float32; llama.cpp computes GELU with a table in float16, so families with GELU are compared less tightly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.loading.gguf_models.model import gguf_config, load_gguf
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import LoadedModel, locate
from sinkrt import Session, UsageError

from tests.fidelity.gguf_writer import HEAD, KV_HEADS, VOCAB, Tiny, tiny, tiny_mixtral, tiny_quantised, write
from tests.fidelity.llama_cpp_logits import PROMPT, log_probabilities
from tests.real_model import smollm2_file
from tests.support import export_model

EXACT, WITH_GELU = 2e-4, 5e-3
"""Largest error of log probabilities, of their spread. What ignores a key is at least 10 times as far off."""

STEPS = 5
QKV = ("attn_q", "attn_k", "attn_v")
ALL_BIASES = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FREQS = np.linspace(1.0, 6.0, HEAD // 2).astype(np.float32)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
LONG_SHORT = {"rope_factors_long.weight": FREQS[:6] * 2, "rope_factors_short.weight": FREQS[:6]}
PHI3 = {"rope.dimension_count": 12, "rope.scaling.attn_factor": 1.2}
GRANITE = {"logit_scale": 2.0, "attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.5}

FAMILIES: dict[str, tuple[Callable[[], Tiny], float]] = {
    "bloom": (lambda: tiny("bloom", head=False), WITH_GELU),
    "cohere2": (lambda: tiny("cohere2", layers=4), EXACT),
    "command-r": (lambda: tiny("command-r"), EXACT),
    "command-r-plus": (lambda: tiny("command-r", layers=64), 1e-3),
    "falcon-7b": (lambda: tiny("falcon", kv_heads=1, biases=False, norms=("attn_norm",), head=False), WITH_GELU),
    "falcon-40b": (lambda: tiny("falcon", kv_heads=2, biases=False, norms=("attn_norm", "attn_norm_2")), WITH_GELU),
    "falcon2": (lambda: tiny("falcon", kv_heads=2, biases=False, norms=("attn_norm",)), WITH_GELU),
    "gemma": (lambda: tiny("gemma"), WITH_GELU),
    "gemma2": (lambda: tiny("gemma2"), WITH_GELU),
    "gemma3": (lambda: tiny("gemma3", layers=6), WITH_GELU),
    "glm4": (lambda: tiny("glm4"), EXACT),
    "gpt-oss": (lambda: tiny("gpt-oss", layers=4), 5e-4),
    "gptneox": (lambda: tiny("gptneox"), WITH_GELU),
    "granite": (lambda: tiny("granite", keys=GRANITE), EXACT),
    "llama": (lambda: tiny("llama"), EXACT),
    "llama-wide-heads": (lambda: tiny("llama", head_dim=32), EXACT),
    "minimax-m2": (lambda: tiny("minimax-m2"), EXACT),
    "mpt": (lambda: tiny("mpt", biases=False, head=False), WITH_GELU),
    "nemotron": (lambda: tiny("nemotron", keys={"rope.dimension_count": HEAD // 2}), EXACT),
    "olmo": (lambda: tiny("olmo"), EXACT),
    "olmo2": (lambda: tiny("olmo2"), EXACT),
    "olmo3": (lambda: tiny("olmo2", layers=4, keys={"attention.sliding_window": 5}), EXACT),
    "phi2": (lambda: tiny("phi2", keys={"rope.dimension_count": HEAD // 2}), WITH_GELU),
    "phi3": (lambda: tiny("phi3"), EXACT),
    "phi3-tied": (lambda: tiny("phi3", head=False), EXACT),
    "qwen2": (lambda: tiny("qwen2", biases=QKV), EXACT),
    "qwen2-without-biases": (lambda: tiny("qwen2", head=False), EXACT),
    "qwen2moe": (lambda: tiny("qwen2moe", biases=QKV), EXACT),
    "qwen3": (lambda: tiny("qwen3", head_norms=True, head_dim=32), EXACT),
    "qwen3moe": (lambda: tiny("qwen3moe", head_norms=True, head_dim=32), EXACT),
    "smollm3": (lambda: tiny("smollm3", layers=4), 5e-4),
    "stablelm": (lambda: tiny("stablelm"), EXACT),
    "stablelm-12b": (lambda: tiny("stablelm", parallel=True), EXACT),
    "starcoder2": (lambda: tiny("starcoder2"), WITH_GELU),
}

WITHOUT_MLP = {f"blk.{i}.ffn_down.weight": np.zeros((64, 96), np.float32) for i in range(46)}
"""46 layers add up the errors of llama.cpp's GELU; without the MLP's output there are none."""

METADATA: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    # what the file has -> architecture, options of `tiny` with it, changes that take it away, largest error
    "rope_freqs": ("llama", {"tensors": {"rope_freqs.weight": FREQS}}, {"tensors": {}}, EXACT),
    "rope_freqs and linear": ("llama", {"tensors": {"rope_freqs.weight": FREQS}, "keys": LINEAR}, {"keys": {}}, EXACT),
    "linear": ("llama", {"keys": LINEAR}, {"keys": {}}, EXACT),
    "scale_linear": ("llama", {"keys": {"rope.scale_linear": 4.0}}, {"keys": {}}, EXACT),
    "scaling none": ("llama", {"keys": {**LINEAR, "rope.scaling.type": "none"}}, {"keys": LINEAR}, EXACT),
    "attention factor": ("llama", {"keys": {"rope.scaling.attn_factor": 1.3}}, {"keys": {}}, EXACT),
    "yarn": ("llama", {"keys": {**YARN, "rope.freq_base": 100.0}}, {"keys": {"rope.freq_base": 100.0}}, EXACT),
    "yarn's attention factor": ("llama", {"keys": {**YARN, "rope.scaling.attn_factor": 1.3}}, {"keys": YARN}, EXACT),
    "yarn's original length": (
        "llama",
        {"keys": {**YARN, "rope.freq_base": 100.0}},
        {"keys": {**YARN, "rope.freq_base": 100.0, "rope.scaling.original_context_length": 4}},
        EXACT,
    ),
    "yarn in qwen2": ("qwen2", {"biases": QKV, "keys": YARN}, {"keys": {}}, EXACT),
    "yarn in olmo3's full layers": (
        "olmo2",
        {"layers": 4, "keys": {"attention.sliding_window": 5, **YARN}},
        {"keys": {"attention.sliding_window": 5}},
        EXACT,
    ),
    "frequency base": ("llama", {"keys": {"rope.freq_base": 300.0}}, {"keys": {}}, EXACT),
    "starcoder2's base": ("starcoder2", {"keys": {"rope.freq_base": 100.0}}, {"keys": {}}, WITH_GELU),
    "stablelm's share": ("stablelm", {"keys": {"rope.dimension_count": 12}}, {}, EXACT),
    "phi3's share": ("phi3", {"keys": {"rope.dimension_count": 8}}, {"keys": {}}, EXACT),
    "phi3's short factors": (
        "phi3",
        {"tensors": LONG_SHORT, "keys": {**PHI3, "rope.scaling.original_context_length": 400}},
        {"tensors": {}},
        EXACT,
    ),
    "phi3's long factors": (
        "phi3",
        {"tensors": LONG_SHORT, "keys": {**PHI3, "rope.scaling.original_context_length": 8}},
        {"keys": {**PHI3, "rope.scaling.original_context_length": 400}},
        EXACT,
    ),
    "gemma2's caps": (
        "gemma2",
        {"keys": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}},
        {"keys": {"final_logit_softcapping": 4.0}},
        WITH_GELU,
    ),
    "gemma2's last cap": ("gemma2", {"keys": {"final_logit_softcapping": 4.0}}, {"keys": {}}, WITH_GELU),
    "gemma2's window": ("gemma2", {}, {"keys": {"attention.sliding_window": None}}, WITH_GELU),
    "gemma2's query scale at 46 layers": ("gemma2", {"layers": 46, "tensors": WITHOUT_MLP}, {}, WITH_GELU),
    "gemma3's cap": ("gemma3", {"keys": {"final_logit_softcapping": 4.0}}, {"keys": {}}, WITH_GELU),
    "gemma3's bases": (
        "gemma3",
        {"layers": 6, "keys": {"rope.freq_base": 50.0, "rope.freq_base_swa": 7.0}},
        {"keys": {"rope.freq_base": 50.0}},
        WITH_GELU,
    ),
    "gemma3's linear": (
        "gemma3",
        {"layers": 6, "keys": {**LINEAR, "rope.freq_base": 50.0}},
        {"keys": {"rope.freq_base": 50.0}},
        WITH_GELU,
    ),
    "gemma3's pattern": (
        "gemma3",
        {"keys": {"attention.sliding_window_pattern": [False, True]}},
        {"keys": {}},
        WITH_GELU,
    ),
    "gemma3 without a window": ("gemma3", {"keys": {"attention.sliding_window": None}}, {"keys": {}}, WITH_GELU),
    "biases in llama": ("llama", {"biases": ALL_BIASES}, {"biases": ("ffn_up",)}, EXACT),
    "biases without one of the output": ("llama", {"biases": QKV}, {"biases": ()}, EXACT),
    "clamp in olmo": ("olmo", {"keys": {"attention.clamp_kqv": 1.0}}, {"keys": {}}, EXACT),
    "clamp in mpt": (
        "mpt",
        {"biases": False, "head": False, "keys": {"attention.clamp_kqv": 1.0}},
        {"keys": {}},
        WITH_GELU,
    ),
    "granite's multipliers": ("granite", {"keys": GRANITE}, {"keys": {"logit_scale": 2.0}}, EXACT),
    "command-r's scale": ("command-r", {"keys": {"logit_scale": 2.0}}, {"keys": {}}, EXACT),
    "neox in sequence": ("gptneox", {"keys": {"use_parallel_residual": False}}, {"keys": {}}, WITH_GELU),
    "eps": ("llama", {"keys": {"attention.layer_norm_rms_epsilon": 0.5}}, {"keys": {}}, EXACT),
}


def _ours(path: Path, ids: list[int]) -> np.ndarray:
    """Log probabilities before each of the ids behind PROMPT: float64 [len(ids), VOCAB]."""
    origin = locate(str(path))
    model = load_gguf(origin, gguf_config(origin), torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0].double()
    return torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1).numpy()


def _error(path: Path, other: Path | None = None) -> float:
    """Largest difference from llama.cpp's log probabilities of `path`, of their spread. other: what we read instead."""
    ids, theirs = log_probabilities(path, PROMPT, STEPS, VOCAB)
    return float(np.abs(_ours(other or path, ids) - theirs).max() / theirs.std())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_llama_cpp(name: str, tmp_path: Path) -> None:
    make, tolerance = FAMILIES[name]
    assert _error(write(tmp_path / "tiny.gguf", make())) < tolerance


@pytest.mark.parametrize("what", METADATA)
def test_metadata_are_part_of_the_model(what: str, tmp_path: Path) -> None:
    architecture, options, without, tolerance = METADATA[what]
    path = write(tmp_path / "with.gguf", tiny(architecture, **options))
    assert _error(path) < tolerance
    if not without:  # nothing to take away: the tensors' shapes or the layers' number decide
        return
    ignored = write(tmp_path / "without.gguf", tiny(architecture, **{**options, **without}))
    assert _error(path, ignored) > 10 * tolerance


@pytest.mark.parametrize("keys", [{}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}], ids=["", "linear"])
def test_mixtral_under_the_name_of_llama(keys: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "mixtral.gguf", tiny_mixtral(**keys))
    assert _error(path) < EXACT
    other = write(tmp_path / "other.gguf", tiny_mixtral(**keys, expert_used_count=1))
    assert _error(path, other) > 10 * EXACT


QUANTISED = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]
"""All that gguf-py can dequantise."""


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_quantisation(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    assert len(QUANTISED) >= 24
    assert _error(write(tmp_path / "quantised.gguf", tiny_quantised(kind))) < EXACT


def test_float16_weights(tmp_path: Path) -> None:
    made = tiny("llama")
    made.kinds = {name: "F16" for name in made.tensors if "norm" not in name}
    origin = locate(str(write(tmp_path / "half.gguf", made)))
    config = gguf_config(origin)
    half, single = (load_gguf(origin, config, dtype).state_dict() for dtype in (torch.float16, torch.float32))
    assert all(torch.equal(half[name], single[name].half()) and half[name].dtype == torch.float16 for name in single)


def _yarn_frequencies(base: float, factor: float, original: int, fast: float, slow: float) -> np.ndarray:
    """YaRN's inverse frequencies with bounds that are not whole (arXiv:2309.00071), float64 [HEAD / 2]."""
    plain = base ** (-np.arange(0, HEAD, 2) / HEAD)
    low, high = (HEAD * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (fast, slow))
    ramp = np.clip((np.arange(HEAD // 2) - max(low, 0)) / (min(high, HEAD - 1) - max(low, 0)), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


def test_gpt_oss_has_bounds_of_yarn_that_are_not_whole(tmp_path: Path) -> None:
    """llama.cpp rounds them; the model's own code and transformers (``truncate: false``) do not."""
    keys = {**YARN, "rope.scaling.original_context_length": 512, "rope.freq_base": 100.0}
    origin = locate(str(write(tmp_path / "oss.gguf", tiny("gpt-oss", keys=keys))))
    rotary = load_gguf(origin, gguf_config(origin), torch.float32).model.rotary_emb
    expected = _yarn_frequencies(100.0, 4.0, 512, 32.0, 1.0)
    np.testing.assert_allclose(rotary.inv_freq.numpy(), expected, rtol=1e-5)
    assert rotary.attention_scaling == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_settings_of_yarn_that_llama_cpp_leaves_out(tmp_path: Path) -> None:
    """Converters write them from the checkpoint's configuration; llama.cpp's Llama reads none of the three."""
    keys = {
        **YARN,
        "rope.scaling.yarn_beta_fast": 8.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_attn_factor": 1.5,
    }
    config = gguf_config(locate(str(write(tmp_path / "yarn.gguf", tiny("llama", keys=keys)))))
    found = config.rope_parameters
    assert (found["beta_fast"], found["beta_slow"], found["attention_factor"]) == (8.0, 2.0, 1.5)


def test_phi3_keeps_its_window(tmp_path: Path) -> None:
    """llama.cpp has it turned off; the file and the checkpoint have it."""
    made = tiny("phi3", keys={"attention.sliding_window": 2047})
    assert gguf_config(locate(str(write(tmp_path / "a.gguf", made)))).sliding_window == 2047
    made = tiny("phi3", keys={"attention.sliding_window": 0})
    assert gguf_config(locate(str(write(tmp_path / "b.gguf", made)))).sliding_window is None


def test_a_bundle_answers_as_llama_cpp(tmp_path: Path) -> None:
    """From the file to the runtime's logits: factors of rotation, biases and grouped heads included."""
    made = tiny("llama", biases=QKV, tensors={"rope_freqs.weight": FREQS})
    path = write(tmp_path / "tiny.gguf", made)
    ids, theirs = log_probabilities(path, PROMPT, STEPS, VOCAB)
    origin = locate(str(path))
    model = load_gguf(origin, gguf_config(origin), torch.float32).eval()
    export_model(model, tmp_path / "bundle", num_sink_tokens=2, window_size=len(PROMPT) + STEPS)
    session = Session.load(tmp_path / "bundle")
    logits = [session.prefill(np.array([PROMPT])).copy()]
    logits += [session.step(np.array([token])).copy() for token in ids[:-1]]
    ours = torch.log_softmax(torch.from_numpy(np.concatenate(logits)).double(), dim=-1).numpy()
    assert np.abs(ours - theirs).max() < EXACT * theirs.std()


@pytest.mark.parametrize("name", ["qwen2-without-biases", "stablelm-12b"])
def test_the_check_of_weights_finds_every_tensor(name: str, tmp_path: Path) -> None:
    """Zeros for biases that the file lacks, and a norm for each head, which the file has as rows of one tensor."""
    made = FAMILIES[name][0]()
    origin = locate(str(write(tmp_path / "tiny.gguf", made)))
    model = load_gguf(origin, gguf_config(origin), torch.float32).eval()
    loaded = LoadedModel(model, None, "tiny", origin)
    export_loaded(loaded, tmp_path / "bundle", ExportConfig(2, 8, chunk_size=4))
    if name == "stablelm-12b":  # two heads' norms in the other order
        norm = made.tensors["blk.1.attn_q_norm.weight"]
        norm[[0, 1]] = norm[[1, 0]]
    else:
        made.tensors["blk.1.attn_k.bias"] = np.full(KV_HEADS * HEAD, 0.1, np.float32)
    other = locate(str(write(tmp_path / "other.gguf", made)))
    with pytest.raises(UsageError, match=r"blk\.1\.attn_[qk]"):
        export_loaded(LoadedModel(model, None, "tiny", other), tmp_path / "b", ExportConfig(2, 8, chunk_size=4))


def test_a_bias_that_is_nowhere_in_the_file_is_refused(tmp_path: Path) -> None:
    """Where it is not zero."""
    origin = locate(str(write(tmp_path / "tiny.gguf", FAMILIES["qwen2-without-biases"][0]())))
    model = load_gguf(origin, gguf_config(origin), torch.float32).eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias[3] = 0.1
    with pytest.raises(UsageError, match=r"not of the file.*layers\.1\.self_attn"):
        export_loaded(LoadedModel(model, None, "t", origin), tmp_path / "b", ExportConfig(2, 8, chunk_size=1))


@pytest.mark.slow
def test_smollm2_is_that_of_transformers_loader() -> None:
    """Bit for bit: nothing of this model is among what that loader drops."""
    import transformers

    path = smollm2_file()
    origin = locate(str(path))
    ours = load_gguf(origin, gguf_config(origin), torch.float32).state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
