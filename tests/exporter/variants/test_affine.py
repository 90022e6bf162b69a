"""Affine-scaled attention: bundles against the model with its own attention changed, the definition, and bad files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from sinkexport.config import ExportConfig
from sinkexport.evaluation.evaluate import BaselineOptions, evaluate
from sinkexport.evaluation.parity import verify
from sinkexport.evaluation.quality_gate import verify_quality
from sinkexport.model.affine import AffineFactors
from sinkexport.pipeline.export import export_loaded
from sinkexport.quant.recipe import load_recipe
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.reference.streaming import streaming_reference
from sinkexport.sources import LoadedModel
from sinkexport.variants.affine import FILE_NAME, AffineFile, LayerAffine
from sinkexport.variants.sink_tuning import ActPart
from sinkexport.variants.variant import AttentionVariant
from sinkrt import BundleError, Session, UsageError
from sinkrt.contract import MANIFEST_NAME, Manifest, load_manifest

from tests.exporter.pipeline.export_refusal import assert_export_refuses
from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.exporter.variants.test_head_windows import window_file
from tests.exporter.variants.test_sink_tuning import GEOMETRY, tuning
from tests.reference.oracle import SinkAttentionOracle, affine_factors
from tests.support import SharedExports, nightly_but, random_ids, run_cli

Tensors = dict[str, np.ndarray]


def written(file: Path, tensors: Tensors, **metadata: str) -> AffineFile:
    safetensors.numpy.save_file(tensors, file, metadata)
    return AffineFile.load(file)


def random_tensors(model: Any, kinds: str = "scale bias", seed: int = 0, without: tuple[int, ...] = ()) -> Tensors:
    """Tensors of every layer: weights and biases of the kinds, large enough to matter."""
    config, random = model.config.get_text_config(), np.random.default_rng(seed)
    heads, hidden = config.num_attention_heads, config.hidden_size
    found: Tensors = {}
    for layer in set(range(config.num_hidden_layers)) - set(without):
        for kind in kinds.split():
            weight = random.standard_normal((heads, hidden)) * 0.5 / hidden**0.5
            found[f"layers.{layer}.{kind}.weight"] = weight.astype(np.float32)
            found[f"layers.{layer}.{kind}.bias"] = random.uniform(-1, 2, heads).astype(np.float32)
    return found


FAMILIES = [
    # rotary: groups, partial, softcap and sliding layers, sink logits, interleaved; ALiBi; linear layers
    ("llama", 2),
    ("gpt_neox", 1),
    ("gemma2", 1),
    ("gpt_oss", 2),
    ("cohere", 1),
    ("falcon-groups", 1),
    ("gptj", 1),
    ("bloom", 2),
    ("mpt", 1),
    ("falcon-alibi", 1),
    ("qwen3_next", 1),
]


@pytest.mark.parametrize(
    ("name", "batch"), nightly_but([("llama", 2), ("gpt_oss", 2), ("bloom", 2), ("qwen3_next", 1)], FAMILIES)
)
def test_bundle_is_the_model_with_its_own_attention_changed(name: str, batch: int, tmp_path: Path) -> None:
    """verify: the family's own attention and the mean of the values, dense and streaming over six wraps; prefill
    against steps, of streams at positions of their own."""
    model, bundle = tiny_model(name), tmp_path / "bundle"
    linear = [
        i for i, kind in enumerate(getattr(model.config, "layer_types", None) or ()) if kind == "linear_attention"
    ]
    affine = written(tmp_path / "file", random_tensors(model, without=tuple(linear)))
    loaded = LoadedModel(model, None, "tiny")
    manifest = export_loaded(loaded, bundle, ExportConfig(**GEOMETRY, batch=batch, affine=affine))
    assert verify(bundle, loaded, tolerance=1e-4).failures == ()
    facts = manifest.affine_attention
    assert facts is not None
    assert facts.has_inputs
    heads = tuple(range(manifest.model.num_q_heads))
    assert facts.heads == tuple(() if i in linear else heads for i in range(manifest.model.num_layers))
    assert (bundle / FILE_NAME).read_bytes() == (tmp_path / "file").read_bytes()


def test_verify_fails_if_the_file_is_not_that_of_the_graph(tmp_path: Path) -> None:
    model, bundle = LoadedModel(tiny_model("llama"), None, "tiny"), tmp_path / "bundle"
    affine = written(tmp_path / "file", random_tensors(model.model, "bias"))
    manifest = export_loaded(model, bundle, ExportConfig(**GEOMETRY, chunk_size=1, affine=affine))
    without = dataclasses.replace(manifest, affine_attention=None)
    (bundle / MANIFEST_NAME).write_text(without.to_json(), encoding="utf-8")
    assert {line.partition(":")[0] for line in verify(bundle, model).failures} == {"dense", "streaming"}
    assert without.fingerprint != manifest.fingerprint
    (bundle / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    written(bundle / FILE_NAME, random_tensors(model.model, "bias", seed=1))
    with pytest.raises(BundleError, match="sha256"):
        verify(bundle, model)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sigmoid", "clip", "constant", "half"])
def test_forms_of_a_file(form: str, tmp_path: Path) -> None:
    """The paper's, with an activation and the mean of the scale; constants alone, for some heads; float16."""
    model = tiny_model("llama")
    heads = model.config.num_attention_heads
    if form == "constant":
        scales = np.array([1, 1, 0.5, 2, 1, 1], np.float32)
        tensors = {"layers.1.scale.bias": scales, "layers.1.bias.bias": np.eye(heads, dtype=np.float32)[5]}
    else:
        tensors = random_tensors(model, "scale")
        for layer in range(2):
            tensors[f"layers.{layer}.scale.average"] = np.linspace(0, 1, heads, dtype=np.float32)
    if form == "half":
        tensors = {name: x.astype(np.float16) for name, x in tensors.items()}
    affine = written(tmp_path / "file", tensors, **({"activation": form} if form in ("sigmoid", "clip") else {}))
    loaded = LoadedModel(model, None, "tiny")
    manifest = export_loaded(loaded, tmp_path / "b", ExportConfig(**GEOMETRY, batch=2, affine=affine))
    assert verify(tmp_path / "b", loaded, tolerance=1e-4).failures == ()
    assert manifest.affine_attention is not None
    assert manifest.affine_attention.heads == (((), (2, 3, 5)) if form == "constant" else (tuple(range(heads)),) * 2)
    shown = " ".join(run_cli("inspect", tmp_path / "b").out.split())
    expected = "3 heads in 1 layers, constant" if form == "constant" else "12 heads in 2 layers, by hidden state"
    assert f"affine attention {expected}; file {affine.sha256[:16]}" in shown


@pytest.mark.slow
def test_a_file_that_changes_nothing_changes_no_graph(shared_export: SharedExports, tmp_path: Path) -> None:
    model, plain = tiny_model("llama"), shared_export("llama", **GEOMETRY).manifest
    tensors = {name: np.full_like(x, name.endswith("scale.bias")) for name, x in random_tensors(model).items()}
    loaded, affine = LoadedModel(model, None, "tiny"), written(tmp_path / "file", tensors)
    same = export_loaded(loaded, tmp_path / "same", ExportConfig(**GEOMETRY, affine=affine))
    assert {name: facts for name, facts in same.files.items() if name != FILE_NAME} == plain.files
    assert plain.affine_attention is None
    assert same.affine_attention is not None
    assert (same.affine_attention.has_inputs, same.affine_attention.heads) == (False, ((), ()))


@pytest.mark.slow
def test_parameters_that_cancel_out_give_the_logits_of_the_plain_export(tmp_path: Path) -> None:
    """Here the operators are in the graph: a weight of the least number there is, scale 1 and bias 0."""
    model, random = tiny_model("llama"), np.random.default_rng(0)
    loaded = LoadedModel(model, None, "tiny")
    tensors = {
        name: np.full_like(x, 1e-30 if name.endswith("weight") else name.endswith("scale.bias"))
        for name, x in random_tensors(model).items()
    }
    affine = written(tmp_path / "file", tensors)
    ids = random.integers(3, VOCAB_SIZE, (2, 70))
    logits = []
    for folder, asked in (("plain", None), ("same", affine)):
        export_loaded(loaded, tmp_path / folder, ExportConfig(**GEOMETRY, batch=2, affine=asked))
        with Session.load(tmp_path / folder, threads=1) as session:
            logits.append([session.step(column).copy() for column in ids.T])
            session.reset()
            logits[-1].append(session.prefill(ids).copy())
    assert len(affine.facts(2, 6).heads[0]) == 6
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


@pytest.mark.parametrize("activation", ["linear", "sigmoid", "clip"])
@pytest.mark.parametrize("names", ["", "sw", "sb", "sw sb", "bw", "bb", "sw sb bw bb", "sa", "sw sb sa"])
def test_factors_are_those_of_the_definition(names: str, activation: str) -> None:
    random, heads, hidden = np.random.default_rng(0), 6, 20
    fields = {"sw": "scale_weight", "sb": "scale_bias", "bw": "bias_weight", "bb": "bias_bias", "sa": "scale_average"}
    tensors = {
        fields[name]: random.standard_normal((heads, hidden) if name[1] == "w" else heads).astype(np.float32)
        for name in names.split()
    }
    x = random.standard_normal((2, 3, hidden)).astype(np.float32)
    module = AffineFactors(LayerAffine(activation, **tensors), heads, torch.float32)
    got = [np.float32(1 - i) if y is None else y.numpy() for i, y in enumerate(module(torch.from_numpy(x)))]
    for b in range(2):
        for t in range(3):
            want = affine_factors(x[b, t], num_q_heads=heads, activation=activation, **tensors)
            for i, values in enumerate(got):
                np.testing.assert_allclose(np.broadcast_to(values, (2, heads, 3))[b, :, t], want[:, i], atol=1e-5)


def test_the_reference_gives_what_the_oracle_gives(tmp_path: Path) -> None:
    """Hidden states, queries, keys and values as the reference has them; scale, bias and weights by the oracle."""
    model = tiny_model("llama").double()
    tensors = random_tensors(model)
    affine, layers = written(tmp_path / "file", tensors), model.model.layers
    seen: list[tuple[Any, ...]] = []
    hidden: dict[int, torch.Tensor] = {}
    for layer in layers:
        layer.input_layernorm.register_forward_hook(
            lambda _, __, out, i=layer.self_attn.layer_idx: hidden.__setitem__(i, out)
        )
    ids = random_ids(1, 3 * 12, seed=4)
    with streaming_reference(
        model,
        **GEOMETRY,
        variant=AttentionVariant(affine=affine),
        observer=lambda m, *x: seen.append((m.layer_idx, hidden[m.layer_idx], *x)),
    ) as reference:
        for column in ids.T:
            reference.step(torch.from_numpy(column))
    inv_freq = model.model.rotary_emb.inv_freq.numpy()
    oracles = [SinkAttentionOracle(batch=1, **GEOMETRY, inv_freq=inv_freq) for _ in layers]
    for layer, x, q, k, v, out in seen:
        own = {
            name.replace(".", "_"): tensors[f"layers.{layer}.{name}"]
            for name in ("scale.weight", "scale.bias", "bias.weight", "bias.bias")
        }
        pairs = affine_factors(x[0, 0].numpy(), num_q_heads=6, **own)
        want = oracles[layer].step(*(y[:, :, 0].numpy() for y in (q, k, v)), affine=pairs[None])
        np.testing.assert_allclose(out[0, 0].numpy(), want[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "calibrated"), [("fp", False), ("fp", True), ("int8", False), ("int8", True)])
def test_chunks_in_torch_agree_with_the_bundle(kv: str, calibrated: bool, tmp_path: Path) -> None:
    """Windows of single heads, factors on token 0 and later sinks that are scaled down come besides."""
    model, windows, tuned = tiny_model("llama"), ((4, 9), (9, 5)), tuning("llama")
    if calibrated:
        act = ActPart(alpha=1.0, beta=0.2, min_queries=2, heads=((True, False, True) * 2, (False,) * 3 + (True,) * 3))
        tuned = tuned.model_copy(update={"act": act})
    affine = written(tmp_path / "file", random_tensors(model))
    config = ExportConfig(**GEOMETRY, kv=kv, sink_tuning=tuned, budgets=window_file("llama", windows), affine=affine)
    loaded = LoadedModel(model, None, "tiny")
    export_loaded(loaded, tmp_path / "b", config)
    ids = random_ids(70)
    with chunked_streaming(model, **GEOMETRY, kv=kv, variant=config.variant) as stream:
        want = torch.cat([stream.feed(torch.from_numpy(ids[None, i : i + 11])) for i in range(0, 70, 11)], dim=1)[0]
    with Session.load(tmp_path / "b", threads=1) as session:
        got = np.stack([session.step(ids[t : t + 1])[0].copy() for t in range(70)])
        session.reset()
        prefilled = session.prefill(ids[None])[0].copy()
    np.testing.assert_allclose(got, want.numpy(), atol=2e-3 if kv == "fp" else 0.3)
    np.testing.assert_allclose(prefilled, got[-1], atol=1e-3 if kv == "fp" else 0.3)
    if kv == "fp":
        assert verify(tmp_path / "b", loaded, tolerance=1e-4).failures == ()


@pytest.mark.slow
def test_projections_stay_in_floating_point_under_a_recipe(tmp_path: Path) -> None:
    """Rounded weights change what a bundle computes as much with scales and biases as without."""
    model = tiny_model("llama")
    affine = written(tmp_path / "file", random_tensors(model))
    loaded = LoadedModel(model, None, "tiny")
    ids = random_ids(1, 60)
    errors, sizes = [], []
    for asked in (None, affine):
        with chunked_streaming(model, **GEOMETRY, variant=AttentionVariant(affine=asked)) as stream:
            want = stream.feed(torch.from_numpy(ids))[0].numpy()
        folder = tmp_path / str(len(errors))
        config = ExportConfig(**GEOMETRY, chunk_size=1, recipe=load_recipe("int8-dynamic"), affine=asked)
        manifest = export_loaded(loaded, folder, config)
        with Session.load(folder, threads=1) as session:
            got = np.concatenate([session.step(column).copy() for column in ids.T])
        errors.append(float(np.abs(got - want).mean() / want.std()))
        sizes.append(sum(facts.bytes for name, facts in manifest.files.items() if name != FILE_NAME))
    assert errors[1] < 2 * errors[0] + 0.01
    assert sizes[1] - sizes[0] < 4 * sum(x.size for x in random_tensors(model).values()) + 40_000


def changed(**changes: Any) -> Tensors:
    return {**random_tensors(tiny_model("llama")), **{key.replace("__", "."): x for key, x in changes.items()}}


ONES = np.ones(6, np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "options", "expected"),
    [
        (None, {}, {}, "No such file"),
        (b"nothing", {}, {}, "header"),
        (changed(), {"activation": "tanh"}, {}, "activation 'tanh', none of linear, sigmoid, clip"),
        (changed(layers__0__gate=ONES), {}, {}, "unknown tensor 'layers.0.gate'"),
        (changed(model__layers__0__scale__bias=ONES), {}, {}, "unknown tensor 'model.layers.0.scale.bias'"),
        (changed(layers__2__scale__bias=ONES), {}, {}, "tensors of layer 2 in 'file.safetensors', expected layers 0"),
        (changed(layers__1__scale__bias=ONES[:5]), {}, {}, "'layers.1.scale.bias' of shape (5,)"),
        (changed(layers__0__bias__weight=np.zeros((48, 6), np.float32)), {}, {}, "expected (6, 48)"),
        (changed(layers__0__bias__bias=ONES.astype(np.int64)), {}, {}, "'layers.0.bias.bias' is I64, none of F16"),
        (changed(layers__0__bias__bias=ONES * np.nan), {}, {}, "'layers.0.bias.bias' has numbers that are not finite"),
        (changed(layers__0__scale__average=ONES), {}, {}, "layer 0 has both scale.average and a bias"),
        (changed(), {}, {"--target": "tensorrt"}, "expected standard operators"),
        (changed(), {}, {"MODEL": "qwen3_next"}, "expected layers with softmax attention"),
    ],
)
def test_export_refuses_in_one_line(
    tensors: Tensors | bytes | None, metadata: Mapping[str, str], options: dict[str, str], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.safetensors"
    if isinstance(tensors, bytes):
        file.write_bytes(tensors)
    elif tensors is not None:
        safetensors.numpy.save_file(tensors, file, dict(metadata))
    assert_export_refuses("--affine", file, options, expected, tmp_path)


@pytest.mark.slow
def test_texts_are_compared_with_the_model_changed_alike(tmp_path: Path) -> None:
    """verify --text and eval --compare; a bundle without the file is no reference for one with it."""
    model, text = tiny_model("llama"), " ".join(f"w{i}" for i in random_ids(60))
    affine = written(tmp_path / "file", random_tensors(model))
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny")
    for folder, asked in (("b", affine), ("plain", None)):
        export_loaded(loaded, tmp_path / folder, ExportConfig(**GEOMETRY, chunk_size=1, affine=asked))
    assert verify_quality(tmp_path / "b", loaded, text, threads=1).quality.kl_divergence < 1e-6
    curves = evaluate(tmp_path / "b", text, compare=BaselineOptions(loaded), threads=1).curves
    assert [curve.name for curve in curves[:2]] == ["bundle", "sinks + window"]
    losses = [curve.perplexity for curve in curves]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[2] / losses[0] - 1) > 1e-3  # the model as it is
    with pytest.raises(UsageError, match="affine attention"):
        verify_quality(tmp_path / "b", str(tmp_path / "plain"), text, threads=1)


def test_static_ranges_are_refused(tmp_path: Path) -> None:
    affine = written(tmp_path / "file", {"layers.0.bias.bias": ONES})
    recipe = load_recipe("int8-smooth")
    with pytest.raises(UsageError, match="calibration saw the model's own attention"):
        ExportConfig(recipe=recipe, calibration=object(), affine=affine)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"heads": ((0,),)}, "2 layers, heads below 6"),
        ({"heads": ((6,), ())}, "heads up to 6"),
        ({"file": "other"}, "a file that 'files' lists"),
        ({"sha256": "x"}, "64 hex digits"),
    ],
)
def test_manifest_refuses_facts_that_do_not_fit(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    affine = written(tmp_path / "file", {"layers.0.bias.bias": ONES})
    model = LoadedModel(tiny_model("llama"), None, "tiny")
    manifest = export_loaded(model, tmp_path / "b", ExportConfig(**GEOMETRY, chunk_size=1, affine=affine))
    assert load_manifest(tmp_path / "b") == manifest
    assert manifest.affine_attention is not None
    with pytest.raises(BundleError, match=expected):
        text = dataclasses.replace(manifest, affine_attention=dataclasses.replace(manifest.affine_attention, **changes))
        Manifest.from_json(text.to_json())
