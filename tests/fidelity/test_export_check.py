"""Nothing is written that `verify` would fail: the finished graphs are compared with the model first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.families.refusals import MAX_TEXT, one_line, refusing
from sinkexport.pipeline import export as pipeline
from sinkexport.pipeline.check_export import MAX_STREAMED_TOKENS, UncheckedWarning, check_export
from sinkexport.pipeline.export import export_loaded
from sinkexport.pipeline.judge import correlations
from sinkexport.quant.recipe import load_recipe
from sinkexport.reference.mid_stream import logits_from, typical_sizes
from sinkexport.reference.streaming import streaming_reference
from sinkexport.sources import LoadedModel
from sinkrt import Session
from sinkrt.contract import load_manifest
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import COMMON, random_model, tiny_model
from tests.support import export_model, random_ids, refused, run_cli

S, W = 4, 12
C = S + W
DIFFERS = "the exported graph differs from the model"


class ElseInTheGraph(torch.nn.Module):
    """An MLP that the tracer sees otherwise than it runs, by a factor."""

    def __init__(self, inner: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y * self.factor if torch.compiler.is_compiling() else y


def exported(model: Any, folder: Path, **config: Any) -> Path:
    """A bundle that was compared with nothing."""
    export_model(model, folder, num_sink_tokens=S, window_size=W, **config, check=False)
    return folder


def check(folder: Path, model: Any) -> None:
    check_export(folder, load_manifest(folder), model)


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_graph_that_differs_is_not_written(factor: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = ElseInTheGraph(model.model.layers[1].mlp, factor)
    loaded = LoadedModel(model, None, "x")
    with pytest.raises(UsageError, match=DIFFERS):
        export_loaded(loaded, tmp_path / "out", ExportConfig(S, W))
    assert list(tmp_path.iterdir()) == []
    export_loaded(loaded, tmp_path / "out", ExportConfig(S, W), check=False)
    assert (tmp_path / "out" / "manifest.json").is_file()


HEALTHY: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("llama-tied", {"batch": 3, "chunk_size": 5}),
    "linear attention": ("qwen3_next", {"batch": 2}),
    "alibi": ("bloom", {"batch": 2}),
    "half": ("gpt_oss", {"dtype": "fp16"}),
    "int8 window": ("gemma3_text", {"kv": "int8", "batch": 2}),
    "int4": ("llama", {"recipe": "int4-nearest"}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_right_graph_passes_and_a_wrong_layer_does_not(name: str, tmp_path: Path) -> None:
    family, config = HEALTHY[name]
    config = {**config, **({"recipe": load_recipe(config["recipe"])} if "recipe" in config else {})}
    model = tiny_model(family, dtype=torch.float16 if config.get("dtype") == "fp16" else torch.float32)
    bundle = exported(model, tmp_path / "bundle", **config)
    check(bundle, model)
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    with torch.no_grad():
        # Of a float graph a small change must show, of a rounded one a layer that is not the model's.
        for parameter in layers[1].parameters():
            if config.get("recipe") is None and "kv" not in config:
                parameter *= 1.5 if parameter.dtype == torch.float16 else 1.01
            else:
                parameter.copy_(torch.randn_like(parameter))
    with pytest.raises(UsageError, match=DIFFERS):
        check(bundle, model)


def test_a_chunk_that_differs_is_found_though_steps_do_not(tmp_path: Path) -> None:
    """The two graphs are swapped for those of two models, as a fault in one trace would be."""

    class ElseInChunks(ElseInTheGraph):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y * self.factor if torch.compiler.is_compiling() and x.shape[1] > 1 else y

    model = tiny_model("llama")
    model.model.layers[0].mlp = ElseInChunks(model.model.layers[0].mlp, 1.02)
    with pytest.raises(UsageError, match=f"{DIFFERS}.* as a chunk"):
        export_model(model, tmp_path / "out", num_sink_tokens=S, window_size=W, chunk_size=6)


@pytest.mark.parametrize("name", ["gemma3_text", "glm", "phi3-partial", "gpt_oss", "bloom"])
def test_the_middle_of_a_stream(name: str, tmp_path: Path) -> None:
    """From a running bundle's caches, one pass gives what the streaming reference gives token by token."""
    model = tiny_model(name)
    bundle = exported(model, tmp_path / "bundle", chunk_size=1)
    ids = random_ids(1, 2 * C + 9)
    start, count = 2 * C + 2, 1 if name == "bloom" else 7
    with streaming_reference(model, S, W) as reference:
        want = [reference.step(torch.from_numpy(column)) for column in ids[:, : start + count].T][start:]
    with Session.load(bundle, threads=1) as session:
        session.prefill(ids[:, :start])
        kept = session.copy_stream(0).states
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for state in load_manifest(bundle).states:
        layers.setdefault(state.layer, {})[state.kind] = torch.from_numpy(kept[state.input])[None]
    new = torch.from_numpy(ids[:, start : start + count])
    got = logits_from(model, new, start, layers)
    spread = float(got.std())
    assert float((got[0] - torch.cat(want)).abs().max()) < 1e-4 * spread
    rotates = name != "bloom"
    assert not rotates or float((logits_from(model, new, start + 1, layers) - got).abs().max()) > 1e-2 * spread
    layers[1]["sink_k" if "sink_k" in layers[1] else "window_k"] *= 1.1
    assert float((logits_from(model, new, start, layers) - got).abs().max()) > 1e-3 * spread


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-alibi"])
def test_large_caches_are_compared_in_the_middle_of_a_stream(name: str, tmp_path: Path) -> None:
    """Where a cache takes too many steps to fill."""
    model = tiny_model(name)
    config = ExportConfig(S, MAX_STREAMED_TOKENS, chunk_size=8, kv="int8" if name == "gemma2" else None)
    export_model(model, tmp_path / "bundle", config)


def test_large_caches_are_streamed_where_random_ones_do_not_fit(tmp_path: Path) -> None:
    """Keys and values of latent attention are one row."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    model = random_model(transformers.MiniCPM3Config(**{**COMMON, "num_key_value_heads": 6}, **sizes))
    config = ExportConfig(S, MAX_STREAMED_TOKENS, chunk_size=8)
    export_model(model, tmp_path / "bundle", config, check=False)
    check(tmp_path / "bundle", model)
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight *= 1.05
    with pytest.raises(UsageError, match=DIFFERS):
        check(tmp_path / "bundle", model)


def test_typical_sizes_are_those_of_keys_and_values() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    before = typical_sizes(model, ids)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 8
    after = typical_sizes(model, ids)
    assert after[1][1] == pytest.approx(8 * before[1][1], rel=1e-4)
    assert after[0] == before[0]


def test_graphs_for_plugins_are_said_not_to_be_compared(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float16, head_dim=64).save_pretrained(tmp_path / "model")
    with pytest.warns(UncheckedWarning, match="TensorRT plugin"):
        pipeline.export(str(tmp_path / "model"), tmp_path / "a", ExportConfig(S, W, dtype="fp16", target="tensorrt"))
    options = ("--window", 9, "--dtype", "fp16", "--target", "tensorrt")
    result = run_cli("export", tmp_path / "model", "-o", tmp_path / "b", *options)
    result.succeeded()
    assert "warning: the graphs were not compared with the model: they need the TensorRT plugin" in result.err


def test_the_option_leaves_the_comparison_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UsageError(DIFFERS)

    monkeypatch.setattr(Session, "load", refuse)  # which the comparison begins with
    tiny_model("llama").save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--window", "9"]
    result = run_cli(*command)
    result.refusal()
    assert not (tmp_path / "out").exists()
    assert run_cli(*command, "--no-check").code == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_correlations() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 3, 500))
    np.testing.assert_allclose(correlations(2 * rows + 1, rows), 1)
    np.testing.assert_allclose(correlations(-rows, rows), -1)
    assert np.abs(correlations(rows[:1], rows[1:])).max() < 0.2
    assert np.isnan(correlations(rows * np.nan, rows)).all()
    assert not correlations(np.zeros_like(rows), rows).any()


def test_errors_in_one_line() -> None:
    assert one_line(ValueError("\n  a\tb \n c")) == "a b"
    assert one_line(ValueError()) == "no message"
    assert len(one_line(ValueError("x" * 1000))) == MAX_TEXT


def test_what_the_tracer_prints_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"model family 'llama': received KeyError while tracing \('x'\)") as caught:  # noqa: SIM117
        with refusing(tiny_model("llama"), "tracing"):
            print("a whole graph")
            raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
    assert capsys.readouterr().out == ""


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = model(ids).logits
        export_model(model, tmp_path / "out", num_sink_tokens=S, window_size=W)
        assert torch.equal(model(ids).logits, want)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_experts_that_an_int8_window_chooses_otherwise_are_no_fault(tmp_path: Path) -> None:
    """Rounded keys change what a router chooses at one position of these, and its logits by more than their spread."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32}
    common = {name: value for name, value in COMMON.items() if name not in ("intermediate_size", "num_hidden_layers")}
    sizes = {**common, **sizes, **experts, "num_key_value_heads": 6, "num_layers": 2, "head_dim": 8}
    model = random_model(transformers.LongcatFlashConfig(**sizes, ffn_hidden_size=64))
    export_model(model, tmp_path / "bundle", num_sink_tokens=2, window_size=16, chunk_size=4, kv="int8")


def test_an_int8_window_that_a_model_amplifies_is_no_fault(tmp_path: Path) -> None:
    """Rounding moves logits of this one by 1.2 of their spread; a reference that rounds alike is 0.02 off."""
    model = tiny_model("zamba2")
    config = ExportConfig(5, 100, chunk_size=1, kv="int8")
    export_model(model, tmp_path / "bundle", config)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "v_proj" in name).mul_(1.5)
    with refused("the exported graph differs from the model", error=UsageError):
        check_export(tmp_path / "bundle", load_manifest(tmp_path / "bundle"), model)
