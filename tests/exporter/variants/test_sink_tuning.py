"""Factors on the attention to the first token: in bundles against the reference, and found where they were planted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.analysis.tune import Example, read_examples, score, tune
from sinkexport.config import ExportConfig
from sinkexport.evaluation.parity import verify
from sinkexport.pipeline.export import export_loaded
from sinkexport.reference.dense import first_token_scaled
from sinkexport.sources import LoadedModel
from sinkexport.variants.sink_tuning import SinkTuningFile, TunedModel
from sinkrt import UsageError
from sinkrt.contract import MANIFEST_NAME, load_manifest

from tests.exporter.pipeline.export_refusal import assert_export_refuses
from tests.exporter.tiny_models import TINY, VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.support import SharedExports, export_model, run_cli

LAYERS, HEADS = 2, 6
GEOMETRY = {"num_sink_tokens": 3, "window_size": 9}


def tuning(name: str, factors: list[list[float]] | None = None) -> SinkTuningFile:
    if factors is None:
        factors = np.random.default_rng(3).uniform(0.05, 8.0, (LAYERS, HEADS)).round(3).tolist()
        factors[1][2] = 1.0
        if name == "gpt_oss":
            factors[0] = [1.0] * HEADS  # a layer with a window of its own, without sinks
    architecture = type(tiny_model(name)).__name__
    model = TunedModel(name=name, architecture=architecture, num_layers=LAYERS, num_q_heads=HEADS)
    return SinkTuningFile(model=model, first_token_scale=tuple(map(tuple, factors)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_bundle_is_the_model_with_its_own_attention_rescaled(name: str, tmp_path: Path) -> None:
    """verify: the family's own attention with a mask, dense and streaming over six wraps; prefill against steps."""
    model, bundle = LoadedModel(tiny_model(name), None, "tiny"), tmp_path / "bundle"
    export_loaded(model, bundle, ExportConfig(**GEOMETRY, batch=2, sink_tuning=tuning(name)))
    assert verify(bundle, model, tolerance=1e-4).failures == ()
    # It must fail if the factors are not those of the graph.
    manifest = load_manifest(bundle)
    without = dataclasses.replace(manifest, sink_tuning=None)
    (bundle / MANIFEST_NAME).write_text(without.to_json(), encoding="utf-8")
    assert {line.partition(":")[0] for line in verify(bundle, model).failures} == {"dense", "streaming"}
    assert without.fingerprint != manifest.fingerprint


@pytest.mark.slow
def test_factors_of_1_change_no_byte(shared_export: SharedExports, tmp_path: Path) -> None:
    ones, plain = tuning("llama", [[1.0] * HEADS] * LAYERS), shared_export("llama", **GEOMETRY).manifest
    tuned = export_model("llama", tmp_path / "tuned", **GEOMETRY, sink_tuning=ones).manifest
    assert plain.files == tuned.files
    assert (plain.sink_tuning, tuned.sink_tuning) == (None, ones.facts)


def test_file_is_written_as_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(tuning("llama").to_json(), encoding="utf-8")
    assert SinkTuningFile.load(file) == tuning("llama")
    assert sum(line.startswith("  [") for line in file.read_text().split("\n")) == LAYERS  # one line a layer


def broken(**changes: Any) -> str:
    return json.dumps({**json.loads(tuning("llama").to_json()), **changes})


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (None, {}, "No such file"),
        ("{", {}, "Invalid JSON"),
        (broken(format="other"), {}, "format: Input should be 'sinkexport sink tuning'"),
        (broken(first_token_scale=[[1.0] * HEADS]), {}, "must have 2 layers of 6"),
        (broken(first_token_scale=[[0.0] * HEADS] * LAYERS), {}, "greater than 0"),
        (tuning("llama").to_json(), {"--sink-tokens": "0"}, "received 0 sinks, expected at least 1"),
        (tuning("llama").to_json().replace("Llama", "GptOss"), {"MODEL": "gpt_oss"}, "factors in layer 0, which keeps"),
        (tuning("qwen2").to_json(), {}, "architecture Qwen2ForCausalLM, expected architecture LlamaForCausalLM"),
    ],
)
def test_export_refuses_in_one_line(
    content: str | None, options: dict[str, str], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "tuning.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert_export_refuses("--sink-tuning", file, options, expected, tmp_path)


# --- tune -------------------------------------------------------------------------------------------------------------


def planted_texts(model: Any, scale: torch.Tensor, count: int, length: int) -> list[str]:
    """Sampled from the model with these factors: under them, no other factors predict the texts better on average."""
    random, texts = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(3, VOCAB_SIZE, (1, 1), generator=random)
        with torch.no_grad(), first_token_scaled(model, scale):
            for _ in range(length):
                chances = model(ids).logits[0, -1].softmax(dim=-1)
                ids = torch.cat((ids, torch.multinomial(chances, 1, generator=random)[None]), dim=1)
        texts.append(" ".join(f"w{i}" for i in ids[0].tolist()))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "factor"), [(0, 0.2), (1, 5.0)])
def test_tune_finds_the_layer_that_was_planted(layer: int, factor: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save(tmp_path / "model")
    planted = torch.ones(LAYERS, HEADS)
    planted[layer] = factor
    lines = [json.dumps({"text": text}) for text in planted_texts(model, planted, 24, 24)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["tune", str(tmp_path / "model"), "--labelled", str(tmp_path / "texts.jsonl"), "--by", "layer", "-o"]
    for file in ("a.json", "b.json"):
        result = run_cli(*arguments, tmp_path / file)
        result.succeeded()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()  # deterministic
    found = SinkTuningFile.load(tmp_path / "a.json")
    assert set(found.first_token_scale[layer]) == {0.2 if factor < 1 else 3.0}
    assert set(found.first_token_scale[1 - layer]) == {1.0}
    before, after = (float(x) for x in found.found.rpartition("held out: ")[2].split(" -> "))
    assert after < before  # on texts that did not choose them, too
    assert "12 texts chose" in result.out
    export_model(model, tmp_path / "out", **GEOMETRY, sink_tuning=found)
    shown = run_cli("inspect", tmp_path / "out").out
    assert "tuned sinks" in shown


def test_tune_keeps_the_model_as_it_is_if_nothing_helps() -> None:
    """Texts sampled without factors, enough of them: the model itself predicts them best."""
    model = tiny_model("llama")
    texts = planted_texts(model, torch.ones(LAYERS, HEADS), 16, 24)
    examples = read_examples(tiny_tokenizer(), "\n".join(json.dumps({"text": text}) for text in texts))
    result = tune(LoadedModel(model, None, "tiny"), [e for e in examples for _ in range(2)], unit="layer")
    assert result.after <= result.before
    assert result.after.loss == pytest.approx(result.held_out_after.loss)  # the same texts on both sides here
    assert result.before.loss - result.after.loss < 0.02


def test_lines_of_examples_end_in_line_feeds_only() -> None:
    """JSON lets other line ends of Unicode be in a text as they are."""
    texts = [f"w5{end}w6 w7" for end in "\x85\u2028\u2029\x7f"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert len(read_examples(tiny_tokenizer(), lines + "\n")) == len(texts)


QUESTIONS = [
    {"prompt": "w5 w6 w7", "choices": ["w8", "w9 w10", "w11"], "answer": 1},
    {"prompt": "w15 w16", "choices": ["w18", "w19"], "answer": "w18"},
    {"prompt": "w3 w4 w5 w6 w7 w8", "choices": ["w8 w9", "w19"], "answer": 0},
]


def test_questions_are_scored_as_one_by_one() -> None:
    model = tiny_model("qwen3")
    examples = read_examples(tiny_tokenizer(), "\n".join(map(json.dumps, QUESTIONS)))
    scale = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    wrong, losses, entropies = 0, [], []
    with torch.no_grad(), first_token_scaled(model, scale):
        got, entropy = (score(model, examples, objective) for objective in ("labels", "entropy"))
        for example in examples:
            chances = []
            for answer in example.answers:
                logits = model(torch.tensor([[*example.context, *answer]])).logits[0].double().log_softmax(-1)
                start = len(example.context) - 1
                chances.append(sum(float(logits[start + i, token]) for i, token in enumerate(answer)))
            entropies.append(float(-(logits[start].exp() * logits[start]).sum()))
            wrong += max(chances) != chances[0]
            losses.append(float(np.logaddexp.reduce(chances)) - chances[0])
    assert got.errors == wrong / len(QUESTIONS)
    assert got.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert entropy.loss == pytest.approx(np.mean(entropies), abs=1e-5)


def test_answers_are_put_first() -> None:
    examples = read_examples(tiny_tokenizer(), "\n".join(map(json.dumps, QUESTIONS)))
    assert examples[0] == Example((5, 6, 7), ((9, 10), (8,), (11,)), 1)
    assert examples[1].answers == ((18,), (19,))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("{}\n", "line 1: received keys []"),
        ('\n{"text": "w3 w4"}\nno\n', "line 3: received no JSON"),
        ('{"text": 7}\n', "line 1: received int where a text should be"),
        ('{"prompt": "w3", "choices": ["w4"], "answer": 0}\n', "fewer than 2 choices"),
        ('{"prompt": "w3", "choices": ["w4", "w5"], "answer": 2}\n', "answer 2, which is none of the 2 choices"),
        ('{"prompt": "w3", "choices": ["w4", ""], "answer": 0}\n', "an empty prompt or choice"),
        ('{"text": "w3 w4"}\n', "received 1 examples, expected at least 2"),
        ('{"text": "w3 w4"}\n{"prompt": "w3", "choices": ["w4", "w5"], "answer": 1}\n', "questions and texts"),
    ],
)
def test_labelled_files_are_refused_in_one_line(lines: str, expected: str) -> None:
    with pytest.raises(UsageError, match="--labelled") as error:
        read_examples(tiny_tokenizer(), lines)
    assert expected in str(error.value)


def test_examples_longer_than_the_model_are_refused() -> None:
    limit = TINY["llama"][1]["max_position_embeddings"]
    long = [Example((3,), ((4,) * limit,), 1), Example((3,), ((4,),), 2)]
    with pytest.raises(UsageError, match=f"at most {limit}"):
        tune(LoadedModel(tiny_model("llama"), None, "tiny"), long)
