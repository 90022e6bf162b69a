"""Later sinks scaled down (ACT, arXiv:2406.15765): bundles against the reference past six wraps, and `analyze`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.analysis.secondary_sinks import Thresholds
from sinkexport.analysis.sinks import analyze
from sinkexport.analysis.text_windows import TextWindows
from sinkexport.config import ExportConfig
from sinkexport.evaluation.parity import verify
from sinkexport.pipeline.export import export_loaded
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.reference.dense import first_token_scaled
from sinkexport.reference.streaming import streaming_reference
from sinkexport.sources import LoadedModel
from sinkexport.variants.sink_tuning import ActPart, SinkTuningFile, TunedModel
from sinkexport.variants.variant import AttentionVariant
from sinkrt import Session
from sinkrt.contract import MANIFEST_NAME, load_manifest

from tests.exporter.graph.in_place import assert_states_are_written_last
from tests.exporter.pipeline.export_refusal import assert_export_refuses
from tests.exporter.tiny_models import model_with_a_sink, tiny_model, tiny_tokenizer
from tests.reference.oracle import Act, SinkAttentionOracle
from tests.support import SharedExports, random_ids, run_cli

LAYERS, HEADS, S, W = 2, 6, 3, 9
MASK = ((True, True, False, True, True, False), (False, True, True, True, False, True))
# Random weights look at all tokens nearly alike: with alpha = 1 every token above the mean is a sink in part.
HOW: dict[str, Any] = {"alpha": 1.0, "beta": 0.1, "min_queries": 2}


def tuning(name: str, mask: tuple[tuple[bool, ...], ...] = MASK, factor: float = 1.0, **how: Any) -> SinkTuningFile:
    model = TunedModel(name=name, architecture=type(tiny_model(name)).__name__, num_layers=LAYERS, num_q_heads=HEADS)
    return SinkTuningFile(
        model=model, act=ActPart(heads=mask, **{**HOW, **how}), first_token_scale=((factor,) * HEADS,) * LAYERS
    )


def exported(folder: Path, name: str = "llama", **options: Any) -> LoadedModel:
    model = LoadedModel(tiny_model(name), None, "tiny")
    export_loaded(model, folder, ExportConfig(S, W, **options))
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom"])
def test_bundles_pass_verify(name: str, tmp_path: Path) -> None:
    """Dense and streaming over six wraps with the family's own attention; chunks against steps. Batch 2."""
    # gpt-oss: layer 0 has a window of its own, and so no sinks.
    mask = ((False,) * HEADS, MASK[1]) if name == "gpt_oss" else MASK
    # gemma2: beside factors on token 0.
    asked = tuning(name, mask, 0.3 if name == "gemma2" else 1.0) if name != "bloom" else bloom_tuning()
    model = exported(tmp_path / "b", name, batch=2, sink_tuning=asked)
    assert verify(tmp_path / "b", model, tolerance=1e-4).failures == ()
    manifest = load_manifest(tmp_path / "b")
    # It must fail if the bundle is calibrated otherwise than its manifest says.
    assert manifest.sink_tuning is not None
    assert manifest.sink_tuning.act is not None
    for act in (None, dataclasses.replace(manifest.sink_tuning.act, min_queries=4)):
        other = dataclasses.replace(manifest, sink_tuning=dataclasses.replace(manifest.sink_tuning, act=act))
        (tmp_path / "b" / MANIFEST_NAME).write_text(other.to_json(), encoding="utf-8")
        assert {line.partition(":")[0] for line in verify(tmp_path / "b", model).failures} == {"dense", "streaming"}


def bloom_tuning() -> SinkTuningFile:
    config = tiny_model("bloom").config
    model = TunedModel(
        name="bloom", architecture="BloomForCausalLM", num_layers=config.n_layer, num_q_heads=config.n_head
    )
    rows, heads = config.n_layer, config.n_head
    return SinkTuningFile(
        model=model, act=ActPart(heads=((True,) * heads,) * rows, **HOW), first_token_scale=((1.0,) * heads,) * rows
    )


def test_the_reference_gives_what_the_oracle_gives() -> None:
    """Layer by layer, on the same tokens, past six wraps."""
    model, act = tiny_model("llama").double(), tuning("llama").facts
    seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    ids = random_ids(2, S + 7 * W)
    with streaming_reference(
        model,
        S,
        W,
        observer=lambda m, q, k, v, out: seen.append((m.layer_idx, q, k, v, out)),
        variant=AttentionVariant(sink_tuning=act),
    ) as reference:
        for column in ids.T:
            reference.step(torch.from_numpy(column))
    inv_freq = model.model.rotary_emb.inv_freq.numpy()
    oracles = [
        SinkAttentionOracle(
            batch=2,
            num_sink_tokens=S,
            window_size=W,
            inv_freq=inv_freq,
            act=Act(HOW["alpha"], HOW["beta"], HOW["min_queries"], mask),
        )
        for mask in MASK
    ]
    for layer, q, k, v, out in seen:
        want = oracles[layer].step(*(x[:, :, 0].numpy() for x in (q, k, v)))
        np.testing.assert_allclose(out[:, 0].numpy(), want, atol=1e-5)  # float32 softmax


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["fp", "int8"])
def test_streams_at_their_own_positions_in_chunks_and_in_steps(kv: str, tmp_path: Path) -> None:
    """Two streams, one of them ahead, are what each is alone, token by token, over six wraps; kept copies too."""
    asked = tuning("llama")
    model = exported(tmp_path / "b", batch=2, kv=kv, sink_tuning=asked, chunk_size=5)
    atol = 5e-4 if kv == "fp" else 0.1  # INT8: of a rounding that another last bit turns
    ids, ends = random_ids(2, S + 8 * W), (S + 8 * W, S + 6 * W + 4)
    wanted = []
    for row in ids:
        with chunked_streaming(model.model, S, W, kv, AttentionVariant(sink_tuning=asked.facts)) as stream:
            wanted.append(torch.cat([stream.feed(torch.from_numpy(row[None, t : t + 1])) for t in range(len(row))], 1))
    with Session.load(tmp_path / "b", threads=1) as session:
        assert_states_are_written_last(tmp_path / "b", session.manifest)  # both windows' graphs
        lead = S + 2 * W - 3
        session.prefill(ids[:1, :lead], streams=[0])
        for start in range(0, ends[1], 11):  # pieces of 11: two whole chunks and one token
            piece = ids[1:, start : min(start + 11, ends[1])]
            session.prefill(piece, streams=[1])
            np.testing.assert_allclose(session.logits[1], wanted[1][0, start + piece.shape[1] - 1], atol=atol)
        np.testing.assert_allclose(session.logits[0], wanted[0][0, lead - 1], atol=atol)
        copy = session.copy_stream(0)
        session.reset(streams=[0])
        session.prefill(ids[1:, :4], streams=[0])
        session.place_stream(0, copy)
        for t in range(lead, ends[0]):
            session.step(ids[:1, t], streams=[0])
            np.testing.assert_allclose(session.logits[0], wanted[0][0, t], atol=atol)
        before = session.logits.copy()
        session.save_state(tmp_path / "state")
        want = session.step([5, 6]).copy()
        session.reset()
        session.load_state(tmp_path / "state")
        np.testing.assert_array_equal(session.logits, before)
        np.testing.assert_array_equal(session.step([5, 6]), want)


@pytest.mark.slow
def test_off_changes_no_byte(shared_export: SharedExports, tmp_path: Path) -> None:
    """No file, a file without `act`, and one that calibrates no head: the same graphs, the same states."""
    nothing = tuning("llama", ((False,) * HEADS,) * LAYERS)
    without = nothing.model_copy(update={"act": None})
    manifests = [shared_export("llama", num_sink_tokens=S, window_size=W).manifest]
    for number, asked in enumerate((without, nothing)):
        exported(tmp_path / str(number), sink_tuning=asked)
        manifests.append(load_manifest(tmp_path / str(number)))
    assert manifests[0].files == manifests[1].files == manifests[2].files
    assert manifests[0].states == manifests[1].states == manifests[2].states


def test_layers_without_calibrated_heads_have_no_state(tmp_path: Path) -> None:
    exported(tmp_path / "b", sink_tuning=tuning("llama", (MASK[0], (False,) * HEADS)))
    manifest = load_manifest(tmp_path / "b")
    (mass,) = (state for state in manifest.states if state.kind == "attention_mass")
    assert (mass.layer, mass.shape, mass.dtype) == (0, (1, HEADS, 2, W), "float32")
    shown = run_cli("inspect", tmp_path / "b").out
    assert "scaled down to 0.1 in 4 of 12 heads" in " ".join(shown.split())
    assert "attention received" in shown


def test_dense_attention_is_streaming_before_a_token_is_evicted() -> None:
    model, facts = tiny_model("qwen3"), tuning("qwen3", factor=2.0).facts
    ids = torch.from_numpy(random_ids(2, S + W))
    variant = AttentionVariant(sink_tuning=facts)
    with torch.no_grad(), first_token_scaled(model, torch.tensor(facts.first_token_scale), variant, S):
        dense = model(ids).logits
    with chunked_streaming(model, S, W, variant=variant) as stream:
        np.testing.assert_allclose(stream.feed(ids).numpy(), dense.numpy(), atol=1e-4)
    with torch.no_grad():
        assert (model(ids).logits - dense).abs().max() > 1e-2


def test_file_is_written_as_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(tuning("llama").to_json(), encoding="utf-8")
    assert SinkTuningFile.load(file) == tuning("llama")
    lines = [line.strip(" ,") for line in file.read_text().split("\n")]
    assert [json.loads(line) for line in lines if line.startswith(("[true", "[false"))] == [list(x) for x in MASK]
    without = json.loads(file.read_text())
    del without["act"]
    assert "act" not in SinkTuningFile.model_validate(without).to_json()


def broken(name: str = "llama", **changes: Any) -> str:
    raw = json.loads(tuning(name).to_json())
    raw["act"].update(changes)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (broken(beta=1.0), {}, "act.beta: Input should be less than 1"),
        (broken(alpha=0.5), {}, "act.alpha: Input should be greater than or equal to 1"),
        (broken(heads=[[True] * HEADS]), {}, "act.heads must have as many layers"),
        (broken(heads=[[1] * HEADS] * LAYERS), {}, "valid boolean"),
        (broken(), {"--sink-tokens": "0"}, "received 0 sinks, expected at least 1"),
        (broken(), {"--target": "tensorrt"}, "add --native"),
        (broken("gpt_oss"), {"MODEL": "gpt_oss"}, "act in layer 0, which keeps no sinks"),
    ],
)
def test_export_refuses_in_one_line(content: str, options: dict[str, str], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(content, encoding="utf-8")
    assert_export_refuses("--sink-tuning", file, options, expected, tmp_path)


# --- analyze ----------------------------------------------------------------------------------------------------------

CANDIDATES, TOKENS = 6, 160


def test_heads_that_have_later_sinks_are_found() -> None:
    """Thresholds as low as random weights need; which heads they are by transformers' own weights and values."""
    low = Thresholds(weight=0.0, ratio=3.0, likeness=0.3)
    model = tiny_model("llama")
    texts = tuple(tuple(random_ids(TOKENS, seed=seed).tolist()) for seed in range(3))
    report = analyze(LoadedModel(model, None, "tiny"), TextWindows(texts), num_candidates=CANDIDATES, thresholds=low)
    model.set_attn_implementation("eager")
    want = np.zeros((LAYERS, HEADS))
    values: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out[0].double()))
    for text in texts:
        values.clear()
        with torch.no_grad():
            attentions = model(torch.tensor([text]), output_attentions=True).attentions
        for layer, (weights, value) in enumerate(zip(attentions, values, strict=True)):
            for head in range(HEADS):
                w = weights[0, head].double().numpy()
                want[layer, head] += any(
                    w[k + 32 :, k].mean() > 3.0 * np.mean([1 / (i + 1) for i in range(k + 32, TOKENS)])
                    and torch.cosine_similarity(value[k], value[0], dim=0) > 0.3
                    for k in range(CANDIDATES, TOKENS - 64)
                )
    np.testing.assert_allclose(report.later_sinks, want / 3, atol=1e-6)
    assert 0 < (want >= 1.5).sum() < want.size  # else this says nothing


def test_analyze_proposes_the_heads_that_have_later_sinks(tmp_path: Path) -> None:
    """Token 5 begins each window and comes again: a later token like the first one."""
    heads = ((False, True, False, True, True, False), (True, False, False, False, False, True))
    model_with_a_sink(5, heads).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save(tmp_path / "model")
    texts = random_ids(3, TOKENS)
    texts[texts == 5] = 6
    texts[:, [0, 40]] = 5
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in texts.flatten()), encoding="utf-8")
    text = ("--text", tmp_path / "text", "--windows", 3, "--window-tokens", TOKENS, "--candidates", CANDIDATES)
    result = run_cli("analyze", tmp_path / "model", *text, "--sink-tuning", tmp_path / "tuning.json").succeeded()
    found = SinkTuningFile.load(tmp_path / "tuning.json")
    assert found.act is not None
    assert (found.act.alpha, found.act.beta) == (5.0, 0.4)  # the paper's
    assert found.act.heads == heads
    assert "later sinks in 5 of 12 heads; add --sink-tuning" in result.out
    exported(tmp_path / "b", sink_tuning=found)  # and the export takes it
