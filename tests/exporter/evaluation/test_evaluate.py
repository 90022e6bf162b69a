"""`eval`: every predictor predicts what its definition says, the figures are those of the predictions, files are whole.

Random weights predict a random text no better in one way than in another; so each predictor is compared with an
independent computation of its logits, token by token.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.evaluation import baselines
from sinkexport.evaluation.evaluate import BaselineOptions, EvalReport, evaluate
from sinkexport.evaluation.perplexity import Curve, Prediction, Predictor, Segment, measure, token_nll
from sinkexport.evaluation.plot import draw
from sinkexport.reference.streaming import streaming_reference
from sinkexport.sources import LoadedModel
from sinkrt import Session
from sinkrt.errors import BackendError, BundleError, UsageError

from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.support import export_model, random_ids, run_cli

S, W = 3, 12
C = S + W
NUM_TOKENS = 5 * C + 4
SEGMENT = 16
IDS = random_ids(NUM_TOKENS, first=0)
TEXT = " ".join(f"w{i}" for i in IDS)
FAMILIES = ("llama", "gpt_neox", "cohere", "gemma2")


def export(model: Any, folder: Path, *, batch: int = 1, tokenizer: Any = None) -> Path:
    export_model(model, folder, num_sink_tokens=S, window_size=W, batch=batch, chunk_size=1, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("eval") / "bundle", tokenizer=tiny_tokenizer())


def dense_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """float32 [n, vocab] of one forward pass."""
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
    return logits


def streamed_logits(model: Any, num_sink_tokens: int, window_size: int) -> np.ndarray:
    with streaming_reference(model, num_sink_tokens, window_size) as reference:
        return np.stack([reference.step(torch.tensor([i]))[0].numpy() for i in IDS[:-1]])


def gathered(predictor: Predictor) -> np.ndarray:
    """All logits of a predictor, checked to predict tokens 1, 2, .. in order."""
    rows: list[np.ndarray] = []
    for prediction in predictor.predictions():
        assert prediction.first_token == len(rows) + 1
        rows += list(prediction.logits.copy())
    assert len(rows) == predictor.num_tokens
    return np.stack(rows)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * want.std()


def nll_of(logits: np.ndarray) -> np.ndarray:
    """Negative log likelihoods of tokens 1 .. n by torch, float64 [n]."""
    targets = torch.from_numpy(IDS[1 : len(logits) + 1])
    return torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), targets, reduction="none").numpy()


# --- scores -----------------------------------------------------------------------------------------------------------


def test_token_nll() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(41, 50)).astype(np.float32) * 30
    targets = rng.integers(0, 50, 41)
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(token_nll(logits, targets), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(token_nll(logits + np.float32(4096), targets), want, rtol=0, atol=1e-2)
    unlikely = np.array([[0.0, -1e5, -np.inf]])
    assert token_nll(unlikely, np.array([1])) == pytest.approx(1e5)  # float32 exp would give infinity
    assert token_nll(unlikely, np.array([2])) == np.inf
    assert token_nll(unlikely, np.array([0])) == 0.0


def predictor_of(logits: np.ndarray, lengths: int = 7) -> Predictor:
    def predictions() -> Iterator[Prediction]:
        buffer = np.empty_like(logits[:lengths])  # reused, as a session's is
        for start in range(0, len(logits), lengths):
            piece = logits[start : start + lengths]
            buffer[: len(piece)] = piece
            yield Prediction(start + 1, buffer[: len(piece)])

    return Predictor("x", "given logits", len(logits), predictions)


def test_measure_sums_up_by_segment_and_by_eviction() -> None:
    logits = np.random.default_rng(2).normal(size=(NUM_TOKENS - 1, VOCAB_SIZE)).astype(np.float32) * 3
    nll = nll_of(logits)  # nll[i] is that of token i + 1
    curve = measure(predictor_of(logits), IDS, segment_tokens=SEGMENT, capacity=C)
    assert curve.num_tokens == NUM_TOKENS - 1
    assert curve.nll == pytest.approx(nll.mean(), rel=1e-12)
    assert curve.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-12)
    assert curve.perplexity_before == pytest.approx(np.exp(nll[:C].mean()), rel=1e-12)  # token C is step C - 1's
    assert curve.perplexity_after == pytest.approx(np.exp(nll[C:].mean()), rel=1e-12)
    starts = range(0, NUM_TOKENS, SEGMENT)
    assert [(s.first_token, s.num_tokens) for s in curve.segments] == [
        (max(1, start), min(start + SEGMENT, NUM_TOKENS) - max(1, start)) for start in starts
    ]
    for segment in curve.segments:
        tokens = nll[segment.first_token - 1 : segment.first_token - 1 + segment.num_tokens]
        assert segment.nll == pytest.approx(tokens.mean(), rel=1e-12)
        assert segment.perplexity == pytest.approx(np.exp(tokens.mean()), rel=1e-12)


def test_standard_error_is_that_of_repeated_texts() -> None:
    """Over many texts of segments that differ as wholes, the perplexities spread as each of them says."""
    rng, found = np.random.default_rng(3), []
    ids = np.zeros(320, dtype=np.int64)
    for _ in range(600):
        nll = np.repeat(rng.normal(2.0, 0.3, 20), 16) + rng.normal(0, 0.2, 320)  # 20 segments of 16 tokens
        nll = nll[1:]  # the first has one less
        logits = np.stack((-nll, np.log1p(-np.exp(-nll))), axis=1)  # two tokens; 0 has this likelihood
        found.append(measure(predictor_of(logits, 320), ids, segment_tokens=16, capacity=C))
    spread = np.std([curve.perplexity for curve in found])
    assert np.mean([curve.standard_error for curve in found]) == pytest.approx(spread, rel=0.12)


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary() -> None:
    curve = measure(predictor_of(np.zeros((NUM_TOKENS - 1, VOCAB_SIZE))), IDS, segment_tokens=SEGMENT, capacity=C)
    assert curve.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-12)
    assert curve.standard_error == pytest.approx(0, abs=1e-9)


def test_short_of_a_second_segment_or_of_eviction_nothing_is_claimed() -> None:
    logits = np.zeros((NUM_TOKENS - 1, VOCAB_SIZE))
    curve = measure(predictor_of(logits), IDS, segment_tokens=NUM_TOKENS, capacity=NUM_TOKENS)
    assert (curve.standard_error, curve.perplexity_after) == (None, None)
    assert curve.perplexity_before == curve.perplexity
    assert len(curve.segments) == 1


def test_what_is_no_number_is_reported() -> None:
    logits = np.zeros((NUM_TOKENS - 1, VOCAB_SIZE))
    logits[40, 7] = np.nan
    with pytest.raises(BackendError, match=r"prediction of token 41: .*not numbers"):
        measure(predictor_of(logits), IDS, segment_tokens=SEGMENT, capacity=C)


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_predicts_as_one_forward_pass_until_its_limit(name: str) -> None:
    model = tiny_model(name)
    want = dense_logits(model, IDS[:-1])
    assert_close(gathered(baselines.dense(model, IDS, 10_000, chunk_tokens=11)), want)
    assert_close(gathered(baselines.dense(model, IDS, 30, chunk_tokens=11)), want[:30])


@pytest.mark.parametrize("block", [1, 4, C])
@pytest.mark.parametrize("name", FAMILIES)
def test_recomputation_runs_the_last_tokens_anew(name: str, block: int) -> None:
    model = tiny_model(name)
    want = list(dense_logits(model, IDS[:C]))
    for t in range(C, NUM_TOKENS - 1):
        end = min(C + ((t - C) // block + 1) * block, NUM_TOKENS - 1)  # of the run that predicts token t + 1
        context = IDS[end - C : t + 1]
        assert C - block + 1 <= len(context) <= C
        want.append(dense_logits(model, context)[-1])
    assert_close(gathered(baselines.recomputation(model, IDS, C, block)), np.stack(want))


@pytest.mark.parametrize("geometry", [(S, W), (0, C)])
@pytest.mark.parametrize("name", FAMILIES)
def test_sinks_and_window_predicts_as_the_reference(name: str, geometry: tuple[int, int]) -> None:
    model = tiny_model(name)
    predictor = baselines.sinks_and_window(model, IDS, *geometry, name="x", chunk_tokens=13)
    assert_close(gathered(predictor), streamed_logits(model, *geometry))


# --- the whole --------------------------------------------------------------------------------------------------------


def test_all_baselines_over_one_text(bundle: Path, model: Any, loaded: LoadedModel) -> None:
    stages: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()
    found = evaluate(
        bundle,
        TEXT,
        segment_tokens=SEGMENT,
        compare=BaselineOptions(loaded, dense_tokens=40),
        threads=1,
        report=lambda *stage: stages.append(stage),
    )
    curves = {curve.name: curve for curve in found.curves}
    assert list(curves) == ["bundle", "sinks + window", "window only", "recompute", "dense"]
    ours = nll_of(streamed_logits(model, S, W))
    assert curves["bundle"].nll == pytest.approx(ours.mean(), rel=1e-5)
    assert curves["sinks + window"].nll == pytest.approx(ours.mean(), rel=1e-5)
    assert [s.nll for s in curves["bundle"].segments] == pytest.approx(
        [s.nll for s in curves["sinks + window"].segments], rel=1e-4
    )
    assert curves["window only"].nll == pytest.approx(nll_of(streamed_logits(model, 0, C)).mean(), rel=1e-5)
    assert curves["dense"].nll == pytest.approx(nll_of(dense_logits(model, IDS[:40])).mean(), rel=1e-5)
    assert {name: curve.num_tokens for name, curve in curves.items() if name != "dense"} == dict.fromkeys(
        ("bundle", "sinks + window", "window only", "recompute"), NUM_TOKENS - 1
    )
    assert curves["dense"].num_tokens == 40
    before = curves["bundle"].perplexity_before  # nothing has been evicted: all compute the dense model
    assert before is not None
    for curve in found.curves:
        assert curve.perplexity_before == pytest.approx(before, rel=1e-4)
        reports = [done for stage, done, _ in stages if stage == curve.name]
        assert reports[0] == 0
        assert reports == sorted(set(reports))
        assert reports[-1] == curve.num_tokens
    assert curves["window only"].perplexity_after != pytest.approx(curves["bundle"].perplexity_after, rel=1e-3)
    assert torch.get_num_threads() == threads


def test_dense_stops_at_the_models_own_limit(bundle: Path) -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = 33
    found = evaluate(bundle, TEXT, segment_tokens=SEGMENT, compare=BaselineOptions(LoadedModel(model, None, "tiny")))
    assert found.curves[-1].num_tokens == 33
    assert len(found.curves[-1].segments) == 3


def test_only_the_first_tokens_of_a_text_count(bundle: Path, model: Any) -> None:
    found = evaluate(bundle, TEXT, num_tokens=20, segment_tokens=5)
    assert (found.num_tokens, found.curves[0].num_tokens) == (20, 19)
    assert found.curves[0].nll == pytest.approx(nll_of(streamed_logits(model, S, W))[:19].mean(), rel=1e-5)


def test_a_second_evaluation_in_one_session_starts_anew(bundle: Path) -> None:
    from sinkrt.session import Session

    with Session.load(bundle, threads=1) as session:
        predictor = baselines.bundle(session, IDS, "")
        first = gathered(predictor)
        assert np.array_equal(gathered(predictor), first)


# --- report and plot --------------------------------------------------------------------------------------------------


def report_of(*curves: Curve) -> EvalReport:
    return EvalReport("b", "tiny", "float32", "ort", S, W, NUM_TOKENS, SEGMENT, curves)


def curve_of(name: str, perplexities: list[float]) -> Curve:
    segments = tuple(Segment(max(1, i * SEGMENT), SEGMENT, 1.0, p) for i, p in enumerate(perplexities))
    return Curve(name, "note", 99, 1.0, 2.718, None, 2.0, None, 10.0, 1.0, segments)


def test_json_has_all_figures_and_no_infinity() -> None:
    facts = json.loads(
        report_of(curve_of("bundle", [3.0, float("inf")])).to_json(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert (facts["num_sink_tokens"], facts["window_size"], facts["num_tokens"]) == (S, W, NUM_TOKENS)
    assert [s["perplexity"] for s in facts["curves"][0]["segments"]] == [3.0, None]


def test_plot_has_a_line_for_each_curve_that_ends_where_it_ends(tmp_path: Path) -> None:
    figure = draw(report_of(curve_of("bundle", [9.0, 8.0, 7.0, 6.0]), curve_of("dense", [9.0, 7.0])))
    (axes,) = figure.axes
    first, second, boundary = axes.lines
    assert list(first.get_ydata()) == [9.0, 8.0, 7.0, 6.0]
    assert list(first.get_xdata()) == [1 + SEGMENT / 2] + [(i + 0.5) * SEGMENT for i in (1, 2, 3)]
    assert list(second.get_ydata()) == [9.0, 7.0]
    assert list(boundary.get_xdata()) == [C, C]
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "bundle (note): 2.7",
        "dense (note): 2.7",
        f"cache full ({C} tokens)",
    ]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "text: received 0 tokens, expected at least 2"),
        ("w7", {}, "text: received 1 token, expected at least 2"),
        (TEXT, {"segment_tokens": 0}, "segment: received 0, expected >= 1"),
        (TEXT, {"num_tokens": 1}, "tokens: received 1, expected >= 2"),
        (TEXT, {"compare": BaselineOptions("nowhere/at/all")}, "no such folder"),
        (TEXT, {"compare": BaselineOptions("x", dense_tokens=0)}, "dense tokens: received 0"),
        (
            TEXT,
            {"compare": BaselineOptions("x", recompute_block=0)},
            f"recompute block: received 0, expected 1 .. .*{C};",
        ),
        (TEXT, {"compare": BaselineOptions("x", recompute_block=C + 1)}, f"recompute block: received {C + 1}"),
    ],
)
def test_refused(text: str, arguments: dict[str, Any], message: str, bundle: Path) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(bundle, text, **arguments)


def test_bundles_that_cannot_be_evaluated(bundle: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer: received a bundle without one"):
        evaluate(export(model, tmp_path / "ids"), TEXT)
    several = export(model, tmp_path / "several", batch=2, tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError, match="eval: received a bundle of 2 streams, expected batch 1"):
        evaluate(several, TEXT)
    with pytest.raises(BundleError):
        evaluate(tmp_path, TEXT)
    other = LoadedModel(tiny_model("qwen3"), None, "other")
    with pytest.raises(UsageError, match="model's architecture: received Qwen3ForCausalLM"):
        evaluate(bundle, TEXT, compare=BaselineOptions(other))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_command(
    bundle: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    compared = ("--compare", "--against", model_folder, "--segment", 16, "--recompute-block", 1)
    shown = run_cli("eval", bundle, "--text", text_file, *compared).succeeded()
    facts = json.loads((tmp_path / "eval.json").read_text())
    assert [curve["name"] for curve in facts["curves"]] == [
        "bundle",
        "sinks + window",
        "window only",
        "recompute",
        "dense",
    ]
    for curve in facts["curves"]:
        assert f"{curve['perplexity']:.2f}" in shown.out
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "eval.png", "text.txt"]
    assert "wrote eval.json and eval.png" in shown.err


def test_command_without_plot(bundle: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    monkeypatch.chdir(tmp_path)
    result = run_cli("eval", bundle, "--text", text_file, "--no-plot", "--json", out, "--tokens", 30).succeeded()
    assert json.loads(out.read_text())["num_tokens"] == 30
    assert not list(tmp_path.glob("*.png"))
    assert "--" not in result.err


def test_command_refuses_with_exit_code_2(
    bundle: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "one.txt").write_text("w3")
    good = (bundle, "--text", text_file)
    before = sorted(tmp_path.iterdir())
    for arguments, reason in (
        ((bundle,), "--text"),
        ((bundle, "--text", tmp_path / "nowhere.txt"), "--text: received"),
        ((bundle, "--text", tmp_path / "latin1.txt"), "UTF-8"),
        ((bundle, "--text", tmp_path / "one.txt"), "received 1 token"),
        ((*good, "--compare"), "--compare: received no model, expected --against MODEL"),
        ((*good, "--against", model_folder), "--against: received without --compare"),
        ((*good, "--recompute-block", 3), "--recompute-block: received without --compare"),
        ((*good, "--segment", 0), "segment: received 0"),
        ((*good, "--tokens", 0), "tokens: received 0"),
        ((*good, "--json", tmp_path / "no" / "x.json"), "--json: received"),
        ((*good, "--json", tmp_path), "it is a folder"),
        ((*good, "--plot", tmp_path / "eval.json"), "as --json"),
        ((*good, "--compare", "--against", tmp_path / "none"), "no such folder"),
        ((tmp_path, "--text", text_file), "manifest.json"),
    ):
        run_cli("eval", *arguments).refusal(reason)
        assert sorted(tmp_path.iterdir()) == before  # no half-written file is left


def test_outputs_are_checked_before_the_bundle_is_opened(text_file: Path, tmp_path: Path) -> None:
    """An hour of work must not end at a folder that does not exist."""
    options = ("--text", text_file, "--json", tmp_path / "no" / "x.json")
    run_cli("eval", tmp_path / "no-bundle", *options).refusal("--json")


def test_an_interrupted_run_leaves_the_old_results(
    bundle: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    out.write_text("old")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "step", interrupted)
    assert run_cli("eval", bundle, "--text", text_file, "--json", out, "--no-plot").code == 130
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "text.txt"]


def test_a_bundle_is_evaluated_without_torch(bundle: Path, text_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from sinkexport import cli\n"
        f"sys.argv = ['sinkexport', 'eval', {str(bundle)!r}, '--text', {str(text_file)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnx')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "eval.png").is_file()


def test_the_command_module_imports_nothing_heavy() -> None:
    code = (
        "import sinkexport.commands.eval, sys\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'onnxruntime', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
