"""What cannot be exported exactly is refused with the reason, and nothing half-written is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.families import REFUSED as LISTED_AS_REFUSED
from sinkexport.families import Family, refusal_of_config
from sinkexport.pipeline.export import export, export_loaded
from sinkexport.sources import LoadedModel, load_model
from sinkrt import UsageError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.exporter.tiny_models import tiny_model
from tests.support import export_model

_SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}

REFUSED = {
    "gpt2": (transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4), "absolute position"),
    "opt": (transformers.OPTConfig(**_SMALL, ffn_dim=32, word_embed_proj_dim=32), "absolute position"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_that_are_not_exact(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match=reason):
        export_model(model, tmp_path / "out", num_sink_tokens=2, window_size=6, name=name)
    assert list(tmp_path.iterdir()) == []


def test_encoder_decoder_is_refused_from_its_configuration(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=50, d_model=32, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match="encoder-decoder"):
        load_model(str(tmp_path / "t5"))


@pytest.mark.parametrize("family", LISTED_AS_REFUSED, ids=lambda family: family.family)
def test_listed_families_are_refused_from_their_configuration(family: Family) -> None:
    # Some have no configuration without arguments; what is read of it is its name.
    config = types.SimpleNamespace(model_type=family.family, is_encoder_decoder=False)
    assert refusal_of_config(config) == family.reason
    assert family.family.removesuffix("_decoder") in CONFIG_MAPPING_NAMES


def test_unknown_arguments_of_attention(tmp_path: Path) -> None:
    """Refused by what attention receives, even if the table of families did not list it."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def with_bias(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs, relative_bias=torch.zeros(6))

    attention.forward = with_bias
    with pytest.raises(UsageError, match="relative_bias"):
        export_model(model, tmp_path / "out", num_sink_tokens=2, window_size=6)


def test_positions_read_elsewhere(tmp_path: Path) -> None:
    model = tiny_model("llama")

    class Shifted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.config = inner.config
            self.positions = torch.nn.Embedding(512, 48)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
            embedded = self.inner.model.embed_tokens(input_ids) + self.positions(position_ids)
            return self.inner(inputs_embeds=embedded, position_ids=position_ids, **kwargs)

        def set_attn_implementation(self, name: str) -> None:
            self.inner.set_attn_implementation(name)

    with pytest.raises(UsageError, match="outside the rotary embedding"):
        export_model(Shifted(model), tmp_path / "out", num_sink_tokens=2, window_size=6)
    assert list(tmp_path.iterdir()) == []


def test_sinks_that_no_layer_would_keep(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    with pytest.raises(UsageError, match=r"sliding window.*at most 64 tokens"):
        export_model(model, tmp_path / "out", num_sink_tokens=4, window_size=61)


def test_chunk_past_the_smallest_window(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    with pytest.raises(UsageError, match="at most 5, the smallest window"):
        export_model(model, tmp_path / "out", num_sink_tokens=4, window_size=12, chunk_size=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export_model(model, tmp_path / "out", num_sink_tokens=2, window_size=6)


def test_a_model_that_transformers_cannot_run_is_said_to_be_so(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.gate.top_k = 99
    with pytest.raises(UsageError, match=r"when transformers runs it, .*config\.json"):
        export_model(model, tmp_path / "out", num_sink_tokens=2, window_size=6)


def test_frequencies_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq[1] = float("inf")
    with pytest.raises(UsageError, match=r"NaN or Inf.*rope_parameters"):
        export_model(model, tmp_path / "out", num_sink_tokens=2, window_size=6)


@pytest.mark.parametrize(
    "bad",
    [
        {"window_size": 0},
        {"num_sink_tokens": -1},
        {"batch": 0},
        {"dtype": "bf16"},
        {"window_size": 2.5},
        {"chunk_size": 0},
        {"chunk_size": 13, "window_size": 12},
        {"chunk_size": True},
    ],
)
def test_bad_geometry(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"received .* expected .*; (change|lower) --"):
        ExportConfig(**bad)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./missing.gguf", "missing.gguf"])
def test_missing_sources(source: str) -> None:
    with pytest.raises(UsageError, match="model: received"):
        load_model(source)


def test_output_that_is_taken(tmp_path: Path) -> None:
    loaded = LoadedModel(tiny_model("llama"), None, "x")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a bundle"):
        export_loaded(loaded, tmp_path, ExportConfig(2, 6, chunk_size=1), overwrite=True)
    export_loaded(loaded, tmp_path / "out", ExportConfig(2, 6, chunk_size=1))
    with pytest.raises(UsageError, match="--overwrite"):
        export_loaded(loaded, tmp_path / "out", ExportConfig(2, 7, chunk_size=1))
    export_loaded(loaded, tmp_path / "out", ExportConfig(2, 7, chunk_size=1), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _export_command(model: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "sinkexport.cli", "export", str(model), "-o", str(out), "--window", "12"]


@pytest.mark.slow
def test_full_disk_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a full disk: the write of the weights fails in the middle."""
    out = tmp_path / "out" / "bundle"
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); \
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); \
sys.argv = {_export_command(tiny_folder, out)[2:]!r}; runpy.run_module('sinkexport.cli', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "file size limit" in done.stderr
    assert not out.exists()
    assert list(out.parent.iterdir()) == []


def test_an_interrupt_that_strikes_inside_a_finalizer_comes_again() -> None:
    program = """
import os, signal, sys, time
from sinkexport.cli import _recorded_interrupts

class Struck:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))

seen = _recorded_interrupts()
try:
    Struck()
    time.sleep(60)
    print("slept on")
except KeyboardInterrupt:
    print("interrupted,", len(seen), "times")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert (done.stdout, done.stderr) == ("interrupted, 2 times\n", "")


@pytest.mark.slow
def test_interrupted_export_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "bundle"
    process = subprocess.Popen(_export_command(tiny_folder, out), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out.parent.exists() and any(out.parent.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.005)  # until the temporary folder is there
    while process.poll() is None and time.monotonic() < deadline + 60:
        os.kill(process.pid, signal.SIGINT)  # again and again, as a user would: one may strike inside a finalizer
        time.sleep(2.0)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1] == "sinkexport: error: interrupted"
    assert "Traceback" not in stderr
    assert not out.exists()
    assert list(out.parent.iterdir()) == []


def test_model_folder_without_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    manifest = export(str(tiny_folder), tmp_path / "bundle", ExportConfig(2, 6))
    assert manifest.tokenizer is None
