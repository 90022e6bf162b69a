"""Sinks found against transformers' own attention weights, and planted ones found where they were planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sinkexport import analyze as module
from sinkexport.analyze import EPSILON, NEAR_TOKENS, SECONDARY_WEIGHT, analyze, attention_weights, recommend
from sinkexport.cli import cli
from sinkexport.sources import LoadedModel
from sinkrt import UsageError

from tests.exporter.test_pin_system import tokenizer
from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model

T, K = 96, 6


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, count).tolist()


@pytest.mark.parametrize("name", ["llama", "llama-mha", "gemma2", "cohere", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("rows", [1000, 13])
def test_weights_are_those_of_transformers(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", rows)
    model, window = tiny_model(name), ids(T)
    num_layers = model.config.get_text_config().num_hidden_layers
    got = attention_weights(model, window, num_layers, K)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([window]), output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        want = weights[0].double().numpy()  # [Hq, T, T]
        for k in (0, 1, 7, T - 1):
            np.testing.assert_allclose(got.received[layer, :, k], want[:, k:, k].mean(axis=1), atol=1e-6)
        for k in (0, 5, T - NEAR_TOKENS - 1):
            np.testing.assert_allclose(
                got.from_afar[layer, :, k], want[:, k + NEAR_TOKENS :, k].mean(axis=1), atol=1e-6
            )
        np.testing.assert_allclose(got.late[layer], want[:, T // 2 :, :K].mean(axis=1), atol=1e-6)
    others = [
        float(w[0, h, i, k])
        for w in attentions for h in range(w.shape[1]) for i in range(T // 2, T) for k in range(K, i - NEAR_TOKENS + 1)
    ]  # fmt: skip
    assert got.base == pytest.approx(np.mean(others), rel=1e-5)


def planted(monkeypatch: pytest.MonkeyPatch, drawn: dict[int, float]) -> None:
    """Let every head give the tokens at these positions so much of its attention, and the rest its fair share."""

    def softmax(q: torch.Tensor, k: torch.Tensor, start: int, _layer: int, _arguments: Any) -> torch.Tensor:
        size = k.shape[2]
        queries = torch.arange(start, min(start + module.QUERIES_AT_ONCE, size))
        weights = torch.zeros(q.shape[1], len(queries), size)
        for row, i in enumerate(queries.tolist()):
            there = {k: w for k, w in drawn.items() if k <= i}
            weights[:, row, : i + 1] = (1 - sum(there.values())) / (i + 1)
            for position, weight in there.items():
                weights[:, row, position] += weight
        return weights

    monkeypatch.setattr(module, "_softmax", softmax)


def run(**options: Any) -> Any:
    loaded = LoadedModel(tiny_model("llama"), None, "tiny")
    return analyze(loaded, ids(4 * T), num_windows=3, window_tokens=T, num_candidates=K, **options)


def test_a_planted_sink_is_the_one_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {0: 0.6})
    report = run()
    assert report.recommended == 1
    assert report.sink_share[0] == 1.0
    assert max(report.sink_share[1:]) == 0.0
    assert report.mass_by_position[0] == pytest.approx(0.6, abs=0.02)
    assert report.secondary == ()


def test_four_planted_sinks_are_four(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {0: 0.4, 1: 0.1, 3: 0.1})
    report = run()
    assert report.recommended == 4
    assert [share > 0 for share in report.sink_share[:2]] == [True, False]  # 0.1 is below epsilon
    assert EPSILON == 0.3


def test_a_planted_secondary_sink_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {0: 0.5, 17: 0.2})
    report = run()
    assert report.recommended == 1
    positions = {position for sink in report.secondary for position in sink.positions}
    assert positions == {17}
    text = ids(4 * T)
    assert {sink.token_id for sink in report.secondary} == {text[17 + T * w] for w in range(3)}
    assert sum(sink.times for sink in report.secondary) == 3
    assert all(sink.weight == pytest.approx(0.2, abs=0.02) for sink in report.secondary)
    assert {sink.heads for sink in report.secondary} == {len(report.mass) * len(report.mass[0])}


def test_what_is_near_is_no_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    def softmax(q: torch.Tensor, k: torch.Tensor, start: int, _layer: int, _arguments: Any) -> torch.Tensor:
        weights = torch.zeros(q.shape[1], min(module.QUERIES_AT_ONCE, k.shape[2] - start), k.shape[2])
        for row in range(weights.shape[1]):
            weights[:, row, start + row] = 1.0  # every token looks at itself only
        return weights

    monkeypatch.setattr(module, "_softmax", softmax)
    report = run()
    assert (report.recommended, report.secondary) == (0, ())


def test_a_model_without_sinks_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {})
    report = run()
    assert report.recommended == 0
    assert "no sinks" in report.reason


@pytest.mark.parametrize(
    ("mass", "base", "want"),
    [([0.5, 0.001, 0.001, 0.001], 0.001, 1), ([0.2, 0.2, 0.2, 0.2], 0.001, 4), ([0.001] * 4, 0.001, 0),
     ([0.001, 0.001, 0.3, 0.001], 0.001, 3), ([0.0019] * 4, 0.001, 0), ([0.4, 0.01, 0.001, 0.001], 0.001, 2)],
)  # fmt: skip
def test_recommendation(mass: list[float], base: float, want: int) -> None:
    assert recommend(np.array(mass), base)[0] == want


def test_it_leaves_the_model_as_it_was() -> None:
    loaded = LoadedModel(tiny_model("llama"), None, "tiny")
    text = torch.tensor([ids(9)])
    with torch.no_grad():
        before = loaded.model(text).logits
        analyze(loaded, ids(T), num_windows=1, window_tokens=T, num_candidates=K)
        assert torch.equal(loaded.model(text).logits, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_windows": 0}, "windows: received 0"),
        ({"num_candidates": 0}, "candidates: received 0"),
        ({"num_candidates": 40}, "window tokens: received 96"),
        ({"num_windows": 9}, "text: received"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    loaded = LoadedModel(tiny_model("llama"), None, "tiny")
    with pytest.raises(UsageError, match=words):
        analyze(loaded, ids(4 * T), **{"num_windows": 3, "window_tokens": T, "num_candidates": K, **options})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama")
    model.resize_token_embeddings(258)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_command(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ["analyze", str(model_folder), "--text", str(text), "--windows", "2", "--window-tokens", "128"]
    outputs = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    result = CliRunner().invoke(cli, [*arguments, *outputs])
    assert result.exit_code == 0, result.output
    assert "--sink-tokens" in result.output
    facts = json.loads((tmp_path / "a.json").read_text())
    assert f"keep {facts['recommended']}" in result.output
    assert np.array(facts["mass"]).shape == (2, 6, 16)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for wrong, words in (
        (["--text", str(tmp_path / "none")], "--text"),
        (["--json", str(tmp_path / "no" / "x")], "--json"),
        (["--windows", "99"], "text: received"),
    ):
        failed = CliRunner().invoke(cli, [*arguments, *wrong])
        assert isinstance(failed.exception, UsageError)
        assert words in str(failed.exception)
    assert SECONDARY_WEIGHT == 0.05
