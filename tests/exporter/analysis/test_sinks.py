"""Sinks found against transformers' own attention weights, and planted ones found where they were planted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from sinkexport.analysis.secondary_sinks import secondary_sinks
from sinkexport.analysis.sinks import EPSILON, analyze, recommend
from sinkexport.analysis.text_windows import TextWindows, text_windows
from sinkexport.analysis.weights import NEAR_TOKENS, WeightsOf, attention_weights, refuse_unknown
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.sources import LoadedModel
from sinkexport.util.files import read_text
from sinkrt import UsageError

from tests.exporter.pipeline.test_pin_system import tokenizer
from tests.exporter.tiny_models import TINY, VOCAB_SIZE, model_with_a_sink, tiny_model
from tests.support import random_ids, run_cli

T, K = 96, 6
FAMILIES = ["llama", "llama-mha", "mistral", "gemma2", "cohere", "gpt_neox", "qwen3", "granite"]


def ids(count: int, seed: int = 0) -> list[int]:
    return random_ids(count, seed=seed).tolist()


def windows(count: int = 3, size: int = T) -> TextWindows:
    text = ids(count * size)
    return TextWindows(tuple(tuple(text[i * size : (i + 1) * size]) for i in range(count)))


def loaded(name: str = "llama") -> LoadedModel:
    return LoadedModel(tiny_model(name), None, "tiny")


def eager(model: Any, window: Any) -> list[np.ndarray]:
    """transformers' own attention weights: float64 [Hq, T, T] of each layer."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([list(window)]), output_attentions=True)
    return [layer[0].double().numpy() for layer in output.attentions]


# --- against transformers ---------------------------------------------------------------------------------------------


def layer_windows(name: str) -> list[int | None]:
    """Each layer's sliding window, as the configuration has it."""
    config = tiny_model(name).config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    own = TINY[name][1].get("sliding_window")
    return [own if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1000, 13])
def test_weights_are_those_of_transformers(name: str, rows: int) -> None:
    model, window, half = tiny_model(name), ids(T), T // 2
    got = attention_weights(model, window, K, queries_at_once=rows)
    attentions, sliding_windows = eager(model, window), layer_windows(name)
    assert len(got.received) == len(attentions) == len(sliding_windows)
    for layer, (want, own) in enumerate(zip(attentions, sliding_windows, strict=True)):
        for k in range(T):
            np.testing.assert_allclose(got.received[layer, :, k], want[:, k:, k].mean(axis=1), atol=1e-6)
            far = [i for i in range(k + NEAR_TOKENS, T) if own is None or i - k < own]
            afar = want[:, far, k].mean(axis=1) if far else np.zeros(len(want))
            np.testing.assert_allclose(got.from_afar[layer, :, k], afar, atol=1e-6)
            fair = np.mean([1 / (i + 1 if own is None else min(i + 1, own)) for i in far]) if far else 0
            assert got.fair_share[layer, k] == pytest.approx(fair, abs=1e-12)
        np.testing.assert_allclose(got.late[layer], want[:, half:, :K].mean(axis=1), atol=1e-6)
    others = [w[:, i, k] for w in attentions for i in range(half, T) for k in range(K, i - NEAR_TOKENS + 1)]
    assert got.base == pytest.approx(np.mean(others), rel=1e-5)
    assert got.sliding_window == min((own for own in sliding_windows if own), default=None)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_report_is_what_transformers_weights_give(name: str) -> None:
    epsilon = 0.03  # random weights make no sinks
    model, text = tiny_model(name), windows(3)
    report = analyze(LoadedModel(model, None, "tiny"), text, num_candidates=K, epsilon=epsilon)
    attentions = np.array([eager(model, window) for window in text.ids])  # [windows, L, Hq, T, T]
    queries = np.arange(T, 0, -1)
    alpha = (attentions.sum(axis=3) / queries)[..., :K]  # [windows, L, Hq, K]
    np.testing.assert_allclose(report.alpha, alpha.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(report.mass, attentions[:, :, :, T // 2 :, :K].mean(axis=(0, 3)), atol=1e-6)
    # A threshold of each window, not of their mean: as in the code of arXiv:2410.10781.
    want = (alpha > epsilon).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(report.sink_share, want, atol=1e-6)
    assert not np.allclose(want, (alpha.mean(axis=0) > epsilon).mean(axis=(0, 1)))
    np.testing.assert_allclose(report.layer_sinks, (alpha > epsilon).any(axis=3).mean(axis=(0, 2)), atol=1e-6)
    assert report.epsilon == epsilon


def test_norms_and_likeness_of_values() -> None:
    model, window = tiny_model("llama"), ids(T)
    attention, kept = model.model.layers[1].self_attn, {}
    for part in ("k_proj", "v_proj"):
        getattr(attention, part).register_forward_hook(lambda _m, _i, out, part=part: kept.update({part: out[0]}))
    got = attention_weights(model, window, K)
    heads = model.config.num_key_value_heads
    for part, norms in (("k_proj", got.key_norm), ("v_proj", got.value_norm)):
        want = kept[part].reshape(T, heads, -1).norm(dim=-1).mean(dim=1).numpy()  # rotation changes no norm
        np.testing.assert_allclose(norms[1], want / np.sort(want[K:])[(T - K - 1) // 2], rtol=1e-5)
    v = kept["v_proj"].numpy()
    cosines = v @ v[0] / np.linalg.norm(v, axis=1) / np.linalg.norm(v[0])
    np.testing.assert_allclose(got.likeness[1], cosines, atol=1e-5)
    assert got.likeness[:, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_goes_on_as_without_us(name: str) -> None:
    """Attention is computed by us while it is measured: deeper layers must see what they would see without."""
    model, text = tiny_model(name), torch.tensor([ids(T)])
    seen: list[torch.Tensor] = []
    norm = model.get_output_embeddings()
    norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][:, -1]))
    with torch.no_grad():
        before = model(text).logits
        attention_weights(model, text[0].tolist(), K)
        assert torch.equal(model(text).logits, before)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)


# --- planted sinks ----------------------------------------------------------------------------------------------------


def planted(drawn: dict[int, float]) -> WeightsOf:
    """Attention whose every head gives these positions so much, and the other tokens equal shares of the rest."""

    def softmax(q: torch.Tensor, _k: torch.Tensor, start: int, stop: int, _arguments: Any) -> torch.Tensor:
        weights = torch.zeros(q.shape[1], stop - start, stop)
        for row, i in enumerate(range(start, stop)):
            there = {k: w for k, w in drawn.items() if k <= i}
            weights[:, row, : i + 1] = (1 - sum(there.values())) / (i + 1)
            for position, weight in there.items():
                weights[:, row, position] += weight
        return weights

    return softmax


def test_a_planted_sink_is_the_one_to_keep() -> None:
    report = analyze(loaded(), windows(), num_candidates=K, weights_of=planted({0: 0.6}))
    assert report.recommended == 1
    assert report.sink_share[0] == 1.0
    assert max(report.sink_share[1:]) == 0.0
    assert report.layer_sinks == (1.0,) * len(report.mass)
    assert report.mass_by_position[0] == pytest.approx(0.6, abs=0.02)
    assert report.secondary == ()


def test_four_planted_sinks_are_four() -> None:
    report = analyze(loaded(), windows(), num_candidates=K, weights_of=planted({0: 0.4, 1: 0.1, 3: 0.1}))
    assert report.recommended == 4
    assert [share > 0 for share in report.sink_share[:2]] == [True, False]  # 0.1 is below epsilon
    assert EPSILON == 0.3


def test_a_planted_secondary_sink_is_listed() -> None:
    text = windows()
    report = analyze(loaded(), text, num_candidates=K, weights_of=planted({0: 0.5, 17: 0.2}))
    assert report.recommended == 1
    sightings = [seen for sink in report.secondary for seen in sink.sightings]
    assert sorted((seen.window, seen.position) for seen in sightings) == [(0, 17), (1, 17), (2, 17)]
    assert {sink.token_id for sink in report.secondary} == {window[17] for window in text.ids}
    assert all(seen.weight == pytest.approx(0.2, abs=0.02) for seen in sightings)
    assert {sink.heads for sink in report.secondary} == {len(report.mass) * len(report.mass[0])}
    assert {seen.layers for seen in sightings} == {tuple(range(len(report.mass)))}


def test_a_token_that_recurs_is_one_entry() -> None:
    """The first token's own id as a later sink: the value's direction is the same in the first layer, at least."""
    window = [7, *ids(T - 1)]
    window[9] = window[20] = 7
    model = tiny_model("llama")
    report = analyze(
        LoadedModel(model, None, "tiny"),
        TextWindows((tuple(window),) * 2),
        num_candidates=K,
        weights_of=planted({0: 0.4, 9: 0.2, 20: 0.1}),
    )
    (sink,) = [sink for sink in report.secondary if sink.token_id == 7]
    assert (sink.times, sink.windows) == (4, 2)
    assert [seen.position for seen in sink.sightings] == [9, 9, 20, 20]  # heaviest first
    got = attention_weights(model, window, K)
    assert got.likeness[0, [9, 20]] == pytest.approx(1.0)  # before any attention only the id counts
    assert sink.is_like_first == (sink.sightings[0].likeness > 0.5)


def test_those_like_the_first_token_come_first() -> None:
    window = [7, *ids(T - 1)]
    window[9], window[20] = 7, 8
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to embeddings: equal ids have equal values in each layer
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    report = analyze(
        LoadedModel(model, None, "tiny"),
        TextWindows((tuple(window),)),
        num_candidates=K,
        weights_of=planted({0: 0.3, 9: 0.1, 20: 0.3}),
    )
    assert [(sink.token_id, sink.is_like_first) for sink in report.secondary] == [(7, True), (8, False)]
    assert report.secondary[0].sightings[0].likeness == pytest.approx(1.0)


def test_what_is_near_is_no_sink() -> None:
    def softmax(q: torch.Tensor, _k: torch.Tensor, start: int, stop: int, _arguments: Any) -> torch.Tensor:
        own = torch.cat((torch.zeros(stop - start, start), torch.eye(stop - start)), dim=1)
        return own.expand(q.shape[1], -1, -1)  # every token looks at itself only

    report = analyze(loaded(), windows(), num_candidates=K, weights_of=softmax)
    assert (report.recommended, report.secondary) == (0, ())


def test_a_model_without_sinks_needs_none() -> None:
    report = analyze(loaded(), windows(), num_candidates=K, weights_of=planted({}))
    assert report.recommended == 0
    assert "no sinks" in report.reason
    assert report.secondary == ()


def test_in_a_short_window_a_fair_share_is_no_sink() -> None:
    """5% is what each of 20 tokens gets: a secondary sink must draw several times its share as well."""
    weights = attention_weights(tiny_model("llama"), ids(T), K)
    level = np.full_like(weights.from_afar, 0.06)
    fair = np.full_like(weights.fair_share, 0.02)
    for share, expected in ((fair, 0), (fair / 2, T - K - 2 * NEAR_TOKENS)):
        changed = dataclasses.replace(weights, from_afar=level, fair_share=share)
        assert len(list(secondary_sinks(changed, 0, K))) == expected


def test_a_sink_made_of_weights_is_found() -> None:
    """No attention is faked: token 5 gets a key that every query likes, wherever it stands."""
    model = model_with_a_sink(token=5)
    window = [x if x != 5 else 6 for x in ids(T)]
    window[2], window[25] = 5, 5
    report = analyze(LoadedModel(model, None, "tiny"), TextWindows((tuple(window),)), num_candidates=K)
    assert report.recommended == 3
    assert [k for k, share in enumerate(report.sink_share) if share > 0] == [2]
    assert [(sink.token_id, sink.sightings[0].position) for sink in report.secondary] == [(5, 25)]


@pytest.mark.parametrize(
    ("mass", "base", "want"),
    [
        ([0.5, 0.001, 0.001, 0.001], 0.001, 1),
        ([0.2, 0.2, 0.2, 0.2], 0.001, 4),
        ([0.001] * 4, 0.001, 0),
        ([0.001, 0.001, 0.3, 0.001], 0.001, 3),
        ([0.0029] * 4, 0.001, 0),
        ([0.4, 0.01, 0.001, 0.001], 0.001, 2),
        ([0.2, *[0.0018] * 15], 0.001, 1),
        ([0.0] * 4, 0.0, 0),
        ([1.0, 0.0], 0.0, 1),
    ],
)
def test_recommendation(mass: list[float], base: float, want: int) -> None:
    assert recommend(np.array(mass), base)[0] == want


def test_sinks_up_to_the_last_candidate_ask_for_more_candidates() -> None:
    assert "raise --candidates" in recommend(np.full(4, 0.1), 0.001)[1]
    assert "raise --candidates" not in recommend(np.array([0.4, 0.001]), 0.001)[1]


# --- windows of text --------------------------------------------------------------------------------------------------


class Counting(SourceTokenizer):
    """A tokenizer that remembers how much text it was given."""

    longest = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        type(self).longest = max(self.longest, len(text))
        return super().encode(text, special=special)


def words(beginning: str | None = None, end: str | None = None) -> SourceTokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if beginning or end:
        single = " ".join(x for x in (beginning, "$A", end) if x)
        special = [(x, int(x[1:])) for x in (beginning, end) if x]
        inner.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    return SourceTokenizer("words", inner)


@pytest.mark.parametrize(
    ("beginning", "end", "marks"), [(None, None, []), ("w1", None, [1]), ("w1", "w2", [1]), (None, "w2", [])]
)
def test_every_window_begins_as_a_text_does(beginning: str | None, end: str | None, marks: list[int]) -> None:
    numbers = [3 + i % 90 for i in range(100)]
    text = " ".join(f"w{i}" for i in numbers)
    got = text_windows(words(beginning, end), text, 3, 20)
    piece = 20 - len(marks)
    assert [list(window) for window in got.ids] == [
        marks + numbers[start : start + piece] for start in (0, piece, 2 * piece)
    ]
    assert got.beginning == len(marks)


def test_a_text_of_exactly_the_needed_tokens_is_enough() -> None:
    text = " ".join(f"w{3 + i % 90}" for i in range(57))
    assert [len(window) for window in text_windows(words("w1"), text, 3, 20).ids] == [20] * 3
    with pytest.raises(UsageError, match="text: received 56 tokens, expected 3 windows of 20 tokens"):
        text_windows(words("w1"), text[: text.rindex(" ")], 3, 20)


def test_long_words_need_more_text_and_the_rest_is_not_encoded() -> None:
    text = ("x" * 99 + " ") * 5000
    counting = Counting("words", words().library)
    assert [len(window) for window in text_windows(counting, text, 2, 20).ids] == [20] * 2
    assert counting.longest < 10_000


def test_of_a_long_file_the_beginning_is_read(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("aé\r\n".encode() * 3 + b"\xff")
    assert read_text(file, "--text", 6) == "aé\na"
    assert read_text(file, "--text", 7) == "aé\na"  # the second é is cut in two
    assert read_text(file, "--text", 8) == "aé\naé"
    for limit in (None, 16, 99):
        with pytest.raises(UsageError, match=r"--text: .*at byte 15"):
            read_text(file, "--text", limit)


# --- bad input and the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_windows", "size", "candidates", "words"),
    [
        (0, T, K, "windows: received 0"),
        (1, T, 0, "candidates: received 0"),
        (1, T, 40, "window tokens: received 96"),
        (1, T, T, "window tokens: received 96"),
        (1, 513, K, "window tokens: received 513, expected <= 512"),
    ],
)
def test_refused(num_windows: int, size: int, candidates: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        analyze(loaded(), windows(num_windows, size), num_candidates=candidates)


def test_a_model_that_computes_no_numbers_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(UsageError, match="not a number"):
        analyze(LoadedModel(model, None, "tiny"), windows(1), num_candidates=K)


def test_unknown_attention_is_refused() -> None:
    arguments = {"scaling": 1.0, "dropout": 0.0, "s_aux": torch.ones(1), "sliding_window": None}
    with pytest.raises(UsageError, match="'s_aux' in layer 3"):
        refuse_unknown(arguments, 3)


def test_progress_counts_layers() -> None:
    reports: list[tuple[str, int, int]] = []
    analyze(loaded(), windows(2), num_candidates=K, report=lambda *stage: reports.append(stage))
    assert reports == [("layers", done, 4) for done in range(5)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama")
    model.resize_token_embeddings(258)
    model.save_pretrained(folder)
    tokenizer().save(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return file


def arguments(model: Path, text: Path, *more: str) -> list[str]:
    return ["analyze", str(model), "--text", str(text), "--windows", "2", "--window-tokens", "128", *more]


def test_command(model_folder: Path, text: Path, tmp_path: Path) -> None:
    outputs = []
    for name in ("a", "b"):
        files = ("--json", str(tmp_path / f"{name}.json"), "--plot", str(tmp_path / f"{name}.png"))
        result = run_cli(*arguments(model_folder, text, *files))
        result.succeeded()
        outputs.append(result.out)
    assert outputs[0] == outputs[1]
    for kind in ("json", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    facts = json.loads((tmp_path / "a.json").read_text())
    assert f"keep {facts['recommended']}: {facts['reason']}" in outputs[0]
    assert f"--sink-tokens {facts['recommended']}" in outputs[0]
    assert np.array(facts["mass"]).shape == np.array(facts["alpha"]).shape == (2, 6, 16)
    assert np.array(facts["value_norm"]).shape == np.array(facts["key_norm"]).shape == (2, 16)
    image = (tmp_path / "a.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "b.json", "b.png", "text"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--text", "nowhere"], "--text: received 'nowhere' (No such file"),
        (["--text", "latin1"], "expected UTF-8 text"),
        (["--json", "no/x"], "--json: received 'no/x'"),
        (["--plot", "no/x"], "--plot: received 'no/x'"),
        (["--json", "x", "--plot", "./x"], "--plot: received 'x', as --json"),
        (["--windows", "99"], "text: received"),
        (["--windows", "0"], "windows: received 0"),
        (["--windows", "-3"], "windows: received -3"),
        (["--candidates", "0"], "candidates: received 0"),
        (["--candidates", "128"], "window tokens: received 128"),
        (["--window-tokens", "0"], "window tokens: received 0"),
        (["--windows", "1", "--window-tokens", "600"], "window tokens: received 600, expected <= 512"),
    ],
)
def test_command_refuses(
    more: list[str], words: str, model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1").write_bytes(b"caf\xe9 " * 900)
    before = sorted(tmp_path.iterdir())
    failed = run_cli(*arguments(model_folder, text, *more))
    failed.refusal(words)
    assert sorted(tmp_path.iterdir()) == before


def test_command_refuses_a_model_without_tokenizer(text: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    failed = run_cli(*arguments(tmp_path / "bare", text))
    failed.refusal("without a tokenizer")


def test_command_reports_a_sliding_window(model_folder: Path, text: Path, tmp_path: Path) -> None:
    model = tiny_model("mistral")
    model.resize_token_embeddings(258)
    model.save_pretrained(tmp_path / "sliding")
    tokenizer().save(tmp_path / "sliding")
    note = "look back 64 tokens"
    assert note in run_cli(*arguments(tmp_path / "sliding", text)).err
    assert note not in run_cli(*arguments(model_folder, text)).err
