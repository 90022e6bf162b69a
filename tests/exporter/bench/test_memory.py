"""Memory: of a bundle read off its files, of a model counted from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers
from onnx import TensorProto, helper
from sinkexport.bench.memory import ModelShape, bundle_memory, live_bytes
from sinkexport.config import ExportConfig
from sinkexport.quant.recipe import load_recipe
from sinkrt.errors import UsageError

from tests.exporter.graph.test_plugin_target import wide_model
from tests.exporter.tiny_models import COMMON, tiny_model
from tests.runtime.toy import Toy, build_toy, toy_manifest
from tests.support import export_model, refused, run_cli

S, W, B, T = 3, 9, 2, 4
PAGE = 4096  # large weights start on one


def test_values_that_are_alive_at_once(tmp_path: Path) -> None:
    """a [100] and b [200] make c [300]; then d [50] is made of c, when a and b are gone. Logits stay to the end."""

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [size])

    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Concat", ["x", "x"], ["b"], axis=0),
        helper.make_node("Concat", ["a", "b"], ["c"], axis=0),
        helper.make_node("Relu", ["c"], ["logits"]),
        helper.make_node("Relu", ["logits"], ["window_k.0.next"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", 100)],
        [value("logits", 300), value("window_k.0.next", 300)],
        value_info=[value("a", 100), value("b", 200), value("c", 300)],
    )
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    manifest = toy_manifest_of(tmp_path)
    assert live_bytes(tmp_path / "g.onnx", manifest) == 4 * (100 + 200 + 300)


def toy_manifest_of(folder: Path) -> Any:
    from sinkrt.contract import FileFacts

    return toy_manifest(Toy(), None, {"decode.onnx": FileFacts(0, "0" * 64)})


@pytest.mark.parametrize(
    ("name", "options"),
    [("gemma2", {}), ("llama-tied", {"kv": "int8"}), ("qwen2", {"recipe": "int8-channel"})],
    ids=str,
)
def test_what_is_counted_is_what_is_written(name: str, options: dict[str, str], tmp_path: Path) -> None:
    """Weights and cache of a configuration against the bundle of the whole model; gemma2 has windows of its own."""
    model = wide_model(name, "fp16")
    model.config.save_pretrained(tmp_path / "config")
    recipe = load_recipe(options["recipe"]) if "recipe" in options else None
    own_window = getattr(model.config, "sliding_window", None)
    window = W if own_window is None else own_window + 5
    config = ExportConfig(S, window, B, "fp16", T, target="tensorrt", kv=options.get("kv"), recipe=recipe)
    manifest = export_model(model, tmp_path / "b", config).manifest
    found = bundle_memory(tmp_path / "b", manifest)
    weights = "int8" if recipe else "float"
    counted = ModelShape.load(str(tmp_path / "config")).memory(
        S, window, B, T, dtype="fp16", weights=weights, kv=options.get("kv", "fp")
    )
    assert (counted.sinks, counted.window) == (found.sinks, found.window)
    assert found.window + found.sinks == manifest.state_bytes
    pages = PAGE * (len(list(model.parameters())) + 1)
    assert counted.weights <= found.weights + PAGE <= counted.weights + 2 * pages
    assert found.total == found.weights + found.sinks + found.window + found.values


def test_the_table_of_a_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)  # no weights
    done = run_cli("inspect", tmp_path, "--memory", "--window", 20, "--window", 40, "--sink-tokens", 2, "--json")
    done.succeeded()
    rows = json.loads(done.out)
    assert [(row["dtype"], row["weights_dtype"], row["kv"], row["window_size"]) for row in rows[:3]] == [
        ("fp32", "float", "fp", 20),
        ("fp32", "float", "fp", 40),
        ("fp16", "float", "fp", 20),
    ]
    assert rows[0]["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert rows[1]["window"] == 2 * rows[0]["window"]
    shown = run_cli("inspect", tmp_path, "--memory").out
    assert "4 + 1020" in shown
    assert "int8" in shown


def test_the_table_of_a_bundle(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "b")
    done = run_cli("inspect", bundle, "--memory", "--json")
    done.succeeded()
    memory = json.loads(done.out)
    toy = Toy()
    assert memory["window"] == 2 * 4 * toy.num_kv_heads * toy.window_size * toy.head_dim
    assert np.isclose(memory["total"], sum(memory[f] for f in ("weights", "sinks", "window", "values")))
    assert "all, forever" in run_cli("inspect", bundle, "--memory").out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("BUNDLE", "--memory", "--window", 5), "a bundle has its own"),
        (("BUNDLE", "--window", 5), "without --memory"),
        (("nowhere/at/all", "--memory"), "no such folder"),
    ],
)
def test_what_cannot_be_shown(words: tuple[Any, ...], problem: str, tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "b")
    done = run_cli("inspect", *(bundle if word == "BUNDLE" else word for word in words))
    done.refusal(problem)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rwkv", "heads of different sizes, or not one attention each"),
        ("kimi_linear", "latent attention"),
        ("zaya", "recurrent layers"),
        ("falcon_h1", "layers of hybrid"),
    ],
)
def test_caches_that_a_configuration_does_not_say(name: str, reason: str, tmp_path: Path) -> None:
    tiny_model(name).config.save_pretrained(tmp_path)
    run_cli("inspect", tmp_path, "--memory").refusal(reason, "export it, then inspect the bundle")


@pytest.mark.parametrize("name", ["diffllama", "gemma4", "mixtral"])
def test_only_uneven_layers_are_refused(name: str, tmp_path: Path) -> None:
    """Their configuration does not say what each layer keeps: an estimate would be wrong."""
    uneven = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "global_head_dim": 16}
    config_class, changes = {
        "diffllama": (transformers.DiffLlamaConfig, {}),
        "gemma4": (transformers.Gemma4TextConfig, {"head_dim": 8, **uneven}),
        "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    }[name]
    config_class(**{**COMMON, **changes}).save_pretrained(tmp_path)
    if name == "mixtral":
        assert ModelShape.load(str(tmp_path)).head_dim == 8
        return
    with refused("heads of different sizes, or not one attention each", error=UsageError):
        ModelShape.load(str(tmp_path))
