"""Calibration: histograms and ranges against NumPy, files that are refused, runs that are cut short, smoothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sinkexport.calibration import calibrate as calibration
from sinkexport.calibration import histogram
from sinkexport.calibration.file import CalibrationFile, fingerprint, load_calibration
from sinkexport.calibration.observers import REST, SINKS, ChannelMaxima, Histograms
from sinkexport.calibration.pieces import choose_pieces
from sinkexport.calibration.smoothing import attention_outputs, smoothing
from sinkexport.calibration.spans import chosen_range
from sinkexport.calibration.stream_inputs import StreamConfig, input_groups, stream_inputs
from sinkexport.config import ExportConfig
from sinkexport.graph.passes.fold_constants import SMALL_ELEMENTS
from sinkexport.model.moe_layers import routers
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import Calibration, Recipe, load_recipe, parse_recipe
from sinkexport.sources import LoadedModel
from sinkexport.tensorrt.builder import build_engine
from sinkrt import Session
from sinkrt.errors import UsageError

from tests.exporter.calibration.test_stream_inputs import Everything
from tests.exporter.tensorrt.test_builder import needs_tensorrt
from tests.exporter.tiny_models import tiny_model, tiny_tokenizer
from tests.support import random_ids, run_cli

SMALL = {"method": "minmax", "samples": 3, "length": 40, "sink_tokens": 2, "window": 6}
TEXT = " ".join(f"w{i}" for i in random_ids(600, seed=7))


def recipe(**changes: Any) -> Recipe:
    return parse_recipe(
        {**load_recipe("int8-smooth").model_dump(exclude_none=True), "calibration": SMALL, **changes}, "recipe 'test'"
    )


def calibrate(*arguments: Any, **keywords: Any) -> CalibrationFile:
    return calibration.calibrate(*arguments, **keywords).facts


def tiny(name: str = "llama", **arguments: Any) -> LoadedModel:
    return LoadedModel(tiny_model(name, **arguments), tiny_tokenizer(), "tiny")


# --- histograms and ranges ---


def values_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(20_000).astype(np.float32)
    if kind == "laplace":
        return rng.laplace(size=20_000).astype(np.float32)
    return np.concatenate([rng.standard_normal(20_000), rng.standard_normal(20) * 60]).astype(np.float32)  # outliers


KINDS = ["normal", "laplace", "outliers"]


def test_every_value_is_in_its_bin() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(5000) * 10.0 ** rng.uniform(-6, 9, 5000)).astype(np.float32)
    edges = histogram.edges()
    want, _ = np.histogram(np.abs(values.astype(np.float64)), edges)
    np.testing.assert_array_equal(histogram.count(values), want)
    assert (np.diff(edges) > 0).all()
    assert (np.diff(edges)[1:] / edges[1:-1] <= 1 / 256).all()
    extreme = histogram.count(np.array([0.0, -0.0, 1e-30, 3e38, -3e38], np.float32))
    assert extreme[0] == 3
    assert extreme[-1] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_percentiles(kind: str, percent: float) -> None:
    values = np.abs(values_of(kind, np.random.default_rng(1)))
    got = histogram.percentile(histogram.count(values), float(values.max()), percent)
    assert (values <= got).mean() >= percent / 100
    exact = np.percentile(values, percent, method="inverted_cdf")
    assert exact <= got <= exact * (1 + 1 / 256)


@pytest.mark.parametrize("kind", KINDS)
def test_least_squared_error_is_that_of_the_values_themselves(kind: str) -> None:
    values = values_of(kind, np.random.default_rng(2)).astype(np.float64)
    highest = float(np.abs(values).max())

    def error(bound: float) -> float:
        step = bound / 127
        return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).sum())

    errors = [error(bound) for bound in histogram.candidates(highest)]
    got = histogram.least_squared_error(histogram.count(values.astype(np.float32)), highest)
    assert error(got) <= 1.02 * min(errors)
    assert error(highest) > 1.05 * error(got) or kind == "normal"
    counts = histogram.count(values.astype(np.float32))
    used = np.flatnonzero(counts)
    for bound, exact in list(zip(histogram.candidates(highest), errors, strict=True))[::20]:
        estimate = histogram.squared_error(counts[used], histogram.edges()[used], histogram.edges()[used + 1], bound)
        assert abs(estimate - exact) < 0.05 * exact


def brute_divergence(values: np.ndarray, bound: float) -> float:
    """KL divergence of 2,048 bins from the same in 128 levels, as written down for 8-bit inference, bin by bin."""
    inside, _ = np.histogram(values[values <= bound], 2048, (0.0, bound))
    p = inside.astype(np.float64)
    p[-1] += (values > bound).sum()
    q = np.zeros(2048)
    for level in range(128):
        part = slice(16 * level, 16 * level + 16)
        filled = inside[part] > 0
        if filled.any():
            q[part][filled] = inside[part].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / max(b, np.finfo(np.float64).tiny)) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("kind", KINDS)
def test_least_divergence(kind: str) -> None:
    values = np.abs(values_of(kind, np.random.default_rng(3))).astype(np.float64)
    highest = float(values.max())
    for bound in (highest, highest / 2, highest / 7):
        inside, _ = np.histogram(values[values <= bound], 2048, (0.0, bound))
        got = histogram.divergence(inside.astype(np.float64), len(values))
        assert abs(got - brute_divergence(values, bound)) < 1e-9 * max(1.0, got)
    # Within a bin of the histogram values are taken to be alike, which smooths the counts that are compared.
    got = histogram.least_divergence(histogram.count(values.astype(np.float32)), highest)
    smooth_counts = np.concatenate([[0.0], np.cumsum(histogram.count(values.astype(np.float32)))])

    def smoothed(bound: float) -> float:
        cuts = np.interp(np.linspace(0, bound, 2049), histogram.edges(), smooth_counts)
        return histogram.divergence(np.diff(cuts), len(values))

    assert smoothed(got) == min(smoothed(bound) for bound in histogram.candidates(highest))
    assert smoothed(got) < smoothed(highest / 100)
    assert (values > got).mean() < 0.02


def test_methods_go_by_name_and_nothing_but_zeros_is_no_trouble() -> None:
    counts = histogram.count(np.zeros(10, np.float32))
    for method in ("minmax", "entropy", "mse"):
        assert chosen_range(counts, 0.0, Calibration(method=method, samples=1, length=2)) == 0.0  # type: ignore[arg-type]
    values = values_of("outliers", np.random.default_rng(4))
    counts, top = histogram.count(values), float(np.abs(values).max())
    asked = {
        "minmax": top,
        "mse": histogram.least_squared_error(counts, top),
        "entropy": histogram.least_divergence(counts, top),
    }
    for method, want in asked.items():
        assert chosen_range(counts, top, Calibration(method=method, samples=1, length=2)) == want  # type: ignore[arg-type]
    asked_percentile = Calibration(method="percentile", percentile=99.0, samples=1, length=2)
    assert chosen_range(counts, top, asked_percentile) == histogram.percentile(counts, top, 99.0)
    assert len({*asked.values(), histogram.percentile(counts, top, 99.0)}) == 4


def test_observers_are_numpy_of_all_that_was_seen() -> None:
    model, pieces = tiny_model("llama"), random_ids(2, 25)
    groups = input_groups(model)
    divisors = {"model.layers.0.mlp.gate_proj": np.random.default_rng(0).uniform(0.5, 2, 48).astype(np.float32)}
    everything, maxima, histograms = Everything(), ChannelMaxima(), Histograms(divisors)
    stream_inputs(model, pieces, StreamConfig(3, 5, chunk_tokens=4), [everything, maxima, histograms])
    assert set(maxima.maxima) == set(groups)
    for name in groups:
        inputs = everything.all(name).numpy()
        sinks = torch.cat(everything.is_sink[name]).numpy()
        assert sinks.sum() == 6
        divided = inputs / divisors.get(name, np.float32(1))
        for kind, rows in ((REST, ~sinks), (SINKS, sinks)):
            np.testing.assert_array_equal(maxima.maxima[name][kind], np.abs(inputs[rows]).max(axis=0))
            np.testing.assert_array_equal(histograms.counts[name][kind], histogram.count(divided[rows]))
            assert histograms.highest[name][kind] == np.abs(divided[rows]).max()


# --- the calibrator ---


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi", "gemma2"])
def test_ranges_and_divisors_are_those_of_the_inputs(name: str) -> None:
    loaded, asked = tiny(name), recipe(smooth={"alpha": 0.7})
    found = calibrate(loaded, asked, TEXT)
    everything = Everything()
    assert asked.calibration is not None
    pieces, num_tokens = choose_pieces(loaded.text_tokenizer(), TEXT, asked.calibration)
    assert (num_tokens, pieces.shape) == (600, (3, 40))
    stream_inputs(loaded.model, pieces, StreamConfig(2, 6), [everything])
    attention = attention_outputs(loaded.model, input_groups(loaded.model))
    assert len(attention) == 2  # one in each layer
    for facts in found.inputs:
        first = facts.modules[0]
        x = everything.all(first).double().numpy()
        sinks = torch.cat(everything.is_sink[first]).numpy()
        top = np.abs(x[~sinks]).max(axis=0)
        np.testing.assert_allclose(facts.channels, top, rtol=1e-5)
        weights = [loaded.model.get_submodule(module).weight.detach().abs() for module in facts.modules]
        weight = torch.cat(weights).amax(dim=0).numpy()
        if first in attention:
            heads = loaded.model.config.num_attention_heads
            shared = heads // getattr(loaded.model.config, "num_key_value_heads", heads)
            top, weight = (
                v.reshape(heads // shared, shared, -1).max(1, keepdims=True).repeat(shared, 1).reshape(-1)
                for v in (top, weight)
            )
        want = top**0.7 / weight**0.3
        want /= np.exp(np.log(want).mean())
        np.testing.assert_allclose(facts.divisors, want, rtol=1e-4)
        divided = np.abs(x / np.array(facts.divisors))
        assert facts.rest.range == facts.rest.highest == pytest.approx(divided[~sinks].max(), rel=1e-5)
        assert facts.sinks is not None
        assert facts.sinks.range == pytest.approx(divided[sinks].max(), rel=1e-5)
        assert facts.all.range == pytest.approx(divided.max(), rel=1e-5)


def test_a_file_comes_back_as_it_was_and_is_the_same_each_time(tmp_path: Path) -> None:
    found = calibrate(tiny(), recipe(), TEXT)
    assert calibrate(tiny(), recipe(), TEXT).to_json() == found.to_json()
    (tmp_path / "c.json").write_text(found.to_json(), encoding="utf-8")
    assert load_calibration(tmp_path / "c.json") == found
    assert load_calibration(tmp_path / "c.json").sha256 == found.sha256
    other = calibrate(tiny(), recipe(calibration={**SMALL, "seed": 1}), TEXT)
    assert other.inputs != found.inputs


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"smooth": None}], ids=["smoothed", "plain"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    raw = {k: v for k, v in recipe().model_dump(exclude_none=True).items() if k not in changes}
    asked = parse_recipe({**raw, "calibration": {**SMALL, "method": "entropy"}}, "recipe 'test'")
    want = calibrate(tiny(), asked, TEXT).to_json()
    partial = tmp_path / "c.partial"
    stages: list[tuple[str, int]] = []

    def killed_soon(stage: str, done: int, _total: int) -> None:
        stages.append((stage, done))
        if done and len(stages) > 3:
            raise _KilledError

    attempts = 0
    for attempts in range(1, 20):
        stages.clear()
        try:
            got = calibrate(tiny(), asked, TEXT, partial=partial, report=killed_soon).to_json()
            break
        except _KilledError:
            assert partial.exists() or attempts == 1
    assert attempts >= (2 if changes else 4)
    assert got == want
    # What another calibration has left behind is not taken for one's own, nor is a damaged file.
    other = parse_recipe({**raw, "calibration": {**SMALL, "method": "entropy", "seed": 5}}, "recipe 'test'")
    assert calibrate(tiny(), other, TEXT, partial=partial).to_json() == calibrate(tiny(), other, TEXT).to_json()
    partial.write_bytes(partial.read_bytes()[:1000])
    assert calibrate(tiny(), asked, TEXT, partial=partial).to_json() == want


def saved(folder: Path, name: str = "llama", **arguments: Any) -> Path:
    tiny_model(name, **arguments).save_pretrained(folder)
    tiny_tokenizer().save(folder)
    return folder


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(recipe(**changes).model_dump(exclude_none=True)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_command_survives_a_kill(tmp_path: Path) -> None:
    model, out = saved(tmp_path / "m"), tmp_path / "c.json"
    (tmp_path / "t.txt").write_text(" ".join([TEXT] * 5), encoding="utf-8")
    asked = write_recipe(tmp_path / "r.yaml", calibration={**SMALL, "samples": 60})
    arguments = ["calibrate", str(model), "--recipe", str(asked), "--text", str(tmp_path / "t.txt"), "-o", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "sinkexport.cli", *arguments, "--threads", "1"])
    partial = tmp_path / "c.json.partial"
    deadline = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists()
    assert not out.exists()
    result = run_cli(*arguments)
    result.succeeded()
    assert "tokens/s" in result.out
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["c.json", "r.yaml", "t.txt"]
    again = run_cli(*arguments[:-1], tmp_path / "d.json")
    again.succeeded()
    assert (tmp_path / "d.json").read_bytes() == out.read_bytes()


def test_inspect_shows_a_file(tmp_path: Path) -> None:
    found = calibrate(tiny(), recipe(), TEXT)
    (tmp_path / "c.json").write_text(found.to_json(), encoding="utf-8")
    shown = run_cli("inspect", tmp_path / "c.json")
    assert "model.layers.1.self_attn.{q_proj,k_proj,v_proj}" in shown.out
    assert "2 sinks + window of 6" in shown.out
    for facts in found.inputs:
        assert f"{facts.rest.range:.4g}" in shown.out
    raw = run_cli("inspect", tmp_path / "c.json", "--json")
    assert raw.out == found.to_json()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text[: len(text) // 2], "no JSON, or cut short"),
        (lambda _: '{"a": 1}', "something else"),
        (lambda _: "[1]", "something else"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "format version 9"),
        (lambda text: text.replace('"highest": ', '"highest": -', 1), "inputs.0.rest.highest"),
        (lambda text: text.replace('"divisors": [', '"divisors": [0.5, ', 1), "a divisor > 0 for each channel"),
        (lambda text: text.replace('"tokens": ', '"tokenz": ', 1), "text.tokens: Field required"),
    ],
)
def test_damaged_and_foreign_files_are_refused(damage: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(damage(calibrate(tiny(), recipe(), TEXT).to_json()), encoding="utf-8")
    with pytest.raises(UsageError) as failure:
        load_calibration(path)
    assert problem in str(failure.value)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe 'int8-weights': received no calibration in it"):
        calibrate(tiny(), load_recipe("int8-weights"), TEXT)
    with pytest.raises(UsageError, match="text: received 600 tokens, expected 16 pieces of 40 tokens"):
        calibrate(tiny(), recipe(calibration={**SMALL, "samples": 16}), TEXT)
    with pytest.raises(UsageError, match="one without a tokenizer"):
        calibrate(LoadedModel(tiny_model("llama"), None, "tiny"), recipe(), TEXT)
    broken = tiny()
    broken.model.model.layers[1].post_attention_layernorm.weight.data[2] = torch.inf
    with pytest.raises(UsageError, match=r"inputs of 'model\.layers\.1\.mlp\.gate_proj': .*NaN or Inf at position 0"):
        calibrate(broken, recipe(), TEXT, partial=tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    model, out = str(saved(tmp_path / "m")), tmp_path / "c.json"
    text, short = tmp_path / "t.txt", tmp_path / "s.txt"
    text.write_text(TEXT, encoding="utf-8")
    short.write_text("w3 w4", encoding="utf-8")
    asked = str(write_recipe(tmp_path / "r.yaml"))
    before = sorted(tmp_path.rglob("*"))
    for options, problem in (
        (["--recipe", "int9", "--text", str(text)], "recipe: received 'int9'"),
        (["--recipe", "int8-weights", "--text", str(text)], "received no calibration in it"),
        (["--recipe", asked, "--text", str(short)], "text: received 2 tokens"),
        (["--recipe", asked, "--text", str(tmp_path / "none")], "expected a readable file"),
    ):
        run_cli("calibrate", model, *options, "-o", out).refusal(problem)
    run_cli("calibrate", model, "--recipe", asked, "--text", text, "-o", tmp_path).refusal("--output")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_checks_the_file_against_model_recipe_and_sinks(tmp_path: Path) -> None:
    loaded, asked = tiny(), recipe()
    found = calibrate(loaded, asked, TEXT)
    geometry: dict[str, Any] = {"num_sink_tokens": 2, "window_size": 6, "chunk_size": 1, "calibration": found}

    def refused(model: LoadedModel, problem: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=problem):
            export_loaded(model, tmp_path / "b", ExportConfig(**{**geometry, "recipe": asked, **changes}))
        assert not list(tmp_path.iterdir())

    refused(tiny(seed=1), "ranges of another model, 'tiny'")
    refused(tiny("qwen2"), "ranges of another model, 'tiny'")
    refused(loaded, "calibration: smooth: received alpha 0.7, expected alpha 0.5", recipe=recipe(smooth={"alpha": 0.5}))
    more = recipe(calibration={**SMALL, "samples": 4})
    refused(loaded, "calibration: calibration: received .*samples 3", recipe=more)
    refused(loaded, "received 1 tokens, and a calibration with 2", num_sink_tokens=1)
    refused(loaded, "received no calibration, expected ranges", calibration=None)
    refused(loaded, "received a file, and recipe 'int8-weights'", recipe=load_recipe("int8-weights"))
    refused(loaded, "received a file, and recipe none", recipe=None)


def test_a_fingerprint_distinguishes_models_but_not_precisions() -> None:
    model = tiny_model("llama")
    same = fingerprint(model)
    assert same == fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama", dtype=torch.float16))
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    assert fingerprint(model) != same


# --- smoothing and the recipe ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "multiplied"),
    [
        ("llama", "onnx", 0),
        ("llama-mha", "tensorrt", 0),
        ("gemma2", "onnx", 4),
        ("gpt_neox", "onnx", 4),
        ("phi", "onnx", 2),
        ("cohere", "onnx", 0),
        ("mixtral", "onnx", 0),
        ("qwen3_next", "onnx", 6),
    ],
)
def test_smoothing_alone_changes_no_result(name: str, target: str, multiplied: int, tmp_path: Path) -> None:
    """multiplied: inputs, in two layers, that nothing can take the division over for (what GELU gives, values that come
    from one matmul with queries, what a router reads as well), and scales of gemma2's norms, a sum of constants.

    All weights stay in floating point (a plan that rounds nothing), and the logits stay what they were."""
    # gemma2's norms: sums of so many elements are left for the runtime to fold.
    changes = {"hidden_size": 6 * (SMALL_ELEMENTS // 6 + 1)} if name == "gemma2" else {}
    loaded = tiny(name, **changes)
    asked = recipe(smooth={"alpha": 0.9}, activations={"mode": "static", "sinks": "separate"})
    found = calibrate(loaded, asked, TEXT)
    assert max(max(f.divisors or ()) / min(f.divisors or ()) for f in found.inputs) > 2

    kept = {"lm_head", "model.embed_tokens", "embed_out", *routers(loaded.model)}

    class OnlySmooth:
        def __init__(self, *_: Any) -> None: ...

        def kind(self, module: str) -> None: ...
        def treatment(self, matmul: Any) -> None: ...
        def table(self, module: str) -> None: ...
        def experts(self, parameter: str) -> None: ...
        def divisors(self, module: str) -> Any:
            return None if module in kept else found.divisors(module)

    geometry: dict[str, Any] = {
        "num_sink_tokens": 2,
        "window_size": 6,
        "chunk_size": 3 if "llama" in name else 1,
        "batch": 2,
        "target": target,
        "native": target == "tensorrt",
    }
    config = ExportConfig(**geometry, recipe=asked, calibration=found)
    export_loaded(loaded, tmp_path / "s", config, plan_of=OnlySmooth)
    export_loaded(loaded, tmp_path / "f", ExportConfig(**geometry))
    ids = random_ids(2, 20)
    with Session.load(tmp_path / "s", threads=1) as smoothed, Session.load(tmp_path / "f", threads=1) as plain:
        for column in ids.T:
            want = plain.step(column)
            assert np.abs(smoothed.step(column) - want).max() < 1e-4 * want.std()
        smoothed.reset()
        assert np.abs(smoothed.prefill(ids) - want).max() < 1e-4 * want.std()
    nodes = [
        [n.op_type for n in onnx.load(tmp_path / b / "decode.onnx", load_external_data=False).graph.node] for b in "sf"
    ]
    assert nodes[0].count("RMSNormalization") == nodes[1].count("RMSNormalization")
    extra = nodes[0].count("Mul") - nodes[1].count("Mul")
    assert extra == multiplied


def simulated(loaded: LoadedModel, found: CalibrationFile, asked: Recipe, ids: np.ndarray) -> np.ndarray:
    """What an int8-smooth bundle computes, in torch and NumPy float64: logits [N, vocab] of one stream."""
    model = tiny_model("llama", dtype=torch.float32).double()
    position = [0]
    handles = []
    for facts in found.inputs:
        for name in facts.modules:
            layer = model.get_submodule(name)
            static = asked.input_mode(name) == "static"
            divisors = np.array(facts.divisors) if static else np.ones(layer.in_features)
            scaled = layer.weight.detach().float().numpy() * divisors.astype(np.float32)
            step = np.abs(scaled).max(axis=1, keepdims=True) / 127
            layer.weight.data = torch.from_numpy(np.rint(scaled / step).astype(np.float64) * step)
            if not static:
                continue
            assert facts.sinks is not None

            def rounded(
                _module: Any, arguments: Any, divisors: np.ndarray = divisors, facts: Any = facts
            ) -> tuple[torch.Tensor]:
                x = arguments[0].numpy() / divisors
                bound = max(facts.sinks.range, facts.rest.range) if position[0] < 2 else facts.rest.range
                x = np.clip(np.rint(x / (bound / 127)), -128, 127) * (bound / 127)
                return (torch.from_numpy(x),)

            handles.append(layer.register_forward_pre_hook(rounded))
    head = model.get_output_embeddings()
    step = head.weight.abs().amax(1, keepdim=True) / 127
    head.weight.data = (head.weight / step).round() * step
    table = model.get_input_embeddings()
    step = table.weight.abs().amax(1, keepdim=True) / 127
    table.weight.data = (table.weight / step).round() * step
    logits = []
    from sinkexport.reference.streaming import streaming_reference

    with streaming_reference(model, 2, 6) as reference:
        for token in ids:
            logits.append(reference.step(torch.tensor([token]))[0].numpy())
            position[0] += 1
    for handle in handles:
        handle.remove()
    return np.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_bundle_computes_what_the_recipe_says(target: str, tmp_path: Path) -> None:
    loaded, asked = tiny(), recipe()
    found = calibrate(loaded, asked, TEXT)
    ids = random_ids(1, 24)[0]
    want = simulated(loaded, found, asked, ids)
    geometry: dict[str, Any] = {
        "num_sink_tokens": 2,
        "window_size": 6,
        "chunk_size": 1,
        "target": target,
        "native": target == "tensorrt",
    }
    export_loaded(loaded, tmp_path / "q", ExportConfig(**geometry, recipe=asked, calibration=found))
    export_loaded(loaded, tmp_path / "f", ExportConfig(**geometry))
    with Session.load(tmp_path / "q", threads=1) as session, Session.load(tmp_path / "f", threads=1) as plain:
        got = np.stack([session.step([token])[0].copy() for token in ids])
        exact = np.stack([plain.step([token])[0].copy() for token in ids])
        assert session.manifest.quantization is not None
        assert session.manifest.quantization.calibration_sha256 == found.sha256
    # A value between two codes may go either way; on the whole the bundle is far nearer to the simulation than to the
    # model in floating point.
    near, far = np.abs(got - want).mean(), np.abs(exact - want).mean()
    assert near < 0.4 * far
    assert far < 0.2 * want.std()


@pytest.mark.slow
def test_weights_only_recipes_may_smooth_and_patterns_keep_inputs(tmp_path: Path) -> None:
    loaded = tiny()
    weights_only = recipe(activations={"mode": "float"}, smooth={"alpha": 0.5})
    found = calibrate(loaded, weights_only, TEXT)
    geometry: dict[str, Any] = {"num_sink_tokens": 2, "window_size": 6, "chunk_size": 1}
    export_loaded(loaded, tmp_path / "w", ExportConfig(**geometry, recipe=weights_only, calibration=found))
    asked = recipe(keep_float=["model.layers.0.self_attn.k_proj"])
    found = calibrate(loaded, asked, TEXT)
    export_loaded(loaded, tmp_path / "k", ExportConfig(**geometry, recipe=asked, calibration=found))
    export_loaded(loaded, tmp_path / "f", ExportConfig(**geometry))
    ids = random_ids(1, 20)
    with Session.load(tmp_path / "f", threads=1) as plain:
        want = plain.prefill(ids).copy()
    for bundle in "wk":
        with Session.load(tmp_path / bundle, threads=1) as session:
            assert np.abs(session.prefill(ids) - want).mean() < 0.15 * want.std()
    nodes = [n.op_type for n in onnx.load(tmp_path / "k" / "decode.onnx", load_external_data=False).graph.node]
    assert nodes.count("MatMulIntegerToFloat") == 6  # q and v, o, gate and up in two layers; down_proj: weights only
    assert nodes.count("MatMulNBits") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("llama", marks=needs_tensorrt)])
def test_tensorrt_builds_int8_smooth(name: str, tmp_path: Path) -> None:
    loaded, asked = tiny(name), recipe()
    found = calibrate(loaded, asked, TEXT)
    config = ExportConfig(2, 6, chunk_size=3, recipe=asked, calibration=found, target="tensorrt", native=True)
    manifest = export_loaded(loaded, tmp_path / "b", config)
    for graph in manifest.graphs.values():
        report = build_engine(tmp_path / "b" / graph.file)
        assert report.engine_bytes > 0
        assert report.layer_types["QUANTIZE"] >= 6


def test_value_heads_can_take_over_what_their_query_heads_share() -> None:
    model = tiny_model("llama")  # 6 query heads, 2 value heads of 16
    groups = input_groups(model)
    maxima = ChannelMaxima()
    stream_inputs(model, random_ids(1, 30), StreamConfig(2, 6), [maxima])
    divisors = smoothing(model, {k: v for k, v in groups.items() if k != "lm_head"}, maxima, 0.5, with_sinks=False)
    heads = divisors["model.layers.0.self_attn.o_proj"].reshape(2, 3, 16)
    assert (heads == heads[:, :1]).all()
    assert not (heads[0] == heads[1]).all()
