"""The gate of quantised bundles: figures are those of float64 NumPy, thresholds hold and fail, bad input is reported.

The toy bundle has a definition in a few lines of NumPy, rounded weights or not; so what the gate says of it can be
computed without any of the code that is tested.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.evaluation.perplexity import Prediction, Predictor
from sinkexport.evaluation.quality import BLOCK_TOKENS, SEGMENT_TOKENS, Quality, compare_predictions, kl_divergence
from sinkexport.evaluation.quality_gate import check, verify_quality
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import load_recipe
from sinkexport.reference.streaming import streaming_reference
from sinkexport.sources import LoadedModel
from sinkrt.contract import Manifest, Quantization, load_manifest
from sinkrt.errors import BackendError, BundleError, UsageError

from tests.exporter.tiny_models import tiny_model, tiny_tokenizer
from tests.runtime.toy import Toy, build_toy, reference_logits, rehash, write_manifest
from tests.support import export_model, random_ids, run_cli

LOOSE = {"perplexity_increase": 10.0, "kl_divergence": 10.0, "top1_agreement": 0.0}
TOY_TEXT = "".join(chr(ord("a") + i) for i in np.random.default_rng(5).integers(0, 26, 90))
TOY_IDS = list(TOY_TEXT.encode())


@dataclasses.dataclass(frozen=True)
class RoundedToy(Toy):
    """A toy whose weights are rounded to `levels` integers on each side of 0, a scale for each matrix."""

    levels: int = 7

    def weights(self) -> dict[str, np.ndarray]:
        def rounded(w: np.ndarray) -> np.ndarray:
            scale = np.float32(np.abs(w).max() / self.levels)
            return (np.round(w / scale) * scale).astype(np.float32)

        return {name: rounded(w) for name, w in super().weights().items()}


def quantised(folder: Path, thresholds: dict[str, float] | None = None, **facts: Any) -> Path:
    """The bundle, said to be quantised."""
    limits = LOOSE if thresholds is None else thresholds
    entry = Quantization(
        **{
            "recipe": "test",
            "weights": "int8",
            "activations": "float",
            "kv": "fp",
            "calibration_sha256": None,
            "thresholds": limits,
            **facts,
        }
    )
    write_manifest(folder, dataclasses.replace(load_manifest(folder), quantization=entry))
    return folder


def expected(want: np.ndarray, got: np.ndarray, targets: list[int]) -> dict[str, float]:
    """Figures of logits [n, V] for tokens [n], by their definitions, a token at a time, in float64."""
    divergences, agreed, nats = [], 0, np.zeros(2)
    for p_logits, q_logits, target in zip(want.astype(np.float64), got.astype(np.float64), targets, strict=True):
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p_logits, q_logits))
        divergences.append(math.fsum(p * np.log(p / q)))
        agreed += int(p.argmax() == q.argmax())
        nats -= np.log([p[target], q[target]])
    perplexities = np.exp(nats / len(targets))
    return {
        "num_tokens": len(targets),
        "kl_divergence": math.fsum(divergences) / len(targets),
        "worst_kl_divergence": max(divergences),
        "worst_token": int(np.argmax(divergences)) + 1,
        "top1_agreement": agreed / len(targets),
        "reference_perplexity": perplexities[0],
        "perplexity": perplexities[1],
        "perplexity_increase": perplexities[1] / perplexities[0] - 1,
    }


def assert_figures(quality: Quality, want: dict[str, float], rel: float) -> None:
    found = dataclasses.asdict(quality)
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=rel), name


@pytest.fixture(scope="module")
def float_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("gate") / "float", Toy(chunk_size=4))


@pytest.fixture(scope="module")
def rounded_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(build_toy(tmp_path_factory.mktemp("gate") / "rounded", RoundedToy(chunk_size=4)))


def copied(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_kl_divergence() -> None:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(2, 40, 60)) * 5)
    log_p, log_q = torch.log_softmax(logits, dim=-1)
    want = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    np.testing.assert_allclose(kl_divergence(log_p.numpy(), log_q.numpy()), want, rtol=1e-12)
    assert (kl_divergence(log_p.numpy(), log_p.numpy()) == 0).all()
    half = np.log([[0.5, 0.5]])
    with np.errstate(divide="ignore"):
        certain = np.log([[1.0, 0.0]])
    assert kl_divergence(certain, half) == pytest.approx(math.log(2))  # 0 log 0 is 0
    assert kl_divergence(half, certain) == math.inf


def predictor_of(name: str, logits: np.ndarray, length: int) -> Predictor:
    def predictions() -> Iterator[Prediction]:
        buffer = np.empty_like(logits[:length])  # reused, as a session's is
        for start in range(0, len(logits), length):
            rows = logits[start : start + length]
            buffer[: len(rows)] = rows
            yield Prediction(start + 1, buffer[: len(rows)])

    return Predictor(name, "", len(logits), predictions)


@pytest.mark.parametrize("num_tokens", [1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * SEGMENT_TOKENS + 7])
def test_figures_of_given_predictions(num_tokens: int) -> None:
    random = np.random.default_rng(1)
    want = (random.normal(size=(num_tokens, 50)) * 4).astype(np.float32)
    got = (want + random.normal(size=want.shape)).astype(np.float32)
    ids = random.integers(0, 50, num_tokens + 1)
    reports: list[tuple[str, int, int]] = []
    quality = compare_predictions(
        predictor_of("reference", want, 64), predictor_of("bundle", got, 1), ids, lambda *stage: reports.append(stage)
    )
    assert_figures(quality, expected(want, got, ids[1:].tolist()), 1e-10)
    assert reports[0] == ("quality", 0, num_tokens)
    assert reports[-1] == ("quality", num_tokens, num_tokens)


def test_standard_error_is_that_of_the_segments() -> None:
    """Against a bootstrap over segments."""
    random = np.random.default_rng(2)
    total = 24 * SEGMENT_TOKENS
    want = random.normal(size=(total, 5))
    got = want + random.normal(size=(total, 5)) * 0.2 + np.repeat(random.normal(size=(24, 5)) * 0.1, SEGMENT_TOKENS, 0)
    ids = random.integers(0, 5, total + 1)
    quality = compare_predictions(predictor_of("a", want, 256), predictor_of("b", got, 256), ids)
    rows = np.arange(total)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x), -1).numpy()[rows, ids[1:]] for x in (want, got))
    by_segment = (log_p - log_q).reshape(24, -1).mean(axis=1)
    drawn = [np.exp(by_segment[random.integers(0, 24, 24)].mean()) for _ in range(4000)]
    assert quality.standard_error == pytest.approx(np.std(drawn), rel=0.1)
    short = compare_predictions(predictor_of("a", want[:9], 9), predictor_of("b", got[:9], 9), ids[:10])
    assert short.standard_error is None


@pytest.mark.parametrize("spoilt", ["reference", "bundle"])
def test_what_is_no_number_is_named(spoilt: str) -> None:
    logits = {name: np.zeros((70, 9)) for name in ("reference", "bundle")}
    logits[spoilt][41, 3] = np.nan
    with pytest.raises(BackendError, match=f"^{spoilt}: prediction of token 42: received logits that are not numbers"):
        compare_predictions(*(predictor_of(n, x, 1) for n, x in logits.items()), np.zeros(71, dtype=np.int64))
    assert threading.active_count() == 1 or all(not t.name.startswith("ThreadPool") for t in threading.enumerate())


def test_an_error_of_the_reference_comes_out() -> None:
    def predictions() -> Iterator[Prediction]:
        yield Prediction(1, np.zeros((40, 9)))
        raise BundleError("broken")

    broken = Predictor("reference", "", 70, predictions)
    with pytest.raises(BundleError, match="broken"):
        compare_predictions(broken, predictor_of("bundle", np.zeros((70, 9)), 1), np.zeros(71, dtype=np.int64))


# --- bundles against an independent computation -----------------------------------------------------------------------


def test_toy_against_its_floating_point_bundle(float_toy: Path, rounded_toy: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    report = verify_quality(rounded_toy, str(float_toy), TOY_TEXT, threads=1, report=lambda *s: stages.append(s))
    want, got = (reference_logits(toy, TOY_IDS[:-1]) for toy in (Toy(), RoundedToy()))
    figures = expected(want, got, TOY_IDS[1:])
    assert 0.001 < figures["kl_divergence"] < 1  # rounding shows
    assert 0 < figures["top1_agreement"] < 1
    assert_figures(report.quality, figures, 1e-4)
    assert report.passed
    assert (report.recipe, report.reference) == ("test", f"bundle {float_toy}, float32")
    assert report.prefill.positions >= 10
    assert report.prefill.max_relative_error < 1e-4
    assert [name for i, (name, *_) in enumerate(stages) if i == 0 or name != stages[i - 1][0]] == [
        "load",
        "quality",
        "prefill",
    ]


def test_only_the_first_tokens_of_the_text_count(float_toy: Path, rounded_toy: Path) -> None:
    report = verify_quality(rounded_toy, str(float_toy), TOY_TEXT, num_tokens=20, threads=1)
    want, got = (reference_logits(toy, TOY_IDS[:19]) for toy in (Toy(), RoundedToy()))
    assert_figures(report.quality, expected(want, got, TOY_IDS[1:20]), 1e-4)


def test_predictions_may_be_given(float_toy: Path, rounded_toy: Path) -> None:
    rows = reference_logits(Toy(), TOY_IDS[:-1])
    kept = Predictor("reference", "kept", len(rows), lambda: iter([Prediction(1, rows)]))
    report, want = (verify_quality(rounded_toy, one, TOY_TEXT, threads=1) for one in (kept, str(float_toy)))
    figures = {name: value for name, value in dataclasses.asdict(want.quality).items() if value is not None}
    assert_figures(report.quality, figures, 1e-4)
    assert (report.reference, report.passed) == ("kept", True)


def test_stream_0_of_several_counts(float_toy: Path, rounded_toy: Path, tmp_path: Path) -> None:
    several = quantised(build_toy(tmp_path / "several", RoundedToy(batch=3, chunk_size=4)))
    found, want = (verify_quality(b, str(float_toy), TOY_TEXT, threads=1).quality for b in (several, rounded_toy))
    assert_figures(found, {k: v for k, v in dataclasses.asdict(want).items() if v is not None}, 1e-5)
    also = verify_quality(rounded_toy, str(build_toy(tmp_path / "floats", Toy(batch=2))), TOY_TEXT, threads=1).quality
    assert_figures(also, {k: v for k, v in dataclasses.asdict(want).items() if v is not None}, 1e-5)


S, W = 3, 12
TINY_IDS = random_ids(5 * (S + W) + 4, first=0)
TINY_TEXT = " ".join(f"w{i}" for i in TINY_IDS)


def rounded_model(name: str) -> Any:
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = parameter.abs().amax(dim=-1, keepdim=True) / 15
                parameter.copy_((parameter / scale).round() * scale)
    return model


def streamed_logits(model: Any) -> np.ndarray:
    """float32 [n, vocab], token by token, all keys rotated anew in each step."""
    with streaming_reference(model, S, W) as reference:
        return np.stack([reference.step(torch.tensor([i]))[0].numpy() for i in TINY_IDS[:-1]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gpt_neox"])
def test_model_in_torch_as_reference(name: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_model(
        rounded_model(name), bundle, num_sink_tokens=S, window_size=W, chunk_size=5, tokenizer=tiny_tokenizer()
    )
    quantised(bundle)
    threads = torch.get_num_threads()
    model = tiny_model(name)
    report = verify_quality(bundle, LoadedModel(model, None, "tiny"), TINY_TEXT, threads=2)
    figures = expected(streamed_logits(model), streamed_logits(rounded_model(name)), TINY_IDS[1:].tolist())
    assert figures["kl_divergence"] > 1e-3
    assert_figures(report.quality, figures, 2e-3)
    assert report.reference == "tiny in torch, float32"
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8-weights", "int8-dynamic", "int4-nearest"])
def test_recipes_through_the_real_export(recipe: str, tmp_path: Path) -> None:
    """Prefill stays with the steps within the tolerance, and less is lost with more bits."""
    model = tiny_model("llama")
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny")
    bundle = tmp_path / "bundle"
    manifest = export_loaded(loaded, bundle, ExportConfig(S, W, chunk_size=5, recipe=load_recipe(recipe)))
    report = verify_quality(bundle, loaded, TINY_TEXT, threads=2)
    assert manifest.quantization is not None
    assert {c.name: c.limit for c in report.checks} == dict(manifest.quantization.thresholds)
    assert report.recipe == recipe
    assert report.prefill.failed_position is None
    least, most = {"int8-weights": (0, 0.02), "int8-dynamic": (0, 0.1), "int4-nearest": (0.02, 2)}[recipe]
    assert least < report.quality.kl_divergence < most


# --- thresholds -------------------------------------------------------------------------------------------------------

QUALITY = Quality(100, 0.02, 0.5, 7, 0.9, 10.0, 10.1, 0.01, None)


@pytest.mark.parametrize(
    ("limits", "failing"),
    [
        ({"perplexity_increase": 0.01, "kl_divergence": 0.02, "top1_agreement": 0.9}, []),  # equal is enough
        ({"perplexity_increase": 0.0099, "kl_divergence": 0.02, "top1_agreement": 0.9}, ["perplexity_increase"]),
        ({"perplexity_increase": 0.01, "kl_divergence": 0.0199, "top1_agreement": 0.9}, ["kl_divergence"]),
        ({"perplexity_increase": 0.01, "kl_divergence": 0.02, "top1_agreement": 0.91}, ["top1_agreement"]),
        ({"kl_divergence": 0.01}, ["kl_divergence"]),
        ({}, []),
    ],
)
def test_thresholds(limits: dict[str, float], failing: list[str]) -> None:
    found = check(QUALITY, limits)
    assert {c.name for c in found} == set(limits)
    assert [c.name for c in found if not c.passed] == failing


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_passes_no_threshold(value: float) -> None:
    bad = dataclasses.replace(QUALITY, kl_divergence=value, perplexity_increase=value)
    assert [c.passed for c in check(bad, {**LOOSE, "top1_agreement": 0.5})] == [False, False, True]


def test_a_better_perplexity_is_no_failure() -> None:
    better = dataclasses.replace(QUALITY, perplexity_increase=-0.05)
    assert all(c.passed for c in check(better, {"perplexity_increase": 0.005}))


def test_an_unknown_threshold_does_not_pass_unseen(rounded_toy: Path, float_toy: Path, tmp_path: Path) -> None:
    bundle = quantised(copied(rounded_toy, tmp_path), {**LOOSE, "accuracy": 0.5})
    with pytest.raises(BundleError, match=r"thresholds: received 'accuracy', expected perplexity_increase"):
        verify_quality(bundle, str(float_toy), TOY_TEXT)


def test_prefill_that_computes_something_else_fails(rounded_toy: Path, float_toy: Path, tmp_path: Path) -> None:
    bundle = copied(rounded_toy, tmp_path)
    other = build_toy(tmp_path / "other", Toy(chunk_size=4, seed=1))
    for name in ("prefill.onnx", "weights_prefill.bin"):
        shutil.copy(other / name, bundle / name)
    rehash(bundle)
    report = verify_quality(bundle, str(float_toy), TOY_TEXT, threads=1)
    assert not report.passed
    assert all(c.passed for c in report.checks)
    assert [line.partition(":")[0] for line in report.failures] == ["prefill"]


def test_logits_that_are_not_numbers(rounded_toy: Path, float_toy: Path, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(Toy):
        def weights(self) -> dict[str, np.ndarray]:
            weights = super().weights()
            weights["embedding"][TOY_IDS[30]] = np.nan
            return weights

    broken = quantised(build_toy(tmp_path / "broken", Broken()))
    token = TOY_IDS.index(TOY_IDS[30]) + 1
    with pytest.raises(BackendError, match=f"^bundle: prediction of token {token}: received logits that are not"):
        verify_quality(broken, str(float_toy), TOY_TEXT, threads=1)
    with pytest.raises(BackendError, match=f"^reference: prediction of token {token}: "):
        verify_quality(rounded_toy, str(build_toy(tmp_path / "float", Broken())), TOY_TEXT, threads=1)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "^text: received 0 tokens, expected at least 2"),
        ("x", {}, "^text: received 1 token, expected at least 2"),
        (TOY_TEXT, {"num_tokens": 1}, "^tokens: received 1, expected >= 2"),
        (TOY_TEXT, {"tolerance": 0.0}, "^tolerance: received 0.0"),
        (TOY_TEXT, {"tolerance": math.nan}, "^tolerance: received nan"),
    ],
)
def test_bad_arguments(text: str, arguments: dict[str, Any], message: str, float_toy: Path, rounded_toy: Path) -> None:
    with pytest.raises(UsageError, match=message):
        verify_quality(rounded_toy, str(float_toy), text, **arguments)


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        (Toy(window_size=7), "^--against: window: received 7, expected 6, as in the bundle"),
        (Toy(num_sink_tokens=1), "^--against: sinks: received 1, expected 2"),
        (Toy(num_kv_heads=4), "^--against: key heads: received 4, expected 2"),
        (Toy(num_q_heads=2), "^--against: hidden size: received 16, expected 32"),
    ],
)
def test_another_bundle(toy: Toy, message: str, rounded_toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        verify_quality(rounded_toy, str(build_toy(tmp_path / "other", toy)), TOY_TEXT)


def test_other_references_that_will_not_do(rounded_toy: Path, float_toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="received a bundle quantised by 'test', expected one in floating point"):
        verify_quality(rounded_toy, str(rounded_toy), TOY_TEXT)
    with pytest.raises(UsageError, match=r"^model's architecture: received LlamaForCausalLM"):
        verify_quality(rounded_toy, LoadedModel(tiny_model("llama"), None, "tiny"), TOY_TEXT)
    with pytest.raises(UsageError, match="no such folder"):
        verify_quality(rounded_toy, str(tmp_path / "no" / "where"), TOY_TEXT)
    untold = quantised(build_toy(tmp_path / "ids", tokenizer=False))
    with pytest.raises(UsageError, match="tokenizer"):
        verify_quality(untold, str(float_toy), TOY_TEXT)


def test_a_damaged_bundle_is_reported(rounded_toy: Path, float_toy: Path, tmp_path: Path) -> None:
    bundle = copied(rounded_toy, tmp_path)
    weights = bundle / "weights.bin"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    with pytest.raises(BundleError, match=r"weights\.bin"):
        verify_quality(bundle, str(float_toy), TOY_TEXT)


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TOY_TEXT)
    return path


def test_command(float_toy: Path, rounded_toy: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ("verify", rounded_toy, "--against", float_toy, "--text", text_file, "--json", out)
    shown = run_cli(*arguments).succeeded().out
    facts = json.loads(out.read_text())
    assert facts["passed"] is True
    assert facts["quality"]["num_tokens"] == len(TOY_IDS) - 1
    assert f"{facts['quality']['perplexity']:.3f}" in shown
    assert f"{facts['quality']['kl_divergence']:.5f}" in shown
    assert shown.splitlines()[-1] == "passed"
    assert [line.rstrip().endswith("ok") for line in shown.splitlines()].count(True) == 4

    strict = quantised(copied(rounded_toy, tmp_path), {**LOOSE, "kl_divergence": 1e-5, "top1_agreement": 1.0})
    failed = run_cli("verify", strict, *arguments[2:])
    assert failed.code == 1
    found = facts["quality"]
    assert failed.err.splitlines() == [
        f"FAILED kl_divergence: {found['kl_divergence']:.4g}, above the limit of 1e-05 of recipe 'test'",
        f"FAILED top1_agreement: {found['top1_agreement']:.4g}, below the limit of 1 of recipe 'test'",
    ]
    assert "passed" not in failed.out
    assert json.loads(out.read_text())["passed"] is False


def test_command_compares_predictions_of_a_bundle_that_is_not_quantised(
    float_toy: Path, text_file: Path, tmp_path: Path
) -> None:
    other = build_toy(tmp_path / "rounded", RoundedToy())
    out = tmp_path / "report.json"
    compared = ("--quality", "--against", float_toy, "--text", text_file, "--tokens", 40, "--json", out)
    result = run_cli("verify", other, *compared).succeeded()
    facts = json.loads(out.read_text())
    assert (facts["recipe"], facts["checks"], facts["quality"]["num_tokens"]) == (None, [], 39)
    assert facts["quality"]["kl_divergence"] > 0.001
    assert "(float32) against bundle" in result.out


def test_command_refuses_with_exit_code_2(float_toy: Path, rounded_toy: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    good = ("verify", rounded_toy, "--against", float_toy, "--text", text_file)
    for arguments, reason in (
        (good[:4], "--text: received none, with a bundle quantised by 'test', expected a text"),
        (("verify", float_toy, "--quality", "--against", float_toy), "--text: received none, with --quality"),
        ((*good[:4], "--text", tmp_path / "one.txt"), "text: received 1 token"),
        ((*good[:4], "--text", tmp_path / "none.txt"), "--text: received"),
        ((*good, "--wraps", 3), "--wraps: received with a bundle quantised by 'test', expected no such option"),
        ((*good, "--dense-tokens", 3), "--dense-tokens: received with"),
        ((*good, "--seed", 3), "--seed: received with"),
        ((*good, "--tokens", 1), "--tokens"),
        ((*good, "--json", tmp_path / "no" / "x.json"), "--json: received"),
        ((*good[:3], rounded_toy, *good[4:]), "expected one in floating point"),
        (("verify", float_toy, "--against", float_toy, "--tokens", 30), "--tokens: received with logits compared"),
        (("verify", float_toy, "--against", float_toy), "a bundle, expected the model that was exported"),
    ):
        run_cli(*arguments).refusal(reason)


def test_two_bundles_are_compared_without_torch(float_toy: Path, rounded_toy: Path, text_file: Path) -> None:
    code = (
        "import sys; from sinkexport import cli\n"
        f"sys.argv = ['sinkexport', 'verify', {str(rounded_toy)!r}, '--against', {str(float_toy)!r}, '--text', "
        f"{str(text_file)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnx')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect_shows_how_a_bundle_was_quantised(rounded_toy: Path, float_toy: Path, tmp_path: Path) -> None:
    shown = run_cli("inspect", quantised(copied(rounded_toy, tmp_path), calibration_sha256="ab" * 32)).out
    assert "test: int8 weights, float inputs, fp window" in shown
    assert "calibration file abababababababab" in shown
    assert "kl_divergence 10, perplexity_increase 10, top1_agreement 0" in shown
    assert "kl_divergence" not in run_cli("inspect", float_toy).out
    facts = Manifest.from_json(run_cli("inspect", "--json", rounded_toy).out).quantization
    assert facts is not None
    assert facts.thresholds == LOOSE
