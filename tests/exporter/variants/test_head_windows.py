"""Windows of single key heads: bundles against the reference and against the oracle, past six wraps of each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sinkexport.analysis.sinks import analyze
from sinkexport.analysis.text_windows import TextWindows
from sinkexport.config import ExportConfig
from sinkexport.evaluation.parity import verify
from sinkexport.pipeline.export import export_loaded
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.reference.streaming import streaming_reference
from sinkexport.sources import LoadedModel
from sinkexport.variants.head_windows import HeadWindowFile, WindowedModel
from sinkexport.variants.sink_tuning import ActPart, SinkTuningFile, TunedModel
from sinkexport.variants.variant import AttentionVariant, head_windows_of
from sinkrt import Session, StateError
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import BundleError

from tests.exporter.tiny_models import tiny_model, tiny_tokenizer
from tests.reference.oracle import SinkAttentionOracle
from tests.support import SharedExports, random_ids, run_cli

S = 3
LLAMA = ((9, 4), (5, 9))  # two layers of two key heads; the groups of the second are out of order


def window_file(name: str, windows: tuple[tuple[int, ...], ...]) -> HeadWindowFile:
    model = WindowedModel(
        name=name, architecture=type(tiny_model(name)).__name__, num_layers=len(windows), num_kv_heads=len(windows[0])
    )
    return HeadWindowFile(model=model, windows=windows)


def exported(name: str, windows: tuple[tuple[int, ...], ...], folder: Path, **options: object) -> LoadedModel:
    loaded = LoadedModel(tiny_model(name), None, "tiny")
    asked = window_file(name, windows)
    export_loaded(loaded, folder, ExportConfig(S, asked.longest, budgets=asked, **options))
    return loaded


@pytest.fixture
def windowed(shared_export: SharedExports) -> Path:
    """A bundle of `llama` with the windows `LLAMA`, to read."""
    return shared_export("llama", num_sink_tokens=S, window_size=9, budgets=window_file("llama", LLAMA)).path


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", LLAMA),
        ("llama-mha", ((9, 2, 9, 4, 2, 4), (9, 9, 9, 9, 9, 9))),  # three groups that interleave; a layer as a whole
        ("gpt_oss", ((9, 4), (5, 9))),  # sink logits; a layer with a window of its own, 7, and so without sinks
    ],
)
def test_bundles_pass_verify(name: str, windows: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    """Six wraps of the longest window, many more of the others; chunks against steps."""
    loaded = exported(name, windows, tmp_path / "b", batch=2)
    assert verify(tmp_path / "b", loaded, tolerance=1e-4).failures == ()
    manifest = load_manifest(tmp_path / "b")
    assert manifest.stream.chunk_size == min(map(min, windows))
    lengths = {s.shape[2] for s in manifest.states if s.kind == "window_k"}
    assert len(lengths) > 1
    found = head_windows_of(manifest)
    assert found is not None
    kept = sum(w * manifest.model.head_dim * 2 * 4 * 2 for layer in found for w in layer)  # k and v, B = 2
    assert sum(s.nbytes for s in manifest.states if s.kind.startswith("window")) == kept
    # It must notice windows that are others than the manifest's.
    swapped = tuple(
        dataclasses.replace(group, kv_heads=tuple(manifest.model.num_kv_heads - 1 - h for h in group.kv_heads))
        for group in manifest.head_windows or ()
    )
    (tmp_path / "b" / "manifest.json").write_text(dataclasses.replace(manifest, head_windows=swapped).to_json())
    assert "streaming" in {line.partition(":")[0] for line in verify(tmp_path / "b", loaded).failures}


def test_the_reference_gives_each_head_what_the_oracle_gives_it() -> None:
    """The oracle of one window, run for each of the windows, on the same tokens; each head takes its own."""
    model, windows = tiny_model("llama").double(), LLAMA
    seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    ids = random_ids(1, 3 * (S + 9), seed=4)
    with streaming_reference(
        model,
        S,
        9,
        observer=lambda m, q, k, v, out: seen.append((m.layer_idx, q, k, v, out)),
        variant=AttentionVariant(head_windows=windows),
    ) as reference:
        for column in ids.T:
            reference.step(torch.from_numpy(column))
    inv_freq = model.model.rotary_emb.inv_freq.numpy()
    oracles = {
        (layer, w): SinkAttentionOracle(batch=1, num_sink_tokens=S, window_size=w, inv_freq=inv_freq)
        for layer, own in enumerate(windows)
        for w in set(own)
    }
    for layer, q, k, v, out in seen:
        outs = {w: oracles[layer, w].step(*(x[:, :, 0].numpy() for x in (q, k, v))) for w in set(windows[layer])}
        for head in range(6):
            want = outs[windows[layer][head // 3]][0, head]
            np.testing.assert_allclose(out[0, 0, head].numpy(), want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["fp", "int8"])
def test_chunks_in_torch_agree_with_the_bundle_with_tuned_sinks(kv: str, tmp_path: Path) -> None:
    factors = tuple(tuple(row) for row in np.random.default_rng(3).uniform(0.1, 6.0, (2, 6)).round(3).tolist())
    # Later sinks of both groups of the first layer, and of one of the second.
    act = ActPart(alpha=1.0, beta=0.2, min_queries=2, heads=((True, False, True) * 2, (False,) * 3 + (True,) * 3))
    tuned = SinkTuningFile(
        model=TunedModel(name="t", architecture="LlamaForCausalLM", num_layers=2, num_q_heads=6),
        act=act,
        first_token_scale=factors,
    )
    loaded = exported("llama", LLAMA, tmp_path / "b", kv=kv, sink_tuning=tuned)
    ids = random_ids(70)
    masses = {s.input: s.shape for s in load_manifest(tmp_path / "b").states if s.kind == "attention_mass"}
    assert masses == {f"attention_mass.{at}": (1, 3, 2, w) for at, w in (("0.0", 9), ("0.1", 4), ("1.0", 9))}
    variant = AttentionVariant(sink_tuning=tuned.facts, head_windows=LLAMA)
    with chunked_streaming(loaded.model, S, 9, kv, variant) as stream:
        want = torch.cat([stream.feed(torch.from_numpy(ids[None, i : i + 11])) for i in range(0, 70, 11)], dim=1)[0]
    with Session.load(tmp_path / "b", threads=1) as session:
        got = np.stack([session.step(ids[t : t + 1])[0].copy() for t in range(70)])
    np.testing.assert_allclose(got, want.numpy(), atol=2e-3 if kv == "fp" else 0.3)


@pytest.mark.slow
def test_states_are_saved_and_belong_to_their_budgets(windowed: Path, tmp_path: Path) -> None:
    exported("llama", ((4, 9), (5, 9)), tmp_path / "b")
    ids = random_ids(1, 40, seed=1)
    with Session.load(windowed, threads=1) as session, Session.load(tmp_path / "b", threads=1) as other:
        session.prefill(ids[:, :33])
        session.save_state(tmp_path / "state")
        want = session.prefill(ids[:, 33:]).copy()
        session.reset()
        session.load_state(tmp_path / "state")
        np.testing.assert_array_equal(session.prefill(ids[:, 33:]), want)
        with pytest.raises(StateError, match="fingerprint"):
            other.load_state(tmp_path / "state")
    shown = run_cli("inspect", windowed).out
    assert "key heads by window: 1 with 4, 1 with 5, 2 with 9" in " ".join(shown.split())


@pytest.mark.slow
def test_the_same_window_everywhere_changes_no_byte(shared_export: SharedExports, tmp_path: Path) -> None:
    exported("llama", ((9, 9), (9, 9)), tmp_path / "b")
    plain = shared_export("llama", num_sink_tokens=S, window_size=9).manifest
    assert plain.files == load_manifest(tmp_path / "b").files


@pytest.mark.slow
def test_manifest_refuses_heads_that_are_missing(windowed: Path) -> None:
    raw = json.loads((windowed / "manifest.json").read_text())
    raw["head_windows"].pop()
    with pytest.raises(BundleError, match="each of the 4 key heads once"):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("[]", [], "Input should be an object"),
        (window_file("llama", LLAMA).to_json().replace("4", "0", 1), [], "greater than or equal to 1"),
        (
            window_file("llama", ((9, 4, 4), LLAMA[1] + (3,))).to_json(),
            ["--window", "9"],
            "key heads 3, expected key heads 2",
        ),
        (window_file("llama", LLAMA).to_json(), ["--window", "20"], "pass --window 9"),
        (window_file("llama", LLAMA).to_json(), ["--window", "9", "--chunk", "6"], "at most 4"),
    ],
)
def test_export_refuses_in_one_line(content: str, options: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "windows.json").write_text(content, encoding="utf-8")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    file = ("--head-windows", tmp_path / "windows.json")
    result = run_cli("export", tmp_path / "model", "-o", tmp_path / "out", "--sink-tokens", 3, *file, *options)
    result.refusal(expected)


# --- analyze ----------------------------------------------------------------------------------------------------------


def test_change_of_a_head_that_is_cut_short_by_transformers_own_weights() -> None:
    model, tokens, candidates, values = tiny_model("llama"), 160, 6, []
    text = tuple(random_ids(tokens, seed=2).tolist())
    report = analyze(LoadedModel(model, None, "tiny"), TextWindows((text,)), num_candidates=candidates)
    assert report.distances == (32, 64)
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out[0].double().numpy()))
    with torch.no_grad():
        found = model(torch.tensor([text]), output_attentions=True).attentions
    query, key = np.arange(tokens)[:, None], np.arange(tokens)
    for layer, (weights, value) in enumerate(zip(found, values, strict=True)):
        w = weights[0].double().numpy()  # [Hq, T, T]
        v = value.reshape(tokens, 2, -1).transpose(1, 0, 2).repeat(3, axis=0)  # [Hq, T, D]
        whole = (w @ v)[:, tokens // 2 :]
        for i, distance in enumerate(report.distances):
            kept = w * ((query - key < distance) | (key < candidates))
            short = (kept / kept.sum(axis=-1, keepdims=True) @ v)[:, tokens // 2 :]
            want = np.linalg.norm(whole - short, axis=-1).mean(axis=1)  # [Hq]
            want /= np.sqrt(np.square(whole).sum(axis=-1).mean())
            np.testing.assert_allclose(np.array(report.change)[layer, :, i], want, rtol=1e-4)


def test_analyze_proposes_long_windows_for_heads_that_change_most(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save(tmp_path / "model")
    words = " ".join(f"w{i}" for i in random_ids(400, seed=2))
    (tmp_path / "text").write_text(words, encoding="utf-8")
    arguments = [
        "analyze",
        str(tmp_path / "model"),
        "--text",
        str(tmp_path / "text"),
        "--windows",
        "2",
        "--window-tokens",
        "160",
        "--candidates",
        "4",
        "--long-window",
        "80",
        "--short-window",
        "40",
        "--head-windows",
        str(tmp_path / "b.json"),
    ]
    result = run_cli(*arguments, "--head-window-share", "0.75", "--json", tmp_path / "all.json")
    result.succeeded()
    assert "2 of 4 key heads keep 80 tokens" in result.out
    found = HeadWindowFile.load(tmp_path / "b.json")
    change = np.array(json.loads((tmp_path / "all.json").read_text())["change"])
    by_head = np.square(change[:, :, 0]).reshape(2, 2, 3).mean(axis=2)  # [L, Hkv]
    farthest = np.sort(by_head, axis=None)[2:]
    np.testing.assert_array_equal(np.array(found.windows), np.where(by_head >= farthest.min(), 80, 40))
    for share, expected in (("0.2", "expected 0.5 .. 1"), ("2", "expected 0.5 .. 1")):
        refused = run_cli(*arguments, "--head-window-share", share)
        refused.refusal(expected)
