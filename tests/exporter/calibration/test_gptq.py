"""GPTQ: against a float64 form of it that solves for each next weight anew, and against rounding to the nearest."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from sinkexport.calibration import calibrate as calibration
from sinkexport.calibration.calibrate import Calibrated
from sinkexport.calibration.file import CalibrationFile, load_calibration, rounded_path
from sinkexport.calibration.gptq import DAMPING, rounded_for_inputs
from sinkexport.calibration.rounding import RoundedFile, SecondMoments, batches, round_batch
from sinkexport.calibration.stream_inputs import input_groups
from sinkexport.config import ExportConfig
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import Recipe, parse_recipe
from sinkexport.quant.weight import Rounded, WeightScheme
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.sources import LoadedModel
from sinkrt.contract import load_manifest
from sinkrt.errors import UsageError

from tests.exporter.calibration.test_calibrate import TEXT
from tests.exporter.graph.test_quantize import plain_steps
from tests.exporter.tiny_models import tiny_model, tiny_tokenizer
from tests.support import random_ids, run_cli

SCHEMES = [
    WeightScheme(4, 32, symmetric=False),
    WeightScheme(4, 32),
    WeightScheme(4, 16, symmetric=False),
    WeightScheme(4, 128, symmetric=False),  # goes beyond a strip
    WeightScheme(4),
    WeightScheme(8, 32),
    WeightScheme(8),
]


def dequantized(found: Rounded, block: int) -> np.ndarray:
    zeros = np.zeros_like(found.scales) if found.zero_points is None else found.zero_points.astype(np.float64)
    spread = [np.repeat(part.astype(np.float64), block, axis=1) for part in (found.scales, zeros)]
    scale, zero = (part[:, : found.integers.shape[1]] for part in spread)
    return scale * (found.integers.astype(np.float64) - zero)


def moments_of(rng: np.random.Generator, num_inputs: int) -> np.ndarray:
    """Moments of inputs that go along with each other, as those of layers do."""
    mixed = rng.standard_normal((2 * num_inputs, num_inputs // 4)) @ rng.standard_normal((num_inputs // 4, num_inputs))
    x = mixed + 0.3 * rng.standard_normal(mixed.shape)
    return x.T @ x / len(x)


def case(seed: int, num_outputs: int, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_outputs, num_inputs)).astype(np.float32), moments_of(rng, num_inputs)


def output_error(weight: np.ndarray, found: np.ndarray, moments: np.ndarray) -> float:
    difference = found - weight
    return float(np.einsum("nk,kl,nl->", difference, moments, difference))


def best_of_the_rest(weight: np.ndarray, fixed: np.ndarray, moments: np.ndarray, i: int) -> np.ndarray:
    """Weights i .. K-1 that make the error least once 0 .. i-1 are `fixed` [N, i]: from the normal equations."""
    done, rest = slice(0, i), slice(i, None)
    wanted = moments[rest, done] @ (weight[:, done] - fixed).T
    return weight[:, rest] + np.linalg.solve(moments[rest, rest], wanted).T


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_weight_is_the_nearest_integer_to_what_the_normal_equations_want(scheme: WeightScheme) -> None:
    num_inputs = 144
    weight, moments = case(0, 5, num_inputs)
    found = rounded_for_inputs(torch.from_numpy(weight), torch.from_numpy(moments), scheme)
    block = scheme.block_size or num_inputs
    values = dequantized(found, block)
    damped = moments + DAMPING * moments.diagonal().mean() * np.eye(num_inputs)
    for i in range(num_inputs):
        wanted = best_of_the_rest(weight.astype(np.float64), values[:, :i], damped, i)[:, 0]
        scale = found.scales[:, i // block].astype(np.float64)
        zero = 0.0 if found.zero_points is None else found.zero_points[:, i // block].astype(np.float64)
        integers = np.clip(np.rint(wanted / scale) + zero, scheme.lowest, scheme.highest)
        # Where two integers are as near, float32 may take the other.
        is_tie = np.abs(np.abs(wanted / scale - np.floor(wanted / scale)) - 0.5) < 1e-3
        assert ((integers == found.integers[:, i]) | is_tie).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_outputs_change_less_than_with_rounding_to_the_nearest(scheme: WeightScheme) -> None:
    weight, moments = case(1, 64, 256)
    block = scheme.block_size or 256
    found = rounded_for_inputs(torch.from_numpy(weight), torch.from_numpy(moments), scheme)
    plain = rounded_for_inputs(torch.from_numpy(weight), torch.eye(256, dtype=torch.float64), scheme)
    ours, nearest = (output_error(weight, dequantized(x, block), moments) for x in (found, plain))
    assert ours < 0.6 * nearest


def test_without_correlations_it_is_rounding_to_the_nearest() -> None:
    weight, _ = case(2, 16, 128)
    found = rounded_for_inputs(torch.from_numpy(weight), torch.eye(128, dtype=torch.float64), WeightScheme(8, 32))
    scale = np.repeat(found.scales, 32, axis=1)
    exact = weight / scale
    assert np.abs(np.clip(exact, -127, 127) - found.integers).max() <= 0.5 + 1e-4


def test_inputs_and_outputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = case(3, 8, 64)
    weight[3] = 0
    moments[10], moments[:, 10] = 0, 0
    for scheme in (WeightScheme(4, 32, symmetric=False), WeightScheme(4, 32)):
        found = rounded_for_inputs(torch.from_numpy(weight), torch.from_numpy(moments), scheme)
        values = dequantized(found, 32)
        assert np.isfinite(values).all()
        assert (found.scales > 0).all()
        assert np.abs(values[3]).max() == 0
    all_zero = rounded_for_inputs(torch.from_numpy(weight), torch.zeros(64, 64, dtype=torch.float64), scheme)
    assert np.isfinite(dequantized(all_zero, 32)).all()


# --- rounding a model ---

ROUNDED = {
    "schema_version": 1,
    "name": "mine",
    "description": "a test's",
    "weights": {
        "bits": 4,
        "granularity": "block",
        "block_size": 16,
        "symmetric": False,
        "rounding": "gptq",
        "int8": ["*.v_proj"],
    },
    "activations": {"mode": "float"},
    "lm_head": "int8",
    "targets": ["onnx"],
    "calibration": {"samples": 3, "length": 60, "sink_tokens": 2, "window": 6},
    "thresholds": {"perplexity_increase": 0.1, "kl_divergence": 0.1, "top1_agreement": 0.8},
}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({**ROUNDED, **changes}, "recipe 'test'")


def tiny(name: str = "llama", **arguments: Any) -> LoadedModel:
    return LoadedModel(tiny_model(name, **arguments), tiny_tokenizer(), "tiny")


def written(found: Calibrated, folder: Path) -> Path:
    path = folder / "c.json"
    path.write_text(found.facts.to_json(), encoding="utf-8")
    rounded_path(path).write_bytes(safetensors.numpy.save(found.rounded))
    return path


def loaded_calibration(path: Path) -> CalibrationFile:
    return load_calibration(path).with_rounded_file(rounded_path(path))


def test_moments_are_those_of_all_tokens_sinks_included() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 24)).astype(np.float32)
    observer = SecondMoments()
    for rows in np.array_split(np.arange(50), [3, 4, 30]):
        observer.update("a", torch.from_numpy(x[rows]), torch.from_numpy(rows < 2))
    want = x.astype(np.float64).T @ x.astype(np.float64)
    assert np.abs(observer.sums["a"].numpy() - want).max() < 1e-5 * np.abs(want).max()
    again = SecondMoments()
    again.restore(observer.state())
    assert torch.equal(again.sums["a"], observer.sums["a"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_file_gives_back_what_was_rounded(scheme: WeightScheme, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(48, 7), "b": torch.nn.Linear(48, 5), "c": torch.nn.Linear(48, 5)})
    moments = SecondMoments()
    moments.update("a", torch.randn(100, 48, generator=torch.manual_seed(1)), torch.zeros(100, dtype=torch.bool))
    arrays = round_batch(model, {"a": ("a", "b", "c")}, moments, {"a": scheme, "b": scheme})
    path = tmp_path / "r.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    file = RoundedFile(path)
    assert "b" in file
    assert "c" not in file
    for name in ("a", "b"):
        want = rounded_for_inputs(model[name].weight, moments.sums["a"], scheme)
        found = file.read(name, scheme, 48)
        assert found.integers.dtype == want.integers.dtype
        for ours, theirs in zip(found, want, strict=True):
            assert (ours is None and theirs is None) or np.array_equal(ours, theirs)


def test_batches_hold_what_fits_and_change_nothing() -> None:
    model = tiny("llama")
    groups = input_groups(model.model)
    size = max(4 * model.model.get_submodule(first).in_features ** 2 for first in groups)
    for limit in (1, size, 3 * size, 10**9):
        found = list(batches(groups, model.model, limit))
        assert {k: v for batch in found for k, v in batch.items()} == groups
        for batch in found:
            taken = sum(4 * model.model.get_submodule(first).in_features ** 2 for first in batch)
            assert taken <= limit or len(batch) == 1
    whole = calibration.calibrate(model, recipe(), TEXT)
    one_by_one = calibration.calibrate(model, recipe(), TEXT, moments_bytes=1)
    assert one_by_one.facts == whole.facts
    assert all(np.array_equal(value, one_by_one.rounded[key]) for key, value in whole.rounded.items())


def test_a_bundle_has_the_weights_of_the_calibration(tmp_path: Path) -> None:
    model = tiny("llama")
    found = calibration.calibrate(model, recipe(), TEXT)
    kept = loaded_calibration(written(found, tmp_path))
    config = ExportConfig(2, 6, chunk_size=3, recipe=recipe(), calibration=kept)
    manifest = export_loaded(model, tmp_path / "b", config)
    assert manifest.quantization is not None
    assert (manifest.quantization.weights, manifest.quantization.calibration_sha256) == ("int4", found.facts.sha256)
    rounded = copy.deepcopy(model.model)
    plan = RecipePlan(recipe(), model.model, "float32")
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and (scheme := plan.scheme_for_inputs(name)) is not None:
            parts = kept.rounded(name, scheme, module.in_features)
            assert np.abs(dequantized(parts, 16) - module.weight.detach().numpy()).max() > 0
            module.weight.data = torch.from_numpy(dequantized(parts, 16)).float()
    for table in (rounded.get_output_embeddings().weight, rounded.get_input_embeddings().weight):
        step = table.detach().abs().amax(dim=1, keepdim=True) / 127
        table.data = (table / step).round() * step
    graph = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0  # matmuls in float32: by default they round inputs to 8 bits
    onnx.save(graph, tmp_path / "b" / "exact.onnx")
    step = plain_steps(tmp_path / "b" / "exact.onnx")
    ids = random_ids(1, 20, seed=3)
    with torch.no_grad(), chunked_streaming(rounded, 2, 6) as stream:
        want = stream.feed(torch.from_numpy(ids))[0].numpy()
    for position in range(ids.shape[1]):
        assert np.abs(step(ids[:, position], position)[0] - want[position]).max() < 1e-4 * want.std()


def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny("llama")
    several = 3 * 4 * 64**2  # bytes for second moments: several passes
    raw = {
        **ROUNDED,
        "weights": {"bits": 8, "granularity": "channel", "rounding": "gptq"},
        "activations": {"mode": "static", "sinks": "separate"},
        "calibration": {**ROUNDED["calibration"], "method": "minmax"},
    }
    asked = parse_recipe(raw, "recipe 'test'")
    want = calibration.calibrate(model, asked, TEXT, moments_bytes=several)
    calls = 0

    class KilledError(Exception):
        pass

    def killed_soon(_stage: str, _done: int, _total: int) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 12, 25, 38):
            raise KilledError

    got, kills = None, 0
    while got is None:
        try:
            got = calibration.calibrate(
                model, asked, TEXT, partial=tmp_path / "p", report=killed_soon, moments_bytes=several
            )
        except KilledError:
            kills += 1
    assert kills == 4
    assert got.facts == want.facts
    assert all(np.array_equal(value, got.rounded[key]) for key, value in want.rounded.items())


def test_rounded_weights_are_refused_where_they_do_not_belong(tmp_path: Path) -> None:
    model = tiny("llama")
    path = written(calibration.calibrate(model, recipe(), TEXT), tmp_path)
    kept = loaded_calibration(path)

    def refused(problem: str, asked: Recipe, ranges: CalibrationFile = kept) -> None:
        with pytest.raises(UsageError, match=problem) as failure:
            export_loaded(model, tmp_path / "b", ExportConfig(2, 6, chunk_size=1, recipe=asked, calibration=ranges))
        assert "\n" not in str(failure.value)
        assert not (tmp_path / "b").exists()

    other = {**ROUNDED["weights"], "block_size": 32}
    refused(
        "calibration: weights: received bits 4, .* block_size 16, .* expected bits 4, .* block_size 32",
        recipe(weights=other),
    )
    refused("calibration: keep_float", recipe(keep_float=["*.o_proj"]))
    refused("no rounded weights of 'model.layers.0", recipe(), load_calibration(path))
    rounded_path(path).write_bytes(rounded_path(path).read_bytes()[:-1] + b"\1")
    with pytest.raises(UsageError, match="of another calibration"):
        loaded_calibration(path)
    rounded_path(path).unlink()
    with pytest.raises(UsageError, match="keep the two together"):
        loaded_calibration(path)


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save(folder)
    (tmp_path / "r.yaml").write_text(json.dumps(ROUNDED), encoding="utf-8")
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--recipe", str(tmp_path / "r.yaml"), "--text", str(tmp_path / "t.txt")]
    result = run_cli("calibrate", folder, *arguments, "-o", tmp_path / "c.json")
    assert "weights of 14 layers rounded" in result.out
    files = sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    assert files == ["c.json", "c.safetensors", "r.yaml", "t.txt"]
    shown = run_cli("inspect", tmp_path / "c.json")
    assert "weights rounded for their inputs, in c.safetensors" in shown.out
    options = ("--sink-tokens", 2, "--window", 6, *arguments[:2], "--calibration", tmp_path / "c.json")
    done = run_cli("export", folder, "-o", tmp_path / "b", *options)
    done.succeeded()
    assert load_manifest(tmp_path / "b").quantization is not None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"calibration": None}, "calibration is needed by"),
        ({"calibration": {**ROUNDED["calibration"], "method": "minmax"}}, "calibration.method goes with"),
        ({"weights": {**ROUNDED["weights"], "scales": "mse"}}, "leave scales out"),
        ({"weights": {"bits": 8, "granularity": "channel", "int8": ["*"]}}, "int8 goes with bits: 4"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        recipe(**changes)
